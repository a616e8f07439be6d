"""The training loop. What happens when stands in ``plan``, what is kept in ``state``, what a step computes in ``objective``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dnc_dist.base.errors import InputError, Stopped
from dnc_dist.base.progress import Progress
from dnc_dist.clustering.division import whole
from dnc_dist.config import RunConfig
from dnc_dist.data.stream_plan import StreamSchedule
from dnc_dist.engine import plan
from dnc_dist.engine.announce import announce, result_values
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.diagnose import diagnose
from dnc_dist.engine.evaluate import evaluate_view, save_neighbours
from dnc_dist.engine.finite import FiniteGuard
from dnc_dist.engine.maps import keep_map
from dnc_dist.engine.next_division import check_divisible, next_division
from dnc_dist.engine.setup import build_engine, kernels_note, libraries_note, objective_of_run, seed_libraries, set_learning_rates
from dnc_dist.engine.state import Best, TrainState
from dnc_dist.engine.steplog import EpochShares, StepLog, TimedBatches, report_failed
from dnc_dist.engine.zero import load_checkpoint, prepare_checkpoint, read_model
from dnc_dist.processes import distributed, watchdog
from dnc_dist.processes.signals import StopRequest
from dnc_dist.processes.transfer import Later
from dnc_dist.rundir.card import CARD
from dnc_dist.rundir.checkpoints import Checkpoints, tag_of
from dnc_dist.rundir.folder import RunDirectory, write_config
from dnc_dist.rundir.log import close_log, log_ending, open_log
from dnc_dist.rundir.record import SELECTED_PREFIX, standing
from dnc_dist.rundir.tracker import build_tracker
from dnc_dist.rundir.writing import CheckpointWriter

_log = logging.getLogger(__name__)


def train(cfg: RunConfig, resume: str = "auto", at_end: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Collective. Train a run to its end, from where its checkpoints left off, and return the RESULT values.

    Args:
        cfg: the configuration; ``cfg.run.path`` is the run directory.
        resume: "auto" goes on if the run directory has a checkpoint, "never" refuses a used directory, a path names a checkpoint.
        at_end: called on every rank when all is trained; the tracker then shows what the run directory has.

    Raises:
        InputError: the configuration, the data and the run directory do not fit together.
        Stopped: a signal asked for it; the state is saved.
    """
    stop = StopRequest()
    stop.install()
    trainer = Trainer(cfg, resume, stop)
    try:
        result = trainer.fit()
        at_end()
        trainer.tracker.finished()
        return result
    except Stopped as request:
        folder = trainer.save()
        watchdog.stop()
        stopped = Stopped(f"{request}; saved {folder}, `--resume auto` goes on from there")
        log_ending(stopped)
        raise stopped from None
    except Exception as error:
        log_ending(error)
        raise
    finally:
        trainer.close()


