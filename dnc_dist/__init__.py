"""Divide-and-Conquer deep metric learning on one process or many."""

from typing import TYPE_CHECKING, Any

from dnc_dist.base import torchvision_guard

if TYPE_CHECKING:
    from dnc_dist.divider import Divider
    from dnc_dist.embedder import Embedder, load

__version__ = "0.1.0"
__all__ = ["Divider", "Embedder", "load"]

torchvision_guard.install()


def __getattr__(name: str) -> Any:
    """The names of ``__all__``, imported when they are first asked for: they bring torch, and the command line is to answer at once."""
    if name == "Divider":
        from dnc_dist.divider import Divider

        return Divider
    if name in ("Embedder", "load"):
        from dnc_dist import embedder

        return getattr(embedder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
