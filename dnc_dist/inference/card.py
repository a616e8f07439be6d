"""The card of an exported model, from the figures of its run."""

from __future__ import annotations

from pathlib import Path

from dnc_dist import __version__
from dnc_dist.base import parts
from dnc_dist.base.foreign import printable
from dnc_dist.config import RunConfig
from dnc_dist.data.manifest import MANIFEST, read_manifest
from dnc_dist.embedder import Embedder
from dnc_dist.engine import plan
from dnc_dist.engine.state import Metrics, TrainState

_TEXTS = ("protocol", "list")


def card(model: Embedder, onnx_difference: float | None) -> str:
    """README.md of an export, in Markdown."""
    cfg, origin = model.cfg, model.origin
    sections = [
        f"---\nlibrary_name: dnc-dist\npipeline_tag: image-feature-extraction\ntags: [image-retrieval, metric-learning]\n---\n\n"
        f"# {printable(origin.run)}\n\n"
        f"Embeds images for retrieval: (N, {model.dim}) float32, rows of norm 1, to be compared by inner product. Trained by Divide and "
        f"Conquer with dnc-dist {__version__}; checkpoint `{origin.checkpoint}`, after {origin.epoch} epoch(s).",
        _use(model, onnx_difference),
        "## Results\n\n" + _results(cfg, model.state),
        "## Training\n\n" + _training(cfg, model),
    ]
    return "\n\n".join(sections) + "\n"


def _use(model: Embedder, onnx_difference: float | None) -> str:
    data = model.cfg.data
    text = f"""## Use

```python
import dnc_dist

model = dnc_dist.load("FOLDER")  # this folder
z = model.embed(["a.jpg", "b.jpg"])  # (2, {model.dim}) float32
```

Of each image the centred square whose side is {data.crop:g} of the shorter side is resized to {data.image_size} x {data.image_size} \
(bilinear, antialiased); RGB values in [0, 1] less the mean {list(data.mean)} are divided by {list(data.std)}. `load` \
does all of it."""
    if onnx_difference is not None:
        text += f"""

`model.onnx` takes `pixels` (B, 3, {data.image_size}, {data.image_size}) float32, prepared as above, any B, and gives `embedding` \
(B, {model.dim}). Its largest difference from torch in a coordinate, measured at the export: {onnx_difference:.1e}."""
    return text


def _results(cfg: RunConfig, state: TrainState | None) -> str:
    """A table of what was measured of this very checkpoint."""
    if state is None:
        return "Exported from an export; its card has the figures."
    measured = state.metrics if state.batches_done == 0 and plan.evaluation_due(cfg, state.epoch - 1) else {}
    if not measured:
        return "This checkpoint was not measured in training; `dnc-dist evaluate RUN` does it."
    untrained = state.baseline
    lines = ["| metric | value | untrained |", "| --- | --- | --- |"] if untrained else ["| metric | value |", "| --- | --- |"]
    for name, value in measured.items():
        if name not in _TEXTS:
            lines.append(f"| {name} | {_text(value)} |" + (f" {_text(untrained.get(name))} |" if untrained else ""))
    chosen = cfg.evaluation.select_on
    chosen = ("validation" if state.best is not None else "last") if chosen == "auto" else chosen
    told = f"Measured on the test split with the protocol `{measured.get('protocol')}`"
    told += f", list `{measured['list']}`" if "list" in measured else ""
    return "\n".join([f"{told}. The checkpoint was selected on: {chosen}.", "", *lines])


def _text(value: Metrics | float | int | str | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _training(cfg: RunConfig, model: Embedder) -> str:
    rows = {
        "backbone": f"{parts.name_of_chosen(cfg.model.backbone)}, weights at the start: {cfg.model.weights}",
        "embedding": f"{model.dim} dimensions, masks {parts.name_of_chosen(cfg.model.masks)}, {model.num_learners} learner(s)",
        "loss": parts.name_of_chosen(cfg.loss),
        "batch": f"{cfg.schedule.batch_size} images, {cfg.schedule.samples_per_class} of a class",
        "data": _data(cfg, model.state),
    }
    if model.state is not None:
        rows["images seen"] = f"{model.state.samples_seen:,} in {model.state.step:,} steps"
    lines = ["| | |", "| --- | --- |", *(f"| {name} | {printable(value)} |" for name, value in rows.items())]
    return "\n".join([*lines, "", "`config.yaml` has every setting."])


def _data(cfg: RunConfig, state: TrainState | None) -> str:
    """What is known of the data set: its counts, if it is still where it was."""
    root = Path(cfg.data.root)
    name = root.name
    if state is None or not (root / MANIFEST).is_file():
        return name + (f", content {state.data_hash}" if state is not None else "")
    manifest = read_manifest(root)
    if manifest.content_hash != state.data_hash:
        return f"{name}, content {state.data_hash}"
    counts = [f"{split}: {count.rows:,} images of {count.classes:,} classes" for split, count in manifest.splits.items()]
    return f"{name} ({manifest.reader}; {'; '.join(counts)}), content {state.data_hash}"