class Trainer:
    """A run on this rank."""

    def __init__(self, cfg: RunConfig, resume: str, stop: StopRequest) -> None:
        self.cfg, self.stop = cfg, stop
        self.progress = Progress(distributed.is_main())
        self.failed: set[str] = set()
        self.kernels = kernels_note(cfg.division.kmeans_backend)
        self.data = RunData(cfg)
        self.selected_on, _ = self.data.selection_view()
        check_divisible(cfg, self.data.train.labels)
        self.checkpoints = Checkpoints(cfg.run.path, cfg.checkpoint.keep)
        # Before the run directory is made: without its initial weights a run does not begin. One with a checkpoint needs them no more.
        begins = distributed.on_main(self.checkpoints.empty)
        self.objective = objective_of_run(cfg, self.data.train.num_classes, begins=begins)
        self.run_dir = RunDirectory(cfg.run.path)
        note = distributed.on_main(self.run_dir.prepare, cfg, resume)
        open_log(cfg.run.path)
        if note:
            _log.info(note)
        self.writer = CheckpointWriter(self.checkpoints)
        self.engine = build_engine(self.objective, cfg)
        self.groups = distributed.rank_groups(cfg.division.learners_per_step)
        self.state = self._resume(resume, begins)
        # Only now: an attempt that was refused must leave no trace in the run.
        distributed.on_main(write_config, cfg)
        self.tracker = build_tracker(
            cfg.tracker.kind,
            cfg.run.path,
            project=cfg.tracker.project,
            run_name=cfg.run.name,
            config=cfg.model_dump(mode="json"),
            run_id=self.state.tracker_run_id,
            resume_step=None if self.state.tracker_run_id is None else self.state.step,
        )
        self.state.tracker_run_id = self.tracker.run_id
        announce(cfg, self.data.train, self.state, self.kernels, libraries_note(self.objective))

    def fit(self) -> dict[str, Any]:
        """Collective. Train until all epochs are done; the RESULT values."""
        if self.cfg.evaluation.at_start and self.state.step == 0:
            self.state.baseline = self.evaluate()
        while not plan.finished(self.cfg, self.state):
            shares = EpochShares(self.state.epoch)
            if plan.division_due(self.cfg, self.state):
                with shares.time("divide"):
                    self.divide()
            with shares.time("train"):
                self.train_epoch(shares)
            if plan.evaluation_due(self.cfg, self.state.epoch):
                if plan.nmi_due(self.cfg, self.state.epoch) or self.state.epoch + 1 == self.cfg.schedule.epochs:
                    # It may take long: whatever happens in it must not cost the epoch.
                    self.save()
                with shares.time("evaluate"):
                    self.state.metrics = self.evaluate()
            counts = {"samples_seen": self.state.samples_seen, "undecodable_images": report_failed(self.failed)} | shares.counts
            self.tracker.log("epoch", self.state.step, self.state.epoch, shares.values() | counts)
            self.state.finish_epoch()
            self.save(best=self._is_best())
        watchdog.stop()
        return result_values(self.cfg, self.state, self.selected_on)

    def divide(self) -> None:
        """Collective. A new division of the training set, from features of all its rows; saved in the run directory."""
        started, epoch = time.monotonic(), self.state.epoch
        if not plan.division_needs_features(self.cfg, self.state):
            division = whole(self.data.train.labels, epoch=epoch)
        else:
            division, failed = next_division(self.objective, self.data, self.cfg, self.state, stop=self.stop, progress=self.progress)
            self.failed.update(failed)
        self.state.division = division
        self.run_dir.check()
        if distributed.is_main():
            division.save(self.run_dir.division_file(epoch))
        seconds = time.monotonic() - started
        names = ("num_learners", "matched_share", "nmi_to_previous", "left_out", "rejoined", "trials", "objective")
        values = {name: getattr(division, name) for name in names} | {"sizes": division.sizes.tolist(), "seconds": seconds}
        values["groups"] = len(division.groups)
        self.tracker.log("division", self.state.step, epoch, values)
        _log.info(
            f"epoch {epoch}: {division.num_learners} learner(s) of {', '.join(map(str, division.sizes))} images, "
            f"{division.left_out} left out, {division.matched_share:.0%} kept their learner"
            f"{f'; {len(division.groups)} groups of classes' if division.groups.size else ''} ({seconds:.1f} s)"
        )

    def train_epoch(self, shares: EpochShares) -> None:
        """Collective. The remaining steps of the epoch."""
        cfg, state = self.cfg, self.state
        assert state.division is not None
        conquer = plan.conquering(cfg, state.epoch)
        schedule = self.data.schedule(state.division, state.epoch, conquer=conquer)
        rows_in_step = np.diff(schedule.starts)
        if isinstance(schedule, StreamSchedule):
            shares.counts["left_over_images"] = schedule.left_over
        first_step = state.step - state.batches_done
        guard = FiniteGuard(self.objective, self.engine, self.data, schedule, first_step, self.run_dir)
        log = StepLog(self.tracker, cfg.tracker.log_every, guard)
        # The ranks that share this rank's learner in a step of m learners; None: all of them.
        group = self.groups.get(schedule.turns.shape[1])
        batches = TimedBatches(self.data.train_batches(schedule, first_step=first_step, skip=state.batches_done, group=group))
        self.objective.train()
        if plan.subspaces_change(cfg, state):
            self.objective.change_subspaces(conquer=conquer)
        stopping: Later | None = None
        with self.progress.phase(f"epoch {state.epoch}", len(schedule), "steps", state.batches_done) as phase:
            for batch in batches:
                rates = plan.learning_rates(cfg, state, len(schedule))
                set_learning_rates(self.engine, rates)
                seed_libraries(cfg.run.seed, state.step)
                loss, stats = self.engine(batch.to(distributed.device()), plan.phase(cfg, state))
                # A failed write stops the ranks, too: the save that follows tells each of them why.
                asked = Later(distributed.count_ranks(self.stop.requested or self.writer.failed))
                self.engine.backward(loss)
                self.engine.step()
                rows = int(rows_in_step[state.batches_done])
                state.step, state.batches_done, state.samples_seen = state.step + 1, state.batches_done + 1, state.samples_seen + rows
                self.failed.update(batch.failed)
                log.step(state.step, state.epoch, stats, rates, rows, batches.waited)
                phase.update(1, log.note)
                # Read one step late: that one is done while the device is busy with this one.
                if stopping is not None and bool(stopping.read()):
                    log.flush(state.step, state.epoch)
                    raise Stopped(f"in epoch {state.epoch} after step {state.step}")
                stopping = asked
                if cfg.checkpoint.every_steps and state.step % cfg.checkpoint.every_steps == 0 and state.batches_done < len(schedule):
                    # What a resume from here does not see again; and a loss that is not finite must not reach a checkpoint.
                    log.flush(state.step, state.epoch)
                    self.save(background=True)
                shares.rows += rows
                watchdog.step(f"epoch {state.epoch}, step {state.step}")
        log.flush(state.step, state.epoch)
        shares.seconds["data"] = batches.waited

    def evaluate(self) -> dict[str, Any]:
        """Collective. Retrieval metrics on the test split, and on the validation split if there is one; logged."""
        cfg, state, trained = self.cfg, self.state, self.state.step > 0
        metrics, cards = dict[str, Any](), dict[str, Any]()
        # The untrained network stands before epoch 0, the others after their epoch.
        epochs, tag = (state.epoch + 1, tag_of(state.step)) if trained else (0, None)
        for prefix, view in (("", self.data.test), ("validation/", self.data.validation)):
            if view is None:
                continue
            with_nmi = trained and plan.nmi_due(cfg, state.epoch) and not prefix
            found = evaluate_view(
                self.objective, self.data, view, cfg, with_nmi=with_nmi, stop=self.stop, progress=self.progress, epoch=state.epoch
            )
            self.failed.update(found.failed)
            metrics |= {prefix + name: value for name, value in found.metrics.items()}
            if distributed.is_main():
                cards[prefix + CARD] = found.card(epoch=epochs, checkpoint=tag, selected_on=self.selected_on).plain()
            mapped = None if prefix else keep_map(view, found, self.run_dir, state.step)
            if mapped is not None and trained and state.epoch + 1 == cfg.schedule.epochs:
                save_neighbours(self.data, view, found, cfg.run.path)
                diagnose(self.objective, self.data, view, found, mapped, cfg.run.path, state, stop=self.stop, progress=self.progress)
            del found  # the embeddings of a view are not kept while those of the next are made
        self.tracker.log("evaluation", state.step, epochs, metrics | cards)
        if metrics:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
            _log.info(f"{f'after {state.epoch + 1} epoch(s)' if trained else 'untrained'}: {shown}")
        return metrics

    def save(self, *, best: bool = False, background: bool = False) -> Path:
        """Collective. Write a checkpoint; in the background, training goes on meanwhile.

        Raises:
            RunError: it cannot be written, or the one before, or the run directory is gone.
        """
        self.run_dir.check()
        prepare = partial(prepare_checkpoint, self.engine, self.state)
        return self.writer.save(self.state.step, prepare, best=best, background=background)

    def close(self) -> None:
        """Stop the loader's workers, the checkpoint in flight, the tracker and the log.

        Raises:
            RunError: that checkpoint cannot be written.
        """
        self.data.close()
        try:
            self.writer.close()
        finally:
            self.tracker.close()
            close_log()

    def _is_best(self) -> bool:
        """Whether the evaluation that just ran is the best so far on the selecting split; remembers it."""
        prefix, state = SELECTED_PREFIX.get(self.selected_on), self.state
        if prefix is None or f"{prefix}recall@1" not in state.metrics or not plan.evaluation_due(self.cfg, state.epoch - 1):
            return False
        if state.best is not None and standing(state.best["metrics"], prefix) >= standing(state.metrics, prefix):
            return False
        state.best = Best(epoch=state.epoch, samples_seen=state.samples_seen, metrics=state.metrics)
        return True

    def _resume(self, resume: str, begins: bool) -> TrainState:
        """Collective. The state of the checkpoint to go on from, or a new one.

        Raises:
            InputError: the checkpoint belongs to other data.
        """
        which = "latest" if resume in ("auto", "never") else Path(resume).name
        if resume not in ("auto", "never") and Path(resume).resolve().parent != self.checkpoints.folder.resolve():
            raise InputError(
                f"--resume {resume} is no checkpoint of {self.cfg.run.path}; give auto, never, or a folder in {self.checkpoints.folder}"
            )
        found = distributed.on_main(self.checkpoints.find, which)
        if found is None:
            assert begins, "the objective was built without its initial weights"
            return self.data.new_state()
        tag, messages = found
        for message in messages:
            _log.info(message)
        folder = self.checkpoints.folder / tag
        saved = read_model(folder)
        state = saved.state
        # Before the weights: other data may have another number of classes, and so other shapes.
        self.data.check_same(state)
        division, learners = state.division, self.cfg.division.num_learners
        if division is not None and (not division.fits(self.data.train.labels) or division.num_learners > learners):
            raise InputError(f"{folder} holds a division of another training set; choose another checkpoint")
        load_checkpoint(self.engine, folder, saved)
        return state
