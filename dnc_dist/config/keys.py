"""Every section of the configuration: its keys with defaults and ranges.

The docstring under a key is its documentation: ``dnc-dist config --keys`` prints it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator

from dnc_dist.base.choice import Choice
from dnc_dist.base.parts import Named, Options
from dnc_dist.base.web import folder_url, is_url

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(Options):
    """Base of all sections."""

    # Only the reference of all keys shows them, and reads them then (``part_text.docstrings``): a start of a run needs none.
    model_config = ConfigDict(use_attribute_docstrings=False)


def _path_or_url(value: Any) -> Any:
    return folder_url(value) if is_url(value) else Path(value) if isinstance(value, str) else value


Root = Annotated[Path | str, BeforeValidator(_path_or_url)]
"""A folder, or the address of one."""


class Run(Section):
    """Where a run lives and what makes it repeatable."""

    dir: Path = Path("runs")
    """Folder that holds run directories."""
    name: str = Field("", pattern=r"^(\.*[\w+-][\w.+-]*)?$")
    """Name of the run's directory; empty: the name of the configuration file."""
    seed: int = Field(0, ge=0)
    """Every random number of the run derives from it."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.dir / self.name


class Data(Section):
    """The prepared dataset and how images are read."""

    root: Root
    """Folder written by `dnc-dist data prepare`, or its address on a web server (https://HOST/FOLDER)."""
    protocol: Annotated[Named, Choice("protocol", "auto")] = Field("auto", validate_default=True)
    """Retrieval protocol: who asks, and who is searched."""
    image_size: int = Field(224, ge=8, le=4096)
    """Side of the square images that the network sees, pixels."""
    crop: float = Field(0.875, gt=0, le=1)
    """Share of the resized image that the evaluation's centre crop keeps."""
    augment: Annotated[Named, Choice("augmentation", "standard")] = Field("standard", validate_default=True)
    """Training augmentation."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean per colour channel that is subtracted from pixels in [0, 1]."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation per colour channel that pixels are divided by."""
    validation_classes: float = Field(0.0, ge=0, lt=1)
    """Share of the training classes, chosen by a seeded hash, that is held out to select the best checkpoint."""
    workers: int | Literal["auto"] = "auto"
    """Loader processes per rank; 0 reads in the training process; `auto`: the cores of a rank less one, 16 at most, without GPUs 1."""
    access: Literal["auto", "indexed", "stream"] = "auto"
    """How training reads: `indexed` any row at any time; `stream` shards from front to back, every image at most once an epoch, for data
    sets that are very large or far away; `auto`: stream from a web server, else indexed."""
    lanes: int = Field(64, ge=1)
    """With access `stream`: parts of the data set that all ranks together read side by side, at least one per rank and worker."""
    pool_mb: float = Field(512.0, gt=0)
    """With access `stream`: megabytes of images that wait, undecoded, to be mixed into batches, on all ranks together."""
    cache: Path | None = None
    """Folder on this machine that keeps what is read from a web server, for all its processes and the next runs; null: nothing is kept."""
    cache_gb: float = Field(50.0, gt=0)
    """Gigabytes that the folder may hold; once it is full, the rest is read from the server in every epoch."""
    retry_seconds: float = Field(120.0, gt=0)
    """How long a web server may give nothing before the run ends."""

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_word(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or value < 0):
            raise ValueError("must be a number from 0 on, or auto")
        return value

    @property
    def streams(self) -> bool:
        """Whether training reads shards from front to back."""
        return self.access == "stream" or (self.access == "auto" and is_url(self.root))


class Model(Section):
    """Backbone, embedding layer and subspace masks."""

    backbone: Annotated[Named, Choice("backbone", "resnet50")] = Field("resnet50", validate_default=True)
    """`conv4` (built in, small) or the name of any timm model."""
    weights: str = "pretrained"
    """`pretrained`, `none`, or the path of a local weights file."""
    embedding_dim: int = Field(512, ge=2)
    """Width of the whole embedding."""
    masks: Annotated[Named, Choice("mask", "learned")] = Field("learned", validate_default=True)
    """Kind of subspace mask."""
    batch_norm: Literal["auto", "frozen", "global"] = "auto"
    """`frozen`: fixed running statistics (of pretrained weights); `global`: those of the global batch; `auto`: global without weights."""
    pooling: Literal["avg", "max", "avg+max"] = "avg"
    """Pooling of the backbone's last feature map."""
    dropout: float = Field(0.01, ge=0, lt=1)
    """Dropout on the features, before the embedding layer."""


class DivisionConfig(Section):
    """Divide and Conquer: how the training set is divided among learners, and when the embedding is trained as a whole."""

    num_learners: int = Field(4, ge=1)
    """Final number of learners K (a power of two in hierarchical mode); 1 trains without division."""
    every: int = Field(2, ge=1)
    """Epochs between two divisions."""
    conquer_from: int | Literal["auto"] | None = "auto"
    """First epoch in which the whole embedding is trained together; null: never; `auto`: after 4/9 of all epochs, as published (80 of
    180), but not before all learners were trained for one period; never with one learner, or in fewer epochs than learners need."""
    mode: Literal["hierarchical", "flat"] = "hierarchical"
    """`hierarchical`: 1, 2, 4 ... K learners, doubling at every division; `flat`: K from the start."""
    cluster_on: Literal["features", "embeddings"] = "features"
    """What k-means sees: the backbone's features or the embeddings, L2-normalised."""
    backbone_frozen_epochs: int = Field(1, ge=0)
    """Epochs after each division in which the backbone waits and only embedding, masks and loss learn; with one learner, at the start."""
    learners_per_step: int = Field(1, ge=1)
    """Learners that share one step's batch."""
    mask_penalty: float = Field(0.01, ge=0)
    """Weight of the mean cosine between learned masks (orthogonality)."""
    conquer_batches: Literal["clustered", "whole"] = "clustered"
    """After conquer_from: batches from clusters with further divisions (published), or from the whole training set."""
    distill: float = Field(0.0, ge=0)
    """After conquer_from: weight of a loss that gives the whole embedding, as soft targets, the similarities of a batch in the subspace of
    its learner (self-distillation); begin with 1 or less; 0: none (published). It needs batches from clusters (docs/subspaces.md)."""
    distill_temperature: float = Field(1.0, gt=0)
    """Temperature of these similarities: the smaller, the more the nearest images of a batch count, and the less the far ones."""
    distill_teacher: Literal["present", "frozen"] = "present"
    """Whose similarities: the learner's as it is now, which moves with the network; or as it was when conquering began (`frozen`): a copy
    of the network, also in checkpoints, and one forward pass more in each of these steps."""
    batches: Literal["learner", "groups", "neighbours"] = "learner"
    """Which classes share a batch, whichever learner trains on it: `learner`: classes of the learner at random (published); `groups`: those
    of one group of close classes (balanced k-means of class means); `neighbours`: a class with its nearest ones. With the last two learners
    take whole classes and no image is left out; one learner has groups, too (docs/batches.md)."""
    group_classes: int | Literal["auto"] = "auto"
    """Classes of a group, at least 2; `auto`: as many as a batch has. Fewer: a batch mixes several random groups. More: it has a random
    part of one, which is less hard."""
    skip_nearest: int = Field(0, ge=0)
    """Nearest classes that a class does not meet in its group (with `groups`: hardly ever), since they may be the same thing under another
    name."""
    images_per_class: int | None = Field(None, ge=1)
    """Images of each class that the pass before a division looks at, others each time; their mean stands for the class. null: all. The
    fewer, the cheaper the pass; for `groups` and `neighbours`, which see classes by their means. With `learner` it sees all."""
    hard_share: float = Field(1.0, ge=0, le=1)
    """Share of the batches that are made as `batches` says, evenly spread; the others are of random classes of the whole training set."""
    hard_from: int = Field(0, ge=0)
    """First epoch with such batches; before it all are of the whole training set."""
    start: Literal["k-means++", "previous"] = "k-means++"
    """Where k-means starts: `previous` begins at the last division's centroids, so that learners keep more of their images."""
    kmeans_iterations: int = Field(100, ge=1)
    """Most Lloyd iterations of one k-means."""
    kmeans_tolerance: float = Field(1e-4, ge=0, lt=1)
    """A k-means ends when an iteration lowers its objective by no more than this share; 0: only when nothing is gained."""
    kmeans_backend: Literal["auto", "triton", "faiss", "numpy"] = "auto"
    """What computes k-means: `triton` on the GPU; on the CPU `faiss` or `numpy`, which give the same result bit for bit; `auto`: triton
    where there is a GPU that it serves, else numpy, whose products were faster where both were measured (docs/scale.md)."""
    trials: int = Field(30, ge=1)
    """How often k-means is run at most: again with another seed while a cluster is too small to train on."""

    @field_validator("conquer_from", mode="before")
    @classmethod
    def _epoch_or_word(cls, value: Any) -> Any:
        if value not in ("auto", None) and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError("must be an epoch from 0 on, auto, or null for never")
        return value

    @field_validator("group_classes", mode="before")
    @classmethod
    def _two_or_word(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
            raise ValueError("must be a number from 2 on, or auto")
        return value

    @property
    def divided_until(self) -> int:
        """The first epoch in which all learners exist."""
        return self.every * (self.num_learners.bit_length() - 1) if self.mode == "hierarchical" else 0

    @property
    def conquer_epoch(self) -> int | None:
        """``conquer_from`` of a resolved configuration."""
        assert self.conquer_from != "auto"
        return self.conquer_from


class Schedule(Section):
    """Length of training, batches, learning-rate schedule."""

    epochs: int = Field(180, ge=1)
    """Number of epochs. 180, a batch of 80 and a learning rate of 1e-5 belong together: they are what the authors of the method publish
    for a pretrained ResNet-50 (for SOP; there is no other command). Larger batches bear a larger rate and need fewer epochs: 55 with
    4,000 rows and 2e-4 (recall@k surrogate). `dnc-dist init` proposes values for the data at hand."""
    epoch_length: Literal["dataset", "over"] = "dataset"
    """Length of an epoch: as many rows as the training set has, or (`over`) until the largest cluster is through."""
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
    """Learning rate of backbone, embedding layer and loss parameters. 1e-5 is published for pretrained weights and a batch of 80: what they
    know is lost at a rate that suits a new network. Networks without weights want about 1e-3."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled weight decay of backbone and embedding layer."""
    mask_lr_mult: float = Field(100.0, ge=0)
    """Learning rate of the learned masks, as a multiple of lr."""
    loss_lr_mult: float = Field(1.0, ge=0)
    """Learning rate of the loss's own parameters (beta, proxies), as a multiple of lr."""
    clip_gradient: float = Field(1.0, ge=0)
    """The norm of all gradients together is at most this; 0: as large as it is."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's decay rates."""


class Engine(Section):
    """DeepSpeed, precision and process group."""

    zero: Literal[0, 1, 2] = 1
    """ZeRO stage: what is partitioned over ranks (0 nothing, 1 optimizer state, 2 also gradients); one process partitions nothing."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast of the backbone; auto: bf16 on CUDA, fp32 on the CPU. Embedding layer, distances and loss are always fp32."""
    grad_cache_chunks: int = Field(1, ge=1)
    """Parts in which a rank's rows go through the backbone: memory of one part, the same gradient, one forward pass more; 1: at once."""
    compile: bool = False
    """Training steps run the backbone through torch.compile. The first step of each kind takes a minute or more. What it gains has not been
    measured."""
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
    test: bool = True
    """Whether a training measures the test split; false: only the validation classes, so that nothing can be chosen by test images."""
    select_on: Literal["auto", "last", "validation", "test"] = "auto"
    """What picks the best checkpoint, by recall@1 and then map@r; auto: validation if that split exists, else last."""
    recall_at: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = (1, 2, 4, 8)
    """The k of recall@k."""
    nmi: Literal["final", "every", "never"] = "final"
    """When to compute NMI (it needs a k-means with as many clusters as classes)."""
    batch_size: int = Field(128, ge=1)
    """Images per forward pass of one rank in evaluation and extraction."""


class CheckpointConfig(Section):
    """What is kept of the state of a run."""

    every_steps: int = Field(0, ge=0)
    """Steps between checkpoints inside an epoch; 0: only at epoch ends and before divisions. They are written while training goes on, from
    a copy of the state in the memory of the host. One at a time: if the one before is not finished when the next is due, training waits."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints stay, the best aside."""


class TrackerConfig(Section):
    """Where training curves go; `metrics.jsonl` is always written."""

    kind: Annotated[Named, Choice("tracker", "wandb")] = Field("wandb", validate_default=True)
    """Where they go beside that file."""
    project: str = "dnc-dist"
    """W&B project."""
    log_every: int = Field(10, ge=1)
    """Steps between two logged training lines."""
