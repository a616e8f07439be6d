"""Any loss of pytorch-metric-learning (Musgrave et al., 2020), with any of its miners, by the names of their classes."""

from __future__ import annotations

import difflib
import inspect
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dnc_dist.base.errors import InputError
from dnc_dist.loss.whole_batch import BatchLoss


class PmlLoss(BatchLoss):
    """A loss of pytorch-metric-learning on one learner's rows, and the pairs or triplets that a miner finds among these.

    The width of the embedding and the number of classes are given to constructors that take them. The loss's parameters are trained;
    learned weights of classes lie in the whole embedding, without a learner's mask. A loss that keeps past batches is no part of this:
    nothing of it would be in a checkpoint.

    Raises:
        InputError: the library is not installed, or does not know a name or an option.
    """

    class Options(BatchLoss.Options):
        """Any loss and miner of pytorch-metric-learning."""

        loss: str
        """Class in `pytorch_metric_learning.losses`, such as `MultiSimilarityLoss`."""
        loss_options: dict[str, Any] = {}
        """Arguments of its constructor, without the embedding's width and the number of classes."""
        miner: str | None = None
        """Class in `pytorch_metric_learning.miners`, such as `MultiSimilarityMiner`; null: all pairs."""
        miner_options: dict[str, Any] = {}
        """Arguments of the miner's constructor."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"loss": "MultiSimilarityLoss", "miner": "MultiSimilarityMiner"},
        {"loss": "TripletMarginLoss", "loss_options": {"triplets_per_anchor": 5, "margin": 0.5}},  # drawn at random
        {"loss": "ProxyNCALoss"},
    )
    options: Options

    def __init__(self, options: Options, *, num_classes: int, embedding_dim: int) -> None:
        super().__init__(options, num_classes=num_classes, embedding_dim=embedding_dim)
        sizes = {"num_classes": num_classes, "embedding_size": embedding_dim, "descriptors_dim": embedding_dim}
        self.loss = _make("loss", options.loss, options.loss_options, sizes)
        self.miner = None if options.miner is None else _make("miner", options.miner, options.miner_options, sizes)
        for parameter in self.parameters():
            if parameter.dim() == 0:  # DeepSpeed broadcasts parameters as bytes, which a 0-d tensor cannot be viewed as
                parameter.data = parameter.data.view(1)

    def forward(self, z: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of the library, with its own reducer. See ``BatchLoss.forward``."""
        mined = None if self.miner is None else self.miner(z, labels)
        # Some losses give a vector of one number.
        return torch.as_tensor(self.loss(z, labels, mined), dtype=z.dtype, device=z.device).sum()


def _make(kind: str, name: str, options: dict[str, Any], sizes: dict[str, int]) -> nn.Module:
    """An instance of a class of the library. ``kind`` is "loss" or "miner", ``sizes`` what is given to constructors that take it."""
    classes = _classes(kind)
    if name not in classes:
        raise InputError(f"loss.{kind}={name!r} is no {kind} of pytorch-metric-learning; {_allowed(name, list(classes))}")
    known = _arguments(classes[name])
    for key in options:
        if key not in known:
            raise InputError(f"loss.{kind}_options.{key} is no option of {name}; {_allowed(key, sorted(known))}")
    try:
        made: nn.Module = classes[name](**{key: value for key, value in sizes.items() if key in known} | options)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"loss.{kind}_options={options} is refused by {name} of pytorch-metric-learning: {error}") from error
    return made


def _classes(kind: str) -> dict[str, type[nn.Module]]:
    """Name -> class of all losses of (embeddings, labels), or of all miners."""
    try:
        from pytorch_metric_learning import losses, miners
    except ImportError as error:
        raise InputError(
            f"loss.name=pml needs pytorch-metric-learning, which cannot be imported ({error}); pip install 'dnc-dist[pml]'"
        ) from error
    if kind == "miner":
        return _subclasses(miners, miners.BaseMiner, {miners.BaseMiner})
    # Bases; and one that compares two batches.
    return _subclasses(losses, losses.BaseMetricLossFunction, {losses.BaseMetricLossFunction, losses.GenericPairLoss, losses.VICRegLoss})


def _subclasses(module: ModuleType, base: type[nn.Module], left_out: set[Any]) -> dict[str, type[nn.Module]]:
    named = {name: value for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)}
    return {name: value for name, value in named.items() if value not in left_out}


def _arguments(made: type) -> set[str]:
    """Names that the constructor takes, also those that it hands on to its bases."""
    names: set[str] = set()
    for base in made.__mro__:
        if "__init__" not in vars(base) or base is nn.Module:
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        names |= {parameter.name for parameter in parameters if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names


def _allowed(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"Allowed are {', '.join(words)}"
