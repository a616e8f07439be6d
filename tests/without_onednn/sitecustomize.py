"""Every interpreter that finds this folder in PYTHONPATH computes without oneDNN, for which torch has no variable. See `processors.py`.

The switch waits until torch is imported: what needs no torch must not get it from here.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _Switch(MetaPathFinder):
    """Finds torch as Python does, and switches oneDNN off when it has been executed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                module.backends.mkldnn.set_flags(False)

            loader: Loader = spec.loader
            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Switch())
