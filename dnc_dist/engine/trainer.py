"""The training loop. What happens when stands in ``plan``, what is kept in ``state``, what a step computes in ``objective``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dnc_kernels
from dnc_dist import distributed
from dnc_dist.clustering.divide import divide
from dnc_dist.clustering.division import Division, check_num_learners, whole
from dnc_dist.config import RunConfig
from dnc_dist.data.stream import Batch
from dnc_dist.engine import plan
from dnc_dist.engine.checkpoint import Checkpoints, prepare_run_dir
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.evaluate import evaluate_view, save_neighbours
from dnc_dist.engine.extract import extract
from dnc_dist.engine.setup import build_engine, build_objective, set_learning_rates
from dnc_dist.engine.signals import StopRequest
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.steplog import StepLog
from dnc_dist.errors import InputError, Stopped
from dnc_dist.progress import Progress
from dnc_dist.tracker import build_tracker

_log = logging.getLogger(__name__)


def train(cfg: RunConfig, resume: str = "auto") -> dict[str, Any]:
    """Collective. Train a run to its end, from where its checkpoints left off, and return the RESULT values.

    Args:
        cfg: the configuration; ``cfg.run.path`` is the run directory.
        resume: "auto" goes on if the run directory has a checkpoint, "never" refuses a used directory, a path names a checkpoint.

    Raises:
        InputError: the configuration, the data and the run directory do not fit together.
        Stopped: a signal asked for it; the state is saved.
    """
    stop = StopRequest()
    stop.install()
    trainer = Trainer(cfg, resume, stop)
    try:
        return trainer.fit()
    except Stopped as request:
        folder = trainer.save()
        raise Stopped(f"{request}; saved {folder}, `--resume auto` goes on from there") from None
    finally:
        trainer.close()


class Trainer:
    """A run on this rank."""

    def __init__(self, cfg: RunConfig, resume: str, stop: StopRequest) -> None:
        self.cfg, self.stop = cfg, stop
        self.progress = Progress(distributed.is_main())
        self.data = RunData(cfg)
        self.selected_on, _ = self.data.selection_view()
        check_num_learners(self.data.train.labels, cfg.division.num_learners)
        _on_main(prepare_run_dir, cfg, resume)
        self.checkpoints = Checkpoints(cfg.run.path, cfg.checkpoint.keep)
        self.objective = build_objective(cfg, self.data.train.num_classes)
        self.engine = build_engine(self.objective, cfg)
        self.groups = _learner_groups(cfg.division.learners_per_step)
        self.state = self._resume(resume)
        self.tracker = build_tracker(
            cfg.tracker.kind,
            cfg.run.path,
            project=cfg.tracker.project,
            run_name=cfg.run.name,
            config=cfg.model_dump(mode="json"),
            run_id=self.state.tracker_run_id,
            resume_step=self.state.step or None,
        )
        self.state.tracker_run_id = self.tracker.run_id
        self._announce()

    def fit(self) -> dict[str, Any]:
        """Collective. Train until all epochs are done; the RESULT values."""
        if self.cfg.evaluation.at_start and not self.state.baseline:
            self.state.baseline = self.evaluate()
        while not plan.finished(self.cfg, self.state):
            started = time.monotonic()
            if plan.division_due(self.cfg, self.state):
                self.divide()
            divided = time.monotonic()
            waiting = self.train_epoch()
            trained = time.monotonic()
            if plan.evaluation_due(self.cfg, self.state.epoch):
                self.state.metrics = self.evaluate()
            self._log_epoch(started, divided, trained, waiting)
            self.state.finish_epoch()
            self.save(best=self._is_best())
        return self.result()

    def divide(self) -> None:
        """Collective. A new division of the training set, from features of all its rows; saved in the run directory."""
        started = time.monotonic()
        epoch, div = self.state.epoch, self.cfg.division
        if plan.trains_whole_set(self.cfg, epoch):
            division = whole(self.data.train.labels, epoch=epoch)
        elif div.num_learners == 1:
            division = whole(self.data.train.labels, epoch=epoch)
        else:
            if self.state.step:
                self.save()
            division = self._cluster(epoch)
        self.state.division = division
        if distributed.is_main():
            folder = self.cfg.run.path / "divisions"
            folder.mkdir(exist_ok=True)
            division.save(folder / f"epoch-{epoch:04d}.npz")
        seconds = time.monotonic() - started
        names = ("num_learners", "matched_share", "nmi_to_previous", "left_out", "rejoined", "trials", "objective")
        values = {name: getattr(division, name) for name in names} | {"sizes": division.sizes.tolist(), "seconds": seconds}
        self.tracker.log("division", self.state.step, epoch, values)
        self._say(
            f"epoch {epoch}: {division.num_learners} learner(s) of {', '.join(map(str, division.sizes))} images, "
            f"{division.left_out} left out, {division.matched_share:.0%} kept theirs ({seconds:.1f} s)"
        )

    def _cluster(self, epoch: int) -> Division:
        """Collective. Divide the rows that can be decoded; the others are left out."""
        div, view = self.cfg.division, self.data.train
        compute = self.objective.features if div.cluster_on == "features" else self.objective.embeddings
        found = extract(
            self.objective,
            compute,
            self.data.sequential(view),
            name=f"epoch {epoch}: features",
            num_rows=len(view),
            stop=self.stop,
            progress=self.progress,
        )
        self._report_failed(found.failed)
        valid = distributed.gather_rows(found.valid.to(distributed.device())).cpu().numpy()
        previous = self.state.division
        if previous is not None:
            previous = replace(previous, learner_of=previous.learner_of[valid])
        division = divide(
            found.values[found.valid],
            view.labels[valid],
            row_start=int(valid[: found.start].sum()),
            target=div.num_learners,
            epoch=epoch,
            mode=div.mode,
            seed=self.cfg.run.seed,
            previous=previous,
            iterations=div.kmeans_iterations,
            trials=div.trials,
        )
        learner_of = np.full(len(view), -1, np.int16)
        learner_of[valid] = division.learner_of
        return replace(division, learner_of=learner_of, left_out=int((learner_of < 0).sum()))

    def train_epoch(self) -> float:
        """Collective. The remaining steps of the epoch; the seconds that this rank waited for data."""
        cfg, state = self.cfg, self.state
        assert state.division is not None
        conquer = plan.conquering(cfg, state.epoch)
        schedule = self.data.schedule(state.division, state.epoch, conquer=conquer)
        rows_in_step = np.diff(schedule.starts)
        first_step = state.step - state.batches_done
        log = StepLog(self.tracker, cfg.tracker.log_every)
        batches = _Timed(self.data.train_batches(schedule, first_step=first_step, skip=state.batches_done))
        self.objective.train()
        stopping: Tensor | None = None
        with self.progress.phase(f"epoch {state.epoch}", len(schedule), "steps") as phase:
            phase.update(state.batches_done)
            for batch in batches:
                rates = plan.learning_rates(cfg, state, len(schedule))
                set_learning_rates(self.engine, rates)
                loss, stats = self.engine(
                    batch.to(distributed.device()), plan.phase(cfg, state), group=self._group(schedule.turns.shape[1]), stop=self.stop.requested
                )
                self.engine.backward(loss)
                self.engine.step()
                rows = int(rows_in_step[state.batches_done])
                state.step, state.batches_done, state.samples_seen = state.step + 1, state.batches_done + 1, state.samples_seen + rows
                self._report_failed(batch.failed)
                log.step(state.step, state.epoch, stats, rates, rows, batches.waited)
                phase.update(1, log.note)
                # Read one step late, so that a device is never waited for.
                if stopping is not None and bool(stopping):
                    raise Stopped(f"in epoch {state.epoch} after step {state.step}")
                stopping = stats["stop"]
                if cfg.checkpoint.every_steps and state.step % cfg.checkpoint.every_steps == 0 and state.batches_done < len(schedule):
                    self.save()
        log.flush(state.step, state.epoch)
        return batches.waited

    def evaluate(self) -> dict[str, Any]:
        """Collective. Retrieval metrics on the test split, and on the validation split if there is one; logged."""
        cfg, state = self.cfg, self.state
        trained = state.step > 0
        metrics: dict[str, Any] = {}
        for prefix, view in (("", self.data.test), ("validation/", self.data.validation)):
            if view is None:
                continue
            with_nmi = trained and plan.nmi_due(cfg, state.epoch) and not prefix
            found = evaluate_view(self.objective, self.data, view, cfg, with_nmi=with_nmi, stop=self.stop, progress=self.progress, epoch=state.epoch)
            self._report_failed(found.failed)
            metrics |= {prefix + name: value for name, value in found.metrics.items()}
            if not prefix and trained and state.epoch + 1 == cfg.schedule.epochs:
                save_neighbours(self.data, view, found, cfg.run.path)
        # The untrained network stands before epoch 0, the others after their epoch.
        self.tracker.log("evaluation", state.step, state.epoch + 1 if trained else 0, metrics)
        if metrics:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
            self._say(f"{f'epoch {state.epoch}' if trained else 'untrained'}: {shown}")
        return metrics

    def save(self, *, best: bool = False) -> Path:
        """Collective. Write a checkpoint."""
        return self.checkpoints.save(self.engine, self.state, best=best)

    def result(self) -> dict[str, Any]:
        """The values of the RESULT line."""
        state, metrics = self.state, self.state.metrics
        chosen = {name: metrics.get(name) for name in ("recall@1", "map@r", "nmi", "protocol")}
        values = {"run": str(self.cfg.run.path), "epoch": state.epoch, "samples_seen": state.samples_seen, **chosen}
        values["selected_on"] = self.selected_on
        if state.baseline:
            values["untrained_recall@1"] = state.baseline.get("recall@1")
        if state.best is not None and self.selected_on != "last":
            values["best"] = state.best
        return values

    def close(self) -> None:
        """Stop workers and tracker."""
        self.data.close()
        self.tracker.close()

    def _is_best(self) -> bool:
        """Whether the evaluation that just ran is the best so far on the selecting split; remembers it."""
        name = {"validation": "validation/recall@1", "test": "recall@1"}.get(self.selected_on)
        if name is None or name not in self.state.metrics or not plan.evaluation_due(self.cfg, self.state.epoch - 1):
            return False
        value = self.state.metrics[name]
        if self.state.best is not None and self.state.best["value"] >= value:
            return False
        self.state.best = {"value": value, "epoch": self.state.epoch, "step": self.state.step, "recall@1": self.state.metrics.get("recall@1")}
        return True

    def _resume(self, resume: str) -> TrainState:
        """Collective. The state of the checkpoint to go on from, or a new one.

        Raises:
            InputError: the checkpoint belongs to other data or to another number of processes.
        """
        which = "latest" if resume in ("auto", "never") else Path(resume).name
        if resume not in ("auto", "never") and Path(resume).resolve().parent != self.checkpoints.folder.resolve():
            raise InputError(f"--resume {resume} is no checkpoint of {self.cfg.run.path}; give auto, never, or a folder in {self.checkpoints.folder}")
        found = _on_main(self.checkpoints.find, which)
        fresh = TrainState(config_digest=self.cfg.digest(), data_hash=self.data.index.content_hash)
        if found is None:
            return fresh
        tag, messages = found
        for message in messages:
            self._say(message)
        state = self.checkpoints.load(self.engine, tag)
        if state.data_hash != fresh.data_hash:
            raise InputError(
                f"data.root={self.cfg.data.root} holds other images or labels than the run in {self.cfg.run.path} began with; "
                "give the old data.root, or set run.name to start another run"
            )
        self._say(f"resuming {tag}: epoch {state.epoch}, step {state.step}")
        return state

    def _group(self, learners: int) -> Any:
        """The ranks that serve the same learner as this one in a step of ``learners`` learners; None: all ranks."""
        return self.groups.get(learners)

    def _log_epoch(self, started: float, divided: float, trained: float, waiting: float) -> None:
        now = time.monotonic()
        seconds, training = max(now - started, 1e-9), max(trained - divided, 1e-9)
        rows = len(self.data.train) if self.cfg.schedule.epoch == "dataset" else None
        values = {
            "seconds": seconds,
            "share_divide": (divided - started) / seconds,
            "share_evaluate": (now - trained) / seconds,
            "share_data": waiting / seconds,
            "memory_mb": _peak_memory_mb(),
        }
        if rows is not None:
            values["images_per_second"] = rows / training
        self.tracker.log("epoch", self.state.step, self.state.epoch, values)

    def _report_failed(self, failed: list[str]) -> None:
        for key in failed:
            _log.warning("rank %d: image %s cannot be decoded; left out", distributed.rank(), key)

    def _announce(self) -> None:
        cfg, view = self.cfg, self.data.train
        world = distributed.world_size()
        self._say(
            f"{cfg.run.path}: {len(view)} training images of {view.num_classes} classes; {world} process(es), ZeRO {cfg.engine.zero}, "
            f"{cfg.schedule.batch_size} rows a step over all processes, margin loss by {dnc_kernels.implementation(distributed.device())}"
        )

    def _say(self, text: str) -> None:
        if distributed.is_main():
            print(text, flush=True)


class _Timed:
    """Batches, and the seconds spent waiting for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self.waited = batches, 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            started = time.monotonic()
            batch = next(self._batches, None)
            self.waited += time.monotonic() - started
            if batch is None:
                return
            yield batch


def _learner_groups(learners_per_step: int) -> dict[int, Any]:
    """Collective. For each number m of learners a step may have: this rank's group of W/m ranks, where m divides W."""
    groups: dict[int, Any] = {}
    world = distributed.world_size()
    for learners in range(2, learners_per_step + 1):
        if world % learners == 0 and world > 1:
            size = world // learners
            # Every rank makes every group, in the same order.
            made = [torch.distributed.new_group(range(start, start + size)) for start in range(0, world, size)]
            groups[learners] = made[distributed.rank() // size]
    return groups


def _on_main(function: Any, *args: Any) -> Any:
    """Collective. Call on rank 0; its result, or its InputError, on every rank."""
    outcome: tuple[Any, InputError | None] = (None, None)
    if distributed.is_main():
        try:
            outcome = (function(*args), None)
        except InputError as error:
            outcome = (None, error)
    value, error = distributed.broadcast_object(outcome)
    if error is not None:
        raise error
    return value


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
