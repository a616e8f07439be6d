"""The configuration: one frozen tree of sections, read from YAML, changed by ``--set a.b=c``, checked as a whole.

The docstring under a key is its documentation: ``dnc-dist config --keys`` prints it. Every problem of a file is reported at
once, each with the dotted path that ``--set`` takes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import shorten
from dnc_dist.base.yaml_text import parse_yaml, read_yaml

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(InputError):
    """The configuration cannot be used; the message lists every problem."""


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values cannot change, field docstrings are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Run(Section):
    """Where a run lives and what makes it repeatable."""

    dir: Path = Path("runs")
    """Folder that holds run directories."""
    name: str = Field("", pattern=r"^[\w.+-]*$")
    """Name of the run's directory; empty: the name of the configuration file."""
    seed: int = Field(0, ge=0)
    """Every random number of the run derives from it."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.dir / self.name


class Data(Section):
    """The prepared dataset and how images are read."""

    root: Path
    """Folder written by `dnc-dist data prepare`."""
    protocol: Literal["auto", "leave-one-out", "query-gallery", "vehicleid-loo", "vehicleid-random10"] = "auto"
    """Retrieval protocol; auto: vehicleid-loo for VehicleID's lists, query-gallery if the dataset has such roles, else leave-one-out."""
    image_size: int = Field(224, ge=8, le=4096)
    """Side of the square images that the network sees, pixels."""
    crop: float = Field(0.875, gt=0, le=1)
    """Share of the resized image that the evaluation's centre crop keeps."""
    augment: Literal["none", "light", "standard", "color", "geom", "geom_color"] = "standard"
    """Training augmentation; `light` (shift and scale, no flip) suits characters."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean per colour channel that is subtracted from pixels in [0, 1]."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation per colour channel that pixels are divided by."""
    validation_classes: float = Field(0.0, ge=0, lt=1)
    """Share of the training classes, chosen by a seeded hash, that is held out to select the best checkpoint."""
    workers: int = Field(2, ge=0)
    """Loader processes per rank; 0 reads in the training process."""


class Model(Section):
    """Backbone, embedding layer and subspace masks."""

    backbone: str = "resnet50"
    """`conv4` (built in, small) or the name of any timm model."""
    weights: str = "pretrained"
    """`pretrained`, `none`, or the path of a local weights file."""
    embedding_dim: int = Field(512, ge=2)
    """Width of the whole embedding."""
    masks: Literal["learned", "fixed", "sliced"] = "learned"
    """Kind of subspace mask; `sliced` is the flat method with its own normalisation per slice."""
    batch_norm: Literal["auto", "frozen", "global"] = "auto"
    """`frozen`: fixed running statistics (of pretrained weights); `global`: those of the global batch; `auto`: global without weights."""
    pooling: Literal["avg", "max", "avg+max"] = "avg"
    """Pooling of the backbone's last feature map."""
    dropout: float = Field(0.01, ge=0, lt=1)
    """Dropout on the features, before the embedding layer."""


class MarginLossConfig(Section):
    """Margin loss with distance-weighted negatives (Wu et al., ICCV 2017)."""

    name: Literal["margin"] = "margin"
    """Which loss: `margin`."""
    margin: float = Field(0.2, gt=0)
    """Half-width of the band around beta in which pairs are active."""
    beta: float = Field(1.2, gt=0)
    """Boundary between positive and negative distances (its start value if learned)."""
    learn_beta: Literal["fixed", "scalar", "class"] = "fixed"
    """Whether beta is fixed, learned as one number, or learned per class."""
    cutoff: float = Field(0.5, gt=0, lt=2)
    """Distances below it are weighted as if they were it."""
    nonzero_loss_cutoff: float = Field(1.4, gt=0, le=2)
    """Negatives farther away are not drawn."""
    mode: Literal["paper", "reference"] = "paper"
    """`paper`: log-domain weights; `reference`: also the weight floors of the published implementation."""
    effective_dim: int | None = Field(None, ge=3)
    """Dimension n in the distance weights; null: the embedding's width."""


