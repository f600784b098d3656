"""Finds the benchmarks and runs their command line (`python -m kdkernels bench`).

They live in the folder `bench` of the repository. A wheel carries that folder as the package
`kdkernels._bench`; in a checkout it is loaded from its place under the same name.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_NAME = "kdkernels._bench"


def load_benchmarks() -> ModuleType:
    """The package of the benchmarks; ImportError where neither wheel nor checkout holds it."""
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    if importlib.util.find_spec(_NAME) is not None:
        return importlib.import_module(_NAME)
    folder = Path(__file__).resolve().parent.parent / "bench"
    if not (folder / "command.py").is_file():
        raise ImportError(f"the benchmarks are neither installed as {_NAME} nor in {folder}")
    spec = importlib.util.spec_from_file_location(
        _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
    return module


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark command with `arguments` (default: those of the process)."""
    load_benchmarks()
    return importlib.import_module(f"{_NAME}.command").main(arguments)


if __name__ == "__main__":
    sys.exit(main())
