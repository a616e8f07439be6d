"""A training whose numbers are no longer finite: it stops, and the batch with which that began is kept for inspection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnc_dist.base.errors import RunError
from dnc_dist.data.batching import EpochSchedule
from dnc_dist.data.stream import Batch
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.zero import gradient_is_finite
from dnc_dist.processes import distributed
from dnc_dist.rundir import NOT_FINITE
from dnc_dist.rundir.folder import RunDirectory


class FiniteGuard:
    """Looks at the stats of an epoch's steps, at the gradients that moved the parameters, and at the parameters after them.

    Args:
        objective: what is trained.
        engine: what updates it.
        data: where the batches came from.
        schedule: of the epoch.
        first_step: steps of the run before this epoch.
        run_dir: the run directory.
    """

    def __init__(
        self,
        objective: nn.Module,
        engine: Any,
        data: RunData,
        schedule: EpochSchedule,
        first_step: int,
        run_dir: RunDirectory,
    ) -> None:
        self.objective, self.engine, self.data, self.schedule = objective, engine, data, schedule
        self.first_step, self.run_dir = first_step, run_dir
        self._gradients: list[Tensor] = []

    def step(self) -> None:
        """Remember whether the gradient of the step that was just done was finite, without waiting for the device."""
        self._gradients.append(gradient_is_finite(self.engine))

    def check(self, stats: Sequence[Mapping[str, Tensor]], step: int, epoch: int) -> None:
        """Collective. Look at the newest steps, the last of which is ``step``. Waits for the device.

        Args:
            stats: of the steps since the last look.

        Raises:
            RunError: a loss, an embedding, a gradient, a parameter or a running statistic is not finite, or the run directory is gone.
        """
        self.run_dir.check()
        gradients = torch.stack(self._gradients).tolist()
        self._gradients = []
        losses = torch.stack([values["loss"].double() for values in stats]).tolist()
        rows = torch.stack([values.get("non_finite_rows", torch.zeros_like(values["loss"])).double() for values in stats]).tolist()
        for back, (loss, bad_rows, finite_gradient) in enumerate(zip(losses, rows, gradients, strict=True), start=1 - len(stats)):
            if not np.isfinite(loss) or bad_rows:
                found = f"the loss is {loss:.4g}" + (f" and {bad_rows:.0f} embedding(s) are not finite" if bad_rows else "")
                self._stop(step + back, epoch, found)
            if not finite_gradient:
                self._stop(step + back, epoch, f"its loss is {loss:.4g}, but the gradient of it is not finite")
        if not _all_finite(self.objective):
            self._stop(step, epoch, f"its loss is {losses[-1]:.4g}, but the parameters after it are not finite")

    def _stop(self, step: int, epoch: int, found: str) -> None:
        number = step - 1 - self.first_step
        batch = next(self.data.train_batches(self.schedule, first_step=self.first_step, skip=number))
        folder, name = self.run_dir.path / NOT_FINITE, f"step-{step:08d}-rank-"
        kept = f"its batch is kept in {folder / name}*.npz"
        try:
            save_batch(folder / f"{name}{distributed.rank()}.npz", batch, self.data, step, epoch)
        except OSError as error:
            kept = f"its batch could not be kept in {folder} ({error.strerror})"
        # The first rank that ends takes the others with it.
        distributed.barrier()
        raise RunError(
            f"step {step} (epoch {epoch}) is not finite: {found}; {kept}; lower optim.lr or set engine.precision=fp32, then "
            "`--resume auto` goes on from the last checkpoint, which is finite"
        )


def _all_finite(module: nn.Module) -> bool:
    """Whether all parameters and running statistics are finite."""
    tensors = [tensor.detach() for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    # Their largest value; one that is not finite comes through.
    return bool(nn.utils.get_total_norm(tensors, float("inf")).isfinite())


def save_batch(path: Path, batch: Batch, data: RunData, step: int, epoch: int) -> None:
    """Write this rank's part of a step for ``np.load``: the batch's fields as they came from the loader, keys, step, epoch.

    ``keys`` names the images as the dataset does; the dummy of a rank without rows has none.
    """
    fields = {name: getattr(batch, name).numpy() for name in ("images", "labels", "learner", "rows", "slots", "valid")}
    keys = [data.index.key(int(row)) if row >= 0 else "" for row in batch.rows]
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **fields, keys=np.array(keys, dtype=np.str_), step=step, epoch=epoch)
