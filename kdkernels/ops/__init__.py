"""Autograd: one file a family, three doors to one backend function (eager, functorch, compile)."""
