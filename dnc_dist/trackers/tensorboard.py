"""TensorBoard: the run's curves and pictures in files that its local page shows; no server, no account."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from dnc_dist.base.errors import InputError
from dnc_dist.base.settings import dotted
from dnc_dist.rundir.record import read_run
from dnc_dist.trackers.background import BackgroundTracker, Line, is_number, is_retrieval, values_of
from dnc_dist.trackers.panels import Histogram, Panel, Picture, Scatter, Table

FOLDER = "tensorboard"
FLUSH_SECONDS = 10


class TensorBoardTracker(BackgroundTracker):
    """`metrics.jsonl` and TensorBoard's files in `tensorboard/` of the run directory; needs `pip install dnc-dist[tensorboard]`.

    At a resume the files are written anew, from ``metrics.jsonl``: so nothing is there twice, and nothing is missing.
    """

    title = "TensorBoard"

    @classmethod
    def check(cls) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "tracker.kind=tensorboard needs the package tensorboard, which is not installed: pip install 'dnc-dist[tensorboard]', "
                "or set tracker.kind to jsonl or wandb"
            )

    def begin(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.run.folder / FOLDER
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(folder, flush_secs=FLUSH_SECONDS)

    def show_line(self, line: Line) -> None:
        for name, value in values_of(line):
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, line["step"])
        if line["kind"] == "division" and isinstance(line.get("sizes"), list):
            self._writer.add_histogram("division/cluster_sizes", np.asarray(line["sizes"], float), line["step"])

    def show_panel(self, panel: Panel) -> None:
        from dnc_dist.trackers.drawing import scatter_image, table_image

        step = self.step
        match panel:
            case Picture(name, image, caption):
                self._writer.add_image(name, image, step, dataformats="HWC")
            case Table(name, columns, rows, caption):
                self._writer.add_image(name, table_image(columns, rows), step, dataformats="HWC")
            case Histogram(name, counts, edges, caption):
                self._add_counts(name, counts, edges, step)
            case Scatter(name, points, _, right, caption):
                self._writer.add_image(name, scatter_image(points, right), step, dataformats="HWC")
        self._writer.add_text(name, caption, step)

    def _add_counts(self, name: str, counts: np.ndarray, edges: np.ndarray, step: int) -> None:
        middle = (edges[:-1] + edges[1:]).astype(float) / 2
        total, square = float((counts * middle).sum()), float((counts * middle**2).sum())
        self._writer.add_histogram_raw(
            name,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=total,
            sum_squares=square,
            bucket_limits=edges[1:].astype(float).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def show_end(self) -> None:
        settings = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in dotted(self.run.config)}
        record = read_run(self.run.folder, with_gallery=False)
        metrics: dict[str, Any] = {f"best/{name}": one.value for name, one in self.best.items()}
        metrics |= {f"result/{name}": value for name, value in record.result().items() if is_retrieval(name) and is_number(value)}
        # Into the run's own folder: a folder of its own would look like another run.
        self._writer.add_hparams(settings, metrics, run_name=".", global_step=record.last_step)

    def end(self) -> None:
        self._writer.close()
