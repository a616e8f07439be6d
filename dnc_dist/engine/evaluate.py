"""Retrieval metrics of a model on a view, in training and of a finished run."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnc_dist import __version__
from dnc_dist.base import parts
from dnc_dist.base.errors import InputError, Stopped
from dnc_dist.base.exact import nmi
from dnc_dist.base.progress import Progress
from dnc_dist.base.rng import seed_for
from dnc_dist.clustering import Features, kmeans
from dnc_dist.config import RunConfig
from dnc_dist.data.index import RowView
from dnc_dist.engine.dataset import Passes, columns_of
from dnc_dist.engine.extract import extract
from dnc_dist.engine.network import EmbeddingNetwork, build_network, of_network, on_device
from dnc_dist.engine.per_query import check_place, write_queries
from dnc_dist.engine.steplog import report_failed
from dnc_dist.engine.subspaces import Searched
from dnc_dist.engine.zero import load_weights, read_model
from dnc_dist.processes import distributed, watchdog
from dnc_dist.processes.signals import StopRequest
from dnc_dist.retrieval.protocols import Protocol, RetrievalResult, RolesProtocol
from dnc_dist.rundir.card import CARD, DISTANCE, Card, commit
from dnc_dist.rundir.checkpoints import Checkpoints
from dnc_dist.rundir.folder import load_run_config
from dnc_dist.rundir.gallery import PictureGallery, save_gallery

THUMBNAIL_SIDE = 64
GATHERED_ROWS = 1 << 14
"""Rows of each rank that travel together on their way to rank 0."""
BEAT_SECONDS = 1.0
"""Between two meetings of the ranks while rank 0 computes NMI."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one view, with the protocol and the counts they stand on; ``retrieval`` is what those without a prefix come from."""

    metrics: dict[str, Any]
    retrieval: RetrievalResult
    lists: dict[str, RetrievalResult]
    """The results of all lists; of data without lists one, called ""."""
    failed: list[str]
    facts: dict[str, Any]
    """The fields of the card that an evaluation knows by itself."""
    held: Searched
    """What was measured of ``retrieval``."""

    def card(self, *, epoch: int, checkpoint: str | None, selected_on: str) -> Card:
        """What the metrics stand on, for weights of this epoch and checkpoint that were selected so."""
        return Card(**self.facts, version=__version__, commit=commit(), epoch=epoch, checkpoint=checkpoint, selected_on=selected_on)


def evaluate_view(
    network: EmbeddingNetwork,
    data: Passes,
    view: RowView,
    cfg: RunConfig,
    *,
    with_nmi: bool,
    stop: StopRequest,
    progress: Progress,
    epoch: int,
    protocol: str | None = None,
) -> Evaluation:
    """Collective. Embed a view and measure retrieval on it.

    Raises:
        Stopped: a rank was asked to stop; the evaluation is abandoned.
    """
    columns = columns_of(data.index, view)
    chosen: Protocol = parts.build("protocol", protocol or cfg.data.protocol).for_data(columns)
    name = f"epoch {epoch}: evaluation on {view.name}"
    found = extract(network, network.embeddings, data.sequential(view), name=name, num_rows=len(view), stop=stop, progress=progress)
    rows = found.start + torch.nonzero(found.valid).flatten()
    # Where every row was decoded, as almost always, the embeddings are not copied.
    embeddings = found.values if found.valid.all() else found.values[found.valid]
    shown = progress.counter(f"epoch {epoch}: search on {view.name}", "queries")

    def tick(done: int, total: int) -> None:
        watchdog.beat(f"epoch {epoch}, search, {done} of {total} queries")
        shown(done, total)

    chosen.tick = tick
    results = chosen.measure(embeddings, rows, columns, cfg.evaluation.recall_at)
    watchdog.phase(f"{name}, metrics")
    main = chosen.headline(list(results))
    members = chosen.members(main, columns)
    facts: dict[str, Any] = {
        "protocol": chosen.name,
        "parameters": chosen.parameters(cfg.evaluation.recall_at) | ({"list": main} if main else {}),
        "split": view.name,
        "data_hash": data.index.content_hash,
        **_counts(results[main]),
        "num_classes": len(np.unique(view.labels[members])),
        "distance": DISTANCE,
        "dimension": embeddings.shape[1],
        "seed": cfg.run.seed,
    }
    if not members.all():
        inside = torch.from_numpy(members)[rows]
        embeddings, rows = embeddings[inside.to(embeddings.device)], rows[inside]
    metrics: dict[str, Any] = dict(results[main].metrics)
    if with_nmi:
        metrics["nmi"] = _nmi(embeddings, rows, view, cfg.run.seed, stop, epoch)
    metrics |= {"protocol": chosen.name} | ({"list": main} if main else {}) | _counts(results[main])
    if len(results) > 1:
        for list_name, result in results.items():
            metrics |= {f"{list_name}/{key}": value for key, value in (result.metrics | _counts(result)).items()}
    searched = chosen.roles(columns)[1] if isinstance(chosen, RolesProtocol) else members
    return Evaluation(metrics, results[main], results, found.failed, facts, Searched(embeddings, rows, searched))


def _counts(result: RetrievalResult) -> dict[str, int]:
    return {"num_queries": result.num_queries, "num_gallery": result.num_gallery, "queries_left_out": result.num_left_out}


