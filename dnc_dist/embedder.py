"""A trained model as a function from images to embeddings: ``load(run).embed(paths)``.

It needs the run's directory (or what ``dnc-dist export`` wrote) and nothing else: no initial weights, no data set, no network, no
process group. Images go through the evaluation's transform and the network in evaluation mode, as when retrieval is measured.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.arrays import reading
from dnc_dist.base.errors import InputError, of_the_machine
from dnc_dist.base.foreign import parse_json, shorten
from dnc_dist.base.progress import Progress
from dnc_dist.config import RunConfig
from dnc_dist.data.given import Decoded, decoded, each_image, read
from dnc_dist.data.images import DECODE_ERRORS, why_not
from dnc_dist.data.readers import plain
from dnc_dist.data.transforms import Geometry
from dnc_dist.engine import plan
from dnc_dist.engine.network import EmbeddingNetwork, build_network, of_network, on_device
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.zero import load_weights, read_model
from dnc_dist.processes.cores import usable_cores
from dnc_dist.rundir import CHECKPOINTS
from dnc_dist.rundir.checkpoints import Checkpoints
from dnc_dist.rundir.folder import load_run_config

WEIGHTS_FILE = "model.safetensors"
"""The weights of an exported model, with ``Exported`` as metadata under ``METADATA``."""
METADATA = "dnc_dist"
_MOST_THREADS = 8
_AHEAD = 2
"""Batches that are decoded ahead of the network."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What an exported model says of where it is from: the run's name, the checkpoint, epochs trained, learners that have a subspace."""

    run: str
    checkpoint: str
    epoch: int
    num_learners: int


class Embedded(NamedTuple):
    """``vectors`` (n, D) float32, NaN where an image could not be read; ``failed``: its position -> why."""

    vectors: np.ndarray
    failed: dict[int, str]


class Embedder:
    """A trained network with its transform; ``load`` makes it.

    ``dim``: D; ``checkpoint``: which one of the run; ``epoch``: epochs trained; ``num_learners``: learners that have a
    subspace of the embedding, also after it was trained together; ``state``: what else the checkpoint says, None of an exported model.
    """

    def __init__(
        self, network: EmbeddingNetwork, cfg: RunConfig, source: Path, origin: Exported, device: torch.device, state: TrainState | None
    ) -> None:
        self.network, self.cfg, self.source, self.origin = on_device(network, device).eval(), cfg, source, origin
        self.device, self.state = device, state
        self.dim, self.checkpoint, self.epoch = cfg.model.embedding_dim, origin.checkpoint, origin.epoch
        self.num_learners = origin.num_learners
        self.batch_size = cfg.evaluation.batch_size
        self._geometry = Geometry(None, cfg.data.image_size, cfg.data.crop)

    def __repr__(self) -> str:
        return f"Embedder({str(self.source)!r}, checkpoint={self.checkpoint!r}, dim={self.dim}, device={str(self.device)!r})"

    @cached_property
    def fingerprint(self) -> str:
        """A number of the weights and of all that decides what they make of an image; equal for a run and its export."""
        data, model = self.cfg.data, self.cfg.model
        found = hashlib.blake2b(digest_size=16)
        # An option that is new, and at its default, leaves the number as it was.
        masks = model.masks.model_dump(exclude_defaults=True)
        settings = (data.image_size, data.crop, data.mean, data.std, model.backbone.model_dump(), model.pooling, masks)
        found.update(repr(settings).encode())
        for name, value in sorted(self.network.state_dict().items()):
            found.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def embed(
        self,
        images: Any,
        *,
        learner: int | None = None,
        batch_size: int | None = None,
        unreadable: Literal["raise", "nan"] = "raise",
        progress: bool = False,
    ) -> np.ndarray:
        """(N, D) float32 embeddings with rows of norm 1, in the order given: the same as the evaluation computes.

        In floating point the last digit of a row may depend on the size of its batch, as in any network.

        Args:
            images: a path, a folder (its images at any depth, by name), a PIL image, an array (H, W, 3) uint8, an array (N, H, W, 3), or
                an iterable of paths, PIL images and arrays, which is read as it is needed.
            learner: only the subspace of this learner, 0 to ``num_learners`` - 1; None: the whole embedding.
            batch_size: images in a forward pass; None: that of the evaluation.
            unreadable: "raise", or "nan": the row of an image that cannot be read is NaN.
            progress: show it on stderr, where the number of images is known.

        Raises:
            InputError: an image cannot be read, or something is no image.
        """
        compute: Callable[[Tensor], Tensor] = self.network.embeddings
        if learner is not None:
            if not 0 <= learner < self.num_learners:
                raise InputError(f"learner={learner}: the model has {self.num_learners} learner(s), from 0 on")
            compute = partial(self.network.subspace, learner=learner, level=self.num_learners)
        return self._embed(images, compute, self.dim, batch_size, unreadable, progress)

    def features(
        self, images: Any, *, batch_size: int | None = None, unreadable: Literal["raise", "nan"] = "raise", progress: bool = False
    ) -> np.ndarray:
        """(N, F) float32 L2-normalised features of the backbone, those that images are clustered by; arguments as of ``embed``."""
        return self._embed(images, self.network.features, self.network.head.linear.in_features, batch_size, unreadable, progress)

    def embed_bytes(self, readers: Sequence[Callable[[], bytes]], update: Callable[[int], None] = lambda count: None) -> Embedded:
        """The embeddings of encoded images; each reader is called once, in some thread, and may raise OSError or InputError.

        ``update`` is told how many images were done.
        """
        return self._run([partial(read, reader) for reader in readers], self.network.embeddings, self.dim, self.batch_size, update)

    def _embed(
        self, images: Any, compute: Callable[[Tensor], Tensor], dim: int, batch_size: int | None, unreadable: str, progress: bool
    ) -> np.ndarray:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size={batch_size}: at least 1 image")
        if unreadable not in ("raise", "nan"):
            raise InputError(f'unreadable={shorten(unreadable)}: "raise" or "nan"')
        given = each_image(images)
        total = len(given) if isinstance(given, Sized) else None
        names: list[str] = []

        def named() -> Iterator[Decoded | Tensor | str]:
            stays = isinstance(given, Sequence | np.ndarray)
            for one in given:
                named = isinstance(one, str | os.PathLike)
                names.append(str(one) if named else f"image {len(names)}")
                source = decoded(one, names[-1])
                # A PIL image may be opened yet unread, and stand there twice, which threads must not share. And whoever makes images
                # one by one may use their memory for the next.
                yield source if named or (stays and isinstance(one, np.ndarray)) else self._pixels(source)

        def refuse(at: int, why: str) -> None:
            if unreadable == "raise":
                raise InputError(
                    f'{names[at]} is no image that can be read: {why}; leave it out, or give unreadable="nan" to get a row of NaN'
                )

        with Progress(progress and total is not None).phase("embedding", total or 0, "img") as phase:
            return self._run(named(), compute, dim, batch_size or self.batch_size, phase.update, refuse).vectors

    def _run(
        self,
        sources: Iterable[Decoded | Tensor | str],
        compute: Callable[[Tensor], Tensor],
        dim: int,
        batch_size: int,
        update: Callable[[int], None] = lambda count: None,
        unread: Callable[[int, str], None] = lambda at, why: None,
    ) -> Embedded:
        """``update`` is told how many images are done, ``unread`` of each that cannot be read, before its batch is computed."""
        vectors, failed, seen = [np.empty((0, dim), np.float32)], {}, 0
        empty = torch.zeros(3, self.cfg.data.image_size, self.cfg.data.image_size, dtype=torch.uint8)
        for pixels in self._batches(sources, batch_size):
            for at, one in enumerate(pixels):
                if isinstance(one, str):
                    unread(seen + at, one)
            # What cannot be read is black, as in the evaluation: the other rows of its batch see the same batch.
            images = torch.stack([empty if isinstance(one, str) else one for one in pixels]).to(self.device)
            with torch.inference_mode():
                rows = compute(images).float().cpu().numpy()
            for at, one in enumerate(pixels):
                if isinstance(one, str):
                    rows[at], failed[seen + at] = np.nan, one
            vectors.append(rows)
            seen += len(rows)
            update(len(rows))
        return Embedded(np.concatenate(vectors), failed)

    def _batches(self, sources: Iterable[Decoded | Tensor | str], size: int) -> Iterator[list[Tensor | str]]:
        """Pixels (3, S, S) of each image, or why it cannot be read; what is not there yet is decoded by threads, a few batches ahead."""
        cores = len(usable_cores())
        with ThreadPoolExecutor(min(_MOST_THREADS, cores)) as pool:
            waiting: deque[Future[Tensor | str] | Tensor | str] = deque()

            def first(count: int) -> list[Tensor | str]:
                taken = [waiting.popleft() for _ in range(count)]
                return [one.result() if isinstance(one, Future) else one for one in taken]

            for source in sources:
                waiting.append(source if isinstance(source, Tensor | str) else pool.submit(self._pixels, source))
                if len(waiting) == (_AHEAD + 1) * size:
                    yield first(size)
            while waiting:
                yield first(min(size, len(waiting)))

    def _pixels(self, source: Decoded) -> Tensor | str:
        try:
            image = source()
        except DECODE_ERRORS as error:
            if of_the_machine(error):
                raise
            return why_not(error)
        return self._geometry(image)