class ProxyAnchorLossConfig(Section):
    """Proxy-Anchor loss (Kim et al., CVPR 2020), computed on the whole global batch."""

    name: Literal["proxy_anchor"]
    """Which loss: `proxy_anchor`."""
    margin: float = Field(0.1, ge=0)
    """Margin on the cosine similarity."""
    scale: float = Field(32.0, gt=0)
    """Factor on the similarities."""


LossConfig = Annotated[MarginLossConfig | ProxyAnchorLossConfig, Field(discriminator="name")]


class DivisionConfig(Section):
    """Divide and Conquer: how the training set is divided among learners, and when the embedding is trained as a whole."""

    num_learners: int = Field(4, ge=1)
    """Final number of learners K (a power of two in hierarchical mode); 1 trains without division."""
    every: int = Field(2, ge=1)
    """Epochs between two divisions."""
    conquer_from: int | None = Field(None, ge=0)
    """First epoch in which the whole embedding is trained together; null: never."""
    mode: Literal["hierarchical", "flat"] = "hierarchical"
    """`hierarchical`: 1, 2, 4 ... K learners, doubling at every division; `flat`: K from the start."""
    cluster_on: Literal["features", "embeddings"] = "features"
    """What k-means sees: the backbone's features or the embeddings, L2-normalised."""
    backbone_frozen_epochs: int = Field(1, ge=0)
    """Epochs after each division in which the backbone waits and only embedding, masks and loss learn."""
    learners_per_step: int = Field(1, ge=1)
    """Learners that share one step's batch."""
    mask_penalty: float = Field(0.01, ge=0)
    """Weight of the mean cosine between learned masks (orthogonality)."""
    conquer_batches: Literal["clustered", "whole"] = "clustered"
    """After conquer_from: batches from clusters with further divisions (published), or from the whole training set."""
    start: Literal["k-means++", "previous"] = "k-means++"
    """Where k-means starts: `previous` begins at the last division's centroids, so that learners keep more of their images."""
    kmeans_iterations: int = Field(100, ge=1)
    """Most Lloyd iterations of one k-means."""
    kmeans_backend: Literal["auto", "triton", "faiss"] = "auto"
    """What computes k-means: `triton` on the GPU, `faiss` on the CPU; `auto`: triton where there is a GPU that it serves."""
    trials: int = Field(30, ge=1)
    """k-means runs with other seeds until every cluster can be trained on."""


class Schedule(Section):
    """Length of training, batches, learning-rate schedule."""

    epochs: int = Field(180, ge=1)
    """Number of epochs."""
    epoch: Literal["dataset", "over", "under"] = "dataset"
    """Length of an epoch: as many rows as the training set has, or until the largest (`over`) or smallest (`under`) cluster is through."""
    batch_size: int = Field(80, ge=2)
    """Rows of one step over all ranks and learners."""
    samples_per_class: int = Field(4, ge=2)
    """Rows per class in a batch."""
    warmup: float = Field(0.0, ge=0)
    """Epochs of linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning-rate schedule after the warm-up."""
    final_lr_share: float = Field(0.05, ge=0, le=1)
    """Share of the learning rate that cosine decay ends at."""


class Optim(Section):
    """AdamW and its learning rates."""

    lr: float = Field(1e-5, gt=0)
    """Learning rate of backbone, embedding layer and loss parameters."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled weight decay of backbone and embedding layer."""
    mask_lr_mult: float = Field(100.0, ge=0)
    """Learning rate of the learned masks, as a multiple of lr."""
    loss_lr_mult: float = Field(1.0, ge=0)
    """Learning rate of the loss's own parameters (beta, proxies), as a multiple of lr."""
    clip_gradient: float = Field(1.0, ge=0)
    """The norm of all gradients together is at most this; 0: as large as it is. A mask that m leaves share counts m times."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's decay rates."""