def _nmi(embeddings: Tensor, rows: Tensor, view: RowView, seed: int, stop: StopRequest, epoch: int) -> float:
    """Collective. NMI of a k-means with as many clusters as classes, run by rank 0 on all rows in their order; other ranks keep none.

    Raises:
        Stopped: a rank was asked to stop.
    """
    device, main = distributed.device(), distributed.is_main()
    every = torch.empty(len(view) if main else 0, embeddings.shape[1])
    present = torch.zeros(len(view), dtype=torch.bool)
    most = int(distributed.gather_rows(torch.tensor([len(rows)], device=device)).max())
    for at in range(0, most, GATHERED_ROWS):
        block = distributed.gather_rows(embeddings[at : at + GATHERED_ROWS].to(device)).cpu()
        which = distributed.gather_rows(rows[at : at + GATHERED_ROWS].to(device)).cpu()
        if main:
            every[which], present[which] = block, True

    def meet(working: bool) -> bool:
        """Collective. Whether rank 0 still works: it may for an hour, and the others cannot wait in one collective for so long."""
        watchdog.phase(f"epoch {epoch}, NMI")
        work, asked = distributed.all_reduce_sum(torch.tensor([float(working), float(stop.requested)], device=device)).tolist()
        if asked:
            raise Stopped(f"during the evaluation of epoch {epoch}")
        return work > 0

    met = time.monotonic()

    def beat() -> None:
        nonlocal met
        if time.monotonic() - met >= BEAT_SECONDS:
            meet(True)
            met = time.monotonic()

    value = None
    if main:
        labels = view.labels[present.numpy()]
        _log.info(f"epoch {epoch}: NMI, a k-means of {len(labels)} images into {len(np.unique(labels))} clusters")
        compared = Features.alone((every if present.all() else every[present]).to(device))
        found = kmeans(compared, len(np.unique(labels)), seed=seed_for(seed, "nmi"), beat=beat)
        value = nmi(found.assignment.numpy(), labels)
    while meet(working=False):
        pass
    return distributed.broadcast_object(value)


def save_neighbours(data: Passes, view: RowView, found: Evaluation, run_dir: Path) -> None:
    """Write the sampled queries with their nearest neighbours and pictures for the report. Rank 0 writes."""
    if not distributed.is_main():
        return
    result = found.retrieval
    queries, neighbours = result.sample_queries, result.sample_neighbours
    known = neighbours >= 0
    save_gallery(
        run_dir,
        PictureGallery(
            query_rows=view.rows[queries],
            neighbour_rows=np.where(known, view.rows[neighbours], -1),
            query_labels=view.labels[queries],
            neighbour_labels=np.where(known, view.labels[neighbours], -1),
            distances=np.sqrt(result.sample_distances),
            class_names=dict(enumerate(view.class_names)),
            query_images=data.thumbnails(view.rows[queries], THUMBNAIL_SIDE),
            neighbour_images=data.thumbnails(np.where(known, view.rows[neighbours], -1), THUMBNAIL_SIDE),
        ),
    )


def evaluate_run(
    run_dir: Path, data_root: Path | None = None, *, protocol: str | None = None, checkpoint: str = "best", per_query: Path | None = None
) -> dict[str, Any]:
    """Collective. Metrics of a run's checkpoint on the test split, and their card.

    Args:
        run_dir: a run directory.
        data_root: of another prepared data set than the run's.
        protocol: instead of the configured one.
        checkpoint: "best" (the last one, if no split selected a best) or "last".
        per_query: where rank 0 writes what every query found, as CSV.

    Raises:
        InputError: no run, no checkpoint, or no test split there.
    """
    cfg = load_run_config(run_dir)
    if data_root is not None:
        cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"root": data_root})})
    if per_query is not None:
        distributed.on_main(check_place, per_query)
    checkpoints = Checkpoints(run_dir, cfg.checkpoint.keep)
    newest = checkpoint == "last" or (checkpoint == "best" and not distributed.on_main(checkpoints.has_best))
    tag, messages = distributed.on_main(checkpoints.choose, checkpoint)
    if distributed.is_main():
        for message in messages:
            _log.warning(message)
    data = Passes(cfg)
    if data.test is None:
        raise InputError(f"data.root={cfg.data.root} has no test split to evaluate on")
    saved = read_model(checkpoints.folder / tag)
    network = on_device(build_network(cfg, initial_weights=False), distributed.device())
    load_weights(network, of_network(saved.weights), checkpoints.folder / tag)
    evaluation = evaluate_view(
        network,
        data,
        data.test,
        cfg,
        with_nmi=cfg.evaluation.nmi != "never",
        stop=StopRequest(),
        progress=Progress(distributed.is_main()),
        epoch=saved.state.epoch,
        protocol=protocol,
    )
    report_failed(set(evaluation.failed))
    if per_query is not None:
        distributed.on_main(write_queries, per_query, data.index, data.test, evaluation.lists)
    # Without validation classes nothing selects but the test split, and then only if it was told to.
    selected_on = "last" if newest else "test" if cfg.evaluation.select_on == "test" else "validation"
    card = evaluation.card(epoch=saved.state.epoch, checkpoint=tag, selected_on=selected_on)
    origin = {"run": str(run_dir), "checkpoint": tag, "epoch": saved.state.epoch}
    return origin | evaluation.metrics | {"selected_on": selected_on, CARD: card.plain()}