def load(run: str | Path, *, checkpoint: str = "best", device: str | torch.device | None = None) -> Embedder:
    """The model of a run directory, or of a folder that ``dnc-dist export`` wrote.

    Args:
        run: the folder.
        checkpoint: "best" (the last one, if no split selected a best), "last", or a name such as step-00001000. An export has one only.
        device: where it computes; None: the first GPU, if there is one.

    Raises:
        InputError: there is no model, it is damaged, or it was written by another version.
    """
    folder = Path(run)
    chosen = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={chosen}: torch sees no GPU here; take another, or None")
    cfg = load_run_config(folder)
    if (folder / WEIGHTS_FILE).is_file() and not (folder / CHECKPOINTS).is_dir():
        weights, origin = _read_export(folder / WEIGHTS_FILE)
        if checkpoint not in ("best", "last", origin.checkpoint):
            raise InputError(f"{folder} is an exported model of checkpoint {origin.checkpoint}; it has no {checkpoint}")
        source, state = folder / WEIGHTS_FILE, None
    else:
        tag, messages = Checkpoints(folder, cfg.checkpoint.keep).choose(checkpoint)
        for message in messages:
            _log.warning(message)
        source = folder / CHECKPOINTS / tag
        saved = read_model(source)
        weights, state = of_network(saved.weights), saved.state
        origin = Exported(plain(folder.resolve().name), tag, state.epoch, plan.trained_learners(cfg, state))
    network = build_network(cfg, initial_weights=False, device=chosen)
    load_weights(network, weights, source)
    return Embedder(network, cfg, folder, origin, chosen, state)


def _read_export(path: Path) -> tuple[dict[str, Tensor], Exported]:
    from safetensors import safe_open

    with reading(path, "export the run again"), safe_open(path, framework="pt") as file:
        names = file.keys()
        weights = {name: file.get_tensor(name) for name in names}
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        raise InputError(f"{path} was not written by `dnc-dist export`; export the run again")
    return weights, parse_json(text, Exported, path, "export the run again")
