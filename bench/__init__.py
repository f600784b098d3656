"""Benchmarks and numerics studies. `python -m kdkernels bench` runs them; see `command.py`."""
