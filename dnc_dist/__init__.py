"""Divide-and-Conquer deep metric learning on one process or many."""

from typing import TYPE_CHECKING, Any

from dnc_dist.base import torchvision_guard

if TYPE_CHECKING:
    from dnc_dist.divider import Divider

__version__ = "0.1.0"
__all__ = ["Divider"]

torchvision_guard.install()


def __getattr__(name: str) -> Any:
    """``Divider``, imported when it is first asked for: it brings torch, and the command line is to answer at once."""
    if name == "Divider":
        from dnc_dist.divider import Divider

        return Divider
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