class Engine(Section):
    """DeepSpeed, precision and process group."""

    zero: Literal[0, 1, 2] = 1
    """ZeRO stage: what is partitioned over ranks (0 nothing, 1 optimizer state, 2 also gradients)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast of backbone and embedding layer; auto: bf16 on CUDA, fp32 on the CPU. Distances and loss are always fp32."""
    timeout: float = Field(1800.0, gt=0)
    """Seconds that ranks wait for one that starts, compiles in a first step, divides, evaluates or writes a checkpoint, maybe alone."""
    stall_timeout: float = Field(600.0, gt=0)
    """Seconds that ranks wait in the midst of an epoch for one that finishes no step; then the run ends and names it."""


class Evaluation(Section):
    """When and how retrieval is measured."""

    every: int = Field(1, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""
    at_start: bool = False
    """Also evaluate the untrained network."""
    select_on: Literal["auto", "last", "validation", "test"] = "auto"
    """What picks the best checkpoint; auto: validation if that split exists, else last."""
    recall_at: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = (1, 2, 4, 8)
    """The k of recall@k."""
    nmi: Literal["final", "every", "never"] = "final"
    """When to compute NMI (it needs a k-means with as many clusters as classes)."""
    batch_size: int = Field(128, ge=1)
    """Images per forward pass of one rank in evaluation and extraction."""


class CheckpointConfig(Section):
    """What is kept of the state of a run."""

    every_steps: int = Field(0, ge=0)
    """Steps between checkpoints inside an epoch; 0: only at epoch ends and before divisions."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints stay, the best aside."""


class TrackerConfig(Section):
    """Where training curves go; `metrics.jsonl` is always written."""

    kind: Literal["wandb", "jsonl"] = "wandb"
    """`wandb` (offline unless an API key is there) or `jsonl` alone."""
    project: str = "dnc-dist"
    """W&B project."""
    log_every: int = Field(10, ge=1)
    """Steps between two logged training lines."""


class RunConfig(Section):
    """The whole configuration of a run."""

    run: Run = Run()
    data: Data
    model: Model = Model()
    loss: LossConfig = MarginLossConfig()
    division: DivisionConfig = DivisionConfig()
    schedule: Schedule = Schedule()
    optim: Optim = Optim()
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracker: TrackerConfig = TrackerConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        problems = list(_conflicts(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def digest(self) -> str:
        """Short hash of everything that decides the result (not where it is written or logged)."""
        relevant = self.model_dump(mode="json", exclude={"run": {"dir", "name"}, "tracker": True, "checkpoint": True})
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def _conflicts(cfg: RunConfig) -> Iterator[str]:
    """Problems that involve more than one key."""
    div, sch, model = cfg.division, cfg.schedule, cfg.model
    learners, power_of_two = div.num_learners, div.num_learners & (div.num_learners - 1) == 0
    if div.mode == "hierarchical" and not power_of_two:
        yield (
            f"division.num_learners={learners} must be a power of two when division.mode=hierarchical; "
            "use 2, 4, 8 ... or division.mode=flat"
        )
    elif div.mode == "hierarchical" and div.conquer_from is not None and learners > 1:
        first = div.every * (learners.bit_length() - 1) + 1
        if div.conquer_from < first:
            yield (
                f"division.conquer_from={div.conquer_from} comes before all {learners} learners exist (with division.every={div.every} "
                f"that is epoch {first - 1}); use {first} or more"
            )
    if model.masks == "sliced":
        if div.mode != "flat":
            yield (
                f"model.masks=sliced needs division.mode=flat (got {div.mode}): a slice cannot be split; "
                "set division.mode=flat or model.masks=fixed"
            )
        if model.embedding_dim % learners:
            yield (
                f"model.embedding_dim={model.embedding_dim} cannot be split among division.num_learners={learners} sliced learners; "
                f"use a multiple of {learners}"
            )
    elif model.masks == "fixed" and model.embedding_dim % learners:
        yield (
            f"model.embedding_dim={model.embedding_dim} cannot be halved down to division.num_learners={learners} fixed masks; "
            f"use a multiple of {learners}"
        )
    if div.learners_per_step > learners:
        yield f"division.learners_per_step={div.learners_per_step} is more than division.num_learners={learners}; use at most {learners}"
    if sch.batch_size % (div.learners_per_step * sch.samples_per_class):
        yield (
            f"schedule.batch_size={sch.batch_size} is not divisible by schedule.samples_per_class={sch.samples_per_class} times "
            f"division.learners_per_step={div.learners_per_step}; use a multiple of {div.learners_per_step * sch.samples_per_class}"
        )
    elif sch.batch_size // (div.learners_per_step * sch.samples_per_class) < 2:
        yield (
            f"schedule.batch_size={sch.batch_size} gives every learner one class per step, so there are no negatives; use at least "
            f"{2 * div.learners_per_step * sch.samples_per_class}"
        )
    if div.backbone_frozen_epochs >= div.every:
        yield (
            f"division.backbone_frozen_epochs={div.backbone_frozen_epochs} must be less than division.every={div.every}, "
            "or the backbone never learns"
        )
    if div.conquer_from is not None and div.conquer_from >= sch.epochs:
        yield (
            f"division.conquer_from={div.conquer_from} is not below schedule.epochs={sch.epochs}; "
            "use a smaller epoch, or null for no conquer phase"
        )
    if cfg.engine.stall_timeout > cfg.engine.timeout:
        yield (
            f"engine.stall_timeout={cfg.engine.stall_timeout:g} is longer than engine.timeout={cfg.engine.timeout:g}, which is for longer "
            "waits; use at most that, or raise engine.timeout"
        )
    if sch.warmup >= sch.epochs:
        yield f"schedule.warmup={sch.warmup} must be less than schedule.epochs={sch.epochs}"
    if model.backbone == "conv4" and cfg.data.image_size < 16:
        yield f"data.image_size={cfg.data.image_size} is too small for model.backbone=conv4, which halves it four times; use at least 16"
    if 1 not in cfg.evaluation.recall_at:
        yield (
            f"evaluation.recall_at={list(cfg.evaluation.recall_at)} must contain 1: recall@1 stands in RESULT "
            "and selects the best checkpoint"
        )
    if isinstance(cfg.loss, MarginLossConfig) and cfg.loss.cutoff >= cfg.loss.nonzero_loss_cutoff:
        yield f"loss.cutoff={cfg.loss.cutoff} must be below loss.nonzero_loss_cutoff={cfg.loss.nonzero_loss_cutoff}"


def sections() -> dict[str, list[type[Section]]]:
    """Section name -> the models that may stand there (several only for `loss`)."""
    return {
        name: [MarginLossConfig, ProxyAnchorLossConfig] if name == "loss" else [field.annotation]  # type: ignore[list-item]
        for name, field in RunConfig.model_fields.items()
    }


def _all_keys() -> list[str]:
    return [f"{name}.{key}" for name, models in sections().items() for model in models for key in model.model_fields] + list(sections())


def _texts() -> set[str]:
    """The dotted keys whose values are text or paths, and are taken as they are written."""
    return {
        f"{name}.{key}"
        for name, models in sections().items()
        for model in models
        for key, field in model.model_fields.items()
        if field.annotation in (str, Path)
    }


def _describe(problem: Any) -> list[str]:
    """One pydantic problem as lines for the user."""
    # The discriminator's value appears in the location of a union; it is not part of the key's path.
    parts = [str(part) for part in problem["loc"]]
    variant = parts.pop(1) if len(parts) > 1 and parts[0] == "loss" and parts[1] in ("margin", "proxy_anchor") else ""
    path = ".".join(parts)
    if problem["type"] == "extra_forbidden" and path in _all_keys():
        owner = next(model.model_fields["name"] for model in sections()[parts[0]] if parts[-1] in model.model_fields)
        return [f"{path}: belongs to {parts[0]}.name={get_args(owner.annotation)[0]}, not to {parts[0]}.name={variant}; leave it out"]
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path, _all_keys(), n=1, cutoff=0.6) or difflib.get_close_matches(
            parts[-1], [key for section in sections().values() for model in section for key in model.model_fields], n=1, cutoff=0.75
        )
        if close and "." not in close[0]:
            close = [next((key for key in _all_keys() if key.endswith("." + close[0])), close[0])]
        hint = f"did you mean '{close[0]}'?" if close else "`dnc-dist config --keys` lists all keys"
        return [f"{shorten(path, 200)[1:-1]}: unknown key; {hint}"]
    if problem["type"] == "missing":
        key = "data.root" if path == "data" else path
        return [f"{key}: missing; set it in the file or with --set {key}=VALUE"]
    if problem["type"] == "value_error" and not parts:
        return str(problem["ctx"]["error"]).split("\n")
    return [f"{path}: {problem['msg']} (got {shorten(problem['input'])})"]


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=c`` -> (["a", "b"], value); the value is read as YAML.

    Raises:
        ConfigError: the text is no ``key=value``.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text}: expected key=value, for example --set optim.lr=0.001")
    keys = key.strip().split(".")
    try:
        return keys, parse_yaml(value, _texts(), tuple(keys))
    except InputError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML ({error})") from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``key=value`` overrides, validate.

    Raises:
        ConfigError: the file cannot be read, or values are wrong; all problems are listed.
    """
    path = Path(path)
    try:
        tree = read_yaml(path, _texts())
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ConfigError(f"{path}: no such configuration file; see configs/ for examples") from None
        raise ConfigError(str(error)) from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `data:` and `model:`, got {type(tree).__name__}")
    for text in overrides:
        keys, value = parse_override(text)
        node: Any = tree
        for key in keys[:-1]:
            child = node.get(key)
            if child is None:
                child = node[key] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"--set {text}: '{key}' is a value, not a section")
            node = child
        node[keys[-1]] = value
    # `model:` without anything below it is an empty section.
    tree = {name: {} if section is None else section for name, section in tree.items()}
    if isinstance(tree.get("loss"), dict):
        tree["loss"].setdefault("name", "margin")
    if isinstance(tree.get("run"), dict) or "run" not in tree:
        run = tree.setdefault("run", {})
        # Not every name of a file is one of a run.
        run["name"] = run.get("name") or re.sub(r"[^\w.+-]+", "-", path.stem)
    return parse_tree(tree, str(path))


def parse_tree(tree: dict[str, Any], source: str) -> RunConfig:
    """Validate a tree of plain values.

    Raises:
        ConfigError: lists every problem, with the source's name.
    """
    problems = _misplaced_bools(tree)
    try:
        cfg = RunConfig.model_validate(tree)
    except ValidationError as error:
        found = [line for problem in error.errors() for line in _describe(problem)]
        problems = {line.split(": ")[0]: line for line in found} | problems if problems else dict(enumerate(found))
    if problems:
        raise ConfigError(f"{source}: {len(problems)} problem(s)\n" + "\n".join(f"  {line}" for line in problems.values()))
    return cfg


def _misplaced_bools(tree: dict[str, Any]) -> dict[Any, str]:
    """Dotted key -> what is wrong with it: `true` is no 1, and 1 or `yes` is no `true`."""
    problems = {}
    for name, models in sections().items():
        section: Any = tree.get(name)
        for model in models if isinstance(section, dict) else []:
            for key, field in model.model_fields.items():
                value, is_bool = section.get(key), field.annotation is bool
                items = value if isinstance(value, list | tuple) else [value]
                if key in section and any(isinstance(item, bool) != is_bool for item in items):
                    problems[f"{name}.{key}"] = f"{name}.{key}: must {'' if is_bool else 'not '}be true or false (got {shorten(value)})"
    return problems


def dump_config(cfg: RunConfig) -> str:
    """The resolved tree as YAML that ``load_config`` reads back to an equal configuration."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)


def describe_keys() -> str:
    """The reference of all keys: default and meaning, section by section."""
    lines = []
    for name, models in sections().items():
        for model in models:
            lines.append(f"\n{name}: {(model.__doc__ or '').strip()}")
            for key, field in model.model_fields.items():
                default = "required" if field.is_required() else json.dumps(field.default, default=str)
                allowed = str(field.annotation).replace("typing.", "") if "Literal" in str(field.annotation) else ""
                allowed = f" {allowed.removeprefix('Literal')}" if allowed.startswith("Literal") else ""
                lines.append(f"  {name}.{key} = {default}{allowed}\n      {field.description}")
    return "\n".join(lines).strip()
