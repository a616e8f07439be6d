"""Lets torchvision, and so timm, be imported beside a CPU-only torch, where the stock wheel of torchvision fails to.

Such a torchvision finds no CUDA libraries for its compiled operators, and its import stops at "operator torchvision::nms does not
exist". The schemas of two operators are enough for the import; the operators themselves, which only detection uses, stay absent.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_schemas: list[Any] = []  # a torch.library.Library that is garbage-collected takes its schemas along


class _Guard:
    """The first of the import system's finders: acts when torchvision is loaded for the first time, and leaves."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that the other finders have of torchvision, whose loader prepares torch first; None for every other module.

        A mere question whether torchvision is there, as ``importlib.util.find_spec`` puts it, changes nothing.
        """
        if name != "torchvision":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target)) is not None), None)
        if spec is None or spec.loader is None or spec.origin is None:
            return spec
        folder, loader = Path(spec.origin).parent, spec.loader
        load = loader.exec_module

        def prepare_and_load(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)  # from now on it is that of its class again
            remove()
            _declare_missing_operators(folder)
            load(module)

        loader.exec_module = prepare_and_load  # type: ignore[method-assign]
        return spec


_guard = _Guard()


def install() -> None:
    """Guard the first import of torchvision; imports nothing now. It comes too late if torchvision is imported already."""
    if "torchvision" not in sys.modules and _guard not in sys.meta_path:
        sys.meta_path.insert(0, _guard)


def remove() -> None:
    """Guard no longer."""
    if _guard in sys.meta_path:
        sys.meta_path.remove(_guard)


def _declare_missing_operators(folder: Path) -> None:
    """Declare what torchvision's import asks torch for, unless the library in torchvision's folder that does so can be loaded."""
    import torch

    with suppress(OSError):  # it cannot be loaded: what the schemas below are for
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(str(library))
            return
    schemas = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):  # declared by somebody with the same trouble
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(schemas)
