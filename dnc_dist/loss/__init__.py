"""Losses of two kinds, named by their attribute `kind`; `build_loss` makes them from the values of a config section.

"pairwise": forward(z, labels, learner, row_ids, num_learners, seed, step, references, max_positives) -> MarginLossOutput,
sums per learner of local anchors against references. "whole_batch": forward(z, labels, mask) -> scalar, of one learner's
gathered batch. What a loss learns are parameters of its module.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dnc_dist.base.errors import InputError
from dnc_dist.loss.margin import MarginLoss
from dnc_dist.loss.proxy_anchor import ProxyAnchorLoss
from dnc_dist.loss.references import References

__all__ = ["MarginLoss", "ProxyAnchorLoss", "References", "build_loss"]

LOSSES: dict[str, Callable[..., nn.Module]] = {"margin": MarginLoss, "proxy_anchor": ProxyAnchorLoss}


def build_loss(name: str, options: Mapping[str, Any], num_classes: int, embedding_dim: int) -> nn.Module:
    """The loss called `name` for C = `num_classes` and D = `embedding_dim`; `options` are its keyword arguments.

    Raises:
        InputError: an unknown name or option, or a value that the loss refuses.
    """
    if name not in LOSSES:
        raise InputError(f"loss.name={name!r} is unknown; {_allowed(name, LOSSES)}")
    parameters = inspect.signature(LOSSES[name]).parameters
    known = [key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            raise InputError(f"loss.{key} is no option of loss.name={name}; {_allowed(key, known)}")
    sizes = {"num_classes": num_classes, "embedding_dim": embedding_dim}
    return LOSSES[name](**{key: value for key, value in sizes.items() if key in parameters}, **options)


def _allowed(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"Allowed are {', '.join(sorted(words))}"
