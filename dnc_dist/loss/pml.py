"""Any loss of pytorch-metric-learning (Musgrave et al., 2020), with any of its miners, by the names of their classes."""

from __future__ import annotations

import copy
import difflib
import inspect
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dnc_dist.base.errors import InputError
from dnc_dist.loss.whole_batch import BatchLoss


class PmlLoss(BatchLoss):
    """A loss of pytorch-metric-learning on one learner's rows, and the pairs or triplets that a miner finds among these.

    The width of the embedding and the number of classes are given to constructors that take them. The loss's parameters are trained;
    learned weights of classes lie in the whole embedding, without a learner's mask. A loss that remembers past batches is no part of
    this: nothing of them would be in a checkpoint. A distance, a reducer or a regularizer is an option by the name of its class, or
    by its name and its options.

    Raises:
        InputError: the library is not installed, does not know a name or an option, or cannot compute with them.
    """

    class Options(BatchLoss.Options):
        """Any loss and miner of pytorch-metric-learning."""

        loss: str
        """Class in `pytorch_metric_learning.losses`, such as `MultiSimilarityLoss`."""
        loss_options: dict[str, Any] = {}
        """Arguments of its constructor, such as `{distance: {name: LpDistance, power: 2}}`, without embedding width and classes."""
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
        self._try()

    def forward(self, z: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of the library, with its own reducer. See ``BatchLoss.forward``."""
        mined = None if self.miner is None else self.miner(z, labels)
        # Some losses give a vector of one number.
        return torch.as_tensor(self.loss(z, labels, mined), dtype=z.dtype, device=z.device).sum()

    def _try(self) -> None:
        """Compute the loss of a few rows with a copy: what the library does not like shall be known before the training.

        Raises:
            InputError: it cannot.
        """
        labels = torch.tensor([0, 0, 0, *[self.num_classes - 1] * 3])
        with torch.random.fork_rng([]), torch.no_grad():
            z = torch.nn.functional.normalize(torch.randn(len(labels), self.embedding_dim), dim=1)
            try:
                copy.deepcopy(self)(z, labels)
            except MemoryError:
                raise
            # Nothing is known about what its classes raise.
            except Exception as error:
                chosen = {key: value for key, value in self.options if key != "name" and value}
                told = ", ".join(f"loss.{key}={value}" for key, value in chosen.items())
                raise InputError(f"pytorch-metric-learning cannot compute {told}: {type(error).__name__}: {error}") from error


_MODULES = {"loss": "losses", "miner": "miners", "distance": "distances", "reducer": "reducers", "regularizer": "regularizers"}
"""Kind of object -> the library's module of its classes."""
_BASES = {
    "loss": "BaseMetricLossFunction",
    "miner": "BaseMiner",
    "distance": "BaseDistance",
    "reducer": "BaseReducer",
    "regularizer": "BaseRegularizer",
}
_LEFT_OUT = {
    # Bases.
    *_BASES.values(),
    "GenericPairLoss",
    # Of two batches, or of rows without labels.
    "VICRegLoss",
    "ManifoldLoss",
    "EmbeddingsAlreadyPackagedAsTriplets",
    # It remembers the margins of past batches.
    "DynamicSoftMarginLoss",
}


def _make(kind: str, name: str, options: dict[str, Any], sizes: dict[str, int], key: str = "") -> nn.Module:
    """An instance of a class of the library.

    Args:
        kind: of object, one of ``_MODULES``.
        name: of its class.
        options: of its constructor.
        sizes: what is given to constructors that take it.
        key: in the configuration, if it is not the kind's own.
    """
    classes = _classes(kind)
    place, inside = (key, key) if key else (f"loss.{kind}", f"loss.{kind}_options")
    if name not in classes:
        raise InputError(f"{place}={name!r} is no {kind} of pytorch-metric-learning; {_allowed(name, list(classes))}")
    known = _arguments(classes[name])
    arguments: dict[str, Any] = {size: value for size, value in sizes.items() if size in known}
    for option, value in options.items():
        if option not in known:
            raise InputError(f"{inside}.{option} is no option of {name}; {_allowed(option, sorted(known))}")
        part = option.rpartition("_")[2]  # such as embedding_regularizer
        arguments[option] = _chosen(part, value, sizes, f"{inside}.{option}") if part in ("distance", "reducer", "regularizer") else value
    try:
        made: nn.Module = classes[name](**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"{inside}={options} is refused by {name} of pytorch-metric-learning: {error}") from error
    return made


def _chosen(kind: str, value: Any, sizes: dict[str, int], key: str) -> nn.Module | None:
    """What an option says of an object: null, the name of its class, or ``name`` and its options."""
    if value is None:
        return None
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise InputError(f"{key}={value!r} must be the name of a {kind} of pytorch-metric-learning, or {{name: ..., and its options}}")
    return _make(kind, options["name"], {name: option for name, option in options.items() if name != "name"}, sizes, key)


def _classes(kind: str) -> dict[str, type[nn.Module]]:
    """Name -> class of what is there of a kind; of losses those of embeddings and labels."""
    try:
        module = import_module(f"pytorch_metric_learning.{_MODULES[kind]}")
    except ImportError as error:
        raise InputError(
            f"loss.name=pml needs pytorch-metric-learning, which cannot be imported ({error}); pip install 'dnc-dist[pml]'"
        ) from error
    base: type[nn.Module] = getattr(module, _BASES[kind])
    found = {name: value for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)}
    return {name: value for name, value in found.items() if name not in _LEFT_OUT}


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
