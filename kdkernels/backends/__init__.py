"""Backends: cuda | cpu | triton | simt | torch behind one registry. Only this package branches on
devices."""

from .registry import BackendReport, backends, debug, pick, settings, use_backend

__all__ = ["BackendReport", "backends", "debug", "pick", "settings", "use_backend"]
