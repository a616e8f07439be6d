"""From the configuration to the objective, its parameter groups and the DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import dnc_kernels
from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.base.rng import seed_for
from dnc_dist.clustering.device import Backend, choose_backend
from dnc_dist.config import RunConfig
from dnc_dist.engine.compiled import CompiledBackbone
from dnc_dist.engine.grad_cache import check_chunks
from dnc_dist.engine.network import build_network, on_device
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.optimizer import WaitingAdamW
from dnc_dist.engine.zero import start_engine
from dnc_dist.processes import distributed


def objective_of_run(cfg: RunConfig, num_classes: int, *, begins: bool) -> DncObjective:
    """What a run begins with, or what its checkpoint is loaded into.

    Raises:
        InputError: its weights cannot be had, or running statistics are to be frozen that nobody measured.
    """
    model = cfg.model
    if begins and model.batch_norm == "frozen" and model.weights == "none":
        raise InputError(
            "model.batch_norm=frozen fixes the running statistics of model.weights, but with model.weights=none there are none, which "
            "costs much accuracy; set model.batch_norm to auto or global"
        )
    return build_objective(cfg, num_classes, initial_weights=begins)


def build_objective(cfg: RunConfig, num_classes: int, *, initial_weights: bool = True) -> DncObjective:
    """The untrained objective on this rank's device; the same parameters on every rank.

    Args:
        cfg: the configuration.
        num_classes: of the training set.
        initial_weights: False where those of a checkpoint follow: then ``model.weights`` is not needed any more.

    Raises:
        InputError: a value of the configuration does not fit the network, or what it asks to compile cannot be compiled here.
    """
    torch.manual_seed(seed_for(cfg.run.seed, "model"))
    network = build_network(cfg, initial_weights=initial_weights)
    check_chunks(network.backbone, cfg.engine.grad_cache_chunks, cfg.model.batch_norm)
    objective = DncObjective(
        network.backbone,
        network.head,
        network.masks,
        parts.build("loss", cfg.loss, num_classes=num_classes, embedding_dim=cfg.model.embedding_dim),
        network.augment,
        seed=seed_for(cfg.run.seed, "step"),
        mask_penalty=cfg.division.mask_penalty,
        distill=cfg.division.distill,
        distill_temperature=cfg.division.distill_temperature,
        frozen_teacher=cfg.division.distill_teacher == "frozen",
        autocast=network.autocast,
        grad_cache_chunks=cfg.engine.grad_cache_chunks,
        compiled=CompiledBackbone(network.backbone, distributed.device()) if cfg.engine.compile else None,
    )
    # DeepSpeed lays the weights of several processes out anew.
    return on_device(objective, distributed.device()) if distributed.world_size() == 1 else objective.to(distributed.device())


def kernels_note(kmeans_backend: Backend) -> str:
    """What computes mining, loss and k-means on this rank's device, for the start of a run.

    Raises:
        InputError: DNC_KERNELS or division.kmeans_backend names something that does not exist or cannot run here, or Triton
            cannot compile a kernel: without a C compiler the first step would fail.
    """
    device = distributed.device()
    try:
        note = dnc_kernels.implementation_note(device)
        dnc_kernels.check_implementation(device)
    except RuntimeError as error:
        raise InputError(str(error)) from None
    return f"{note}; k-means by {choose_backend(kmeans_backend, device)}"


def parameter_groups(objective: DncObjective, weight_decay: float) -> list[dict[str, Any]]:
    """Four named groups, made once: ZeRO cannot add or remove one later, only their learning rates change.

    Masks and loss parameters take no weight decay: it would pull a mask towards "off" and a boundary towards 0.
    """
    members: dict[str, tuple[nn.Module, float]] = {
        "backbone": (objective.backbone, weight_decay),
        "embedding": (objective.head, weight_decay),
        "masks": (objective.masks, 0.0),
        "loss": (objective.loss, 0.0),
    }
    groups = []
    for name, (module, decay) in members.items():
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if parameters:
            groups.append({"name": name, "params": parameters, "weight_decay": decay})
    return groups


def build_optimizer(objective: DncObjective, cfg: RunConfig) -> WaitingAdamW:
    """Of the objective's groups of parameters, which already lie on this rank's device."""
    return WaitingAdamW(
        parameter_groups(objective, cfg.optim.weight_decay),
        lr=cfg.optim.lr,
        betas=cfg.optim.betas,
        weight_decay=cfg.optim.weight_decay,
        # One kernel for a group instead of a dozen. On the CPU there are no launches to save, and its results are recorded.
        fused=True if distributed.device().type == "cuda" else None,
    )


def build_engine(objective: DncObjective, cfg: RunConfig) -> Any:
    """Collective. The DeepSpeed engine around the objective."""
    return start_engine(objective, build_optimizer(objective, cfg), cfg)


def set_learning_rates(engine: Any, rates: dict[str, float]) -> None:
    """Set each named group's learning rate for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[group["name"]]


def seed_libraries(seed: int, step: int) -> None:
    """Seed what layers of other libraries draw from: by step and rank, so that a resumed run draws the same numbers."""
    torch.manual_seed(seed_for(seed, "library", step, distributed.rank()))


def libraries_note(objective: DncObjective) -> str | None:
    """What a backbone's own dropout and drop-path mean for a run; None without any. All else is drawn by a row's slot in the batch."""
    random = {
        type(layer).__name__
        for layer in objective.backbone.modules()
        if (isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0) or getattr(layer, "drop_prob", 0.0) > 0.0
    }
    if not random:
        return None
    return (
        f"the backbone has {' and '.join(sorted(random))} of its own, which draws numbers by process: a resume with as many processes "
        "goes on exactly, but another number of processes gives another curve"
    )
