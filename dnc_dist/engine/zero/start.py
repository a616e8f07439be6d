"""How the engine is made, and what is read of it after a step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dnc_dist.config import RunConfig
from dnc_dist.engine.optimizer import WaitingAdamW
from dnc_dist.engine.zero.plain import PlainEngine
from dnc_dist.processes import distributed


def start_engine(module: nn.Module, optimizer: WaitingAdamW, cfg: RunConfig) -> Any:
    """Collective. The engine around a module and its optimizer: DeepSpeed's, or for one process a plain one."""
    quiet_third_parties()
    if distributed.world_size() == 1:
        return PlainEngine(module, optimizer, clip_gradient=cfg.optim.clip_gradient, zero=cfg.engine.zero)
    return start_deepspeed(module, optimizer, cfg)


def start_deepspeed(module: nn.Module, optimizer: WaitingAdamW, cfg: RunConfig) -> Any:
    """Collective. The DeepSpeed engine around a module and its optimizer, for any number of processes."""
    # Here, because it takes seconds, and one process does without it.
    import deepspeed

    from dnc_dist.engine.zero.files import PlainFiles

    quiet_third_parties()  # once more: the import has set the level of its log
    _avoid_cpu_extension()
    with _without_compiler():
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=_config(cfg, distributed.world_size()), dist_init_required=False
        )
    engine.checkpoint_engine = PlainFiles()
    return engine


def gradient_is_finite(engine: Any) -> Tensor:
    """0-d bool, equal on all ranks, without a further wait for a device: whether all gradients of the last step were finite.

    One process knows the norm of its gradients. ZeRO 1 and 2 look at the norm that they clip by, for which they wait; they skip such a
    step in silence, but remember it. Stage 0 lets them into the second moments, which nothing makes finite again.
    """
    if isinstance(engine, PlainEngine):
        return engine.gradient_norm.isfinite()
    if engine.zero_optimization_stage() > 0:
        return torch.tensor(not engine.optimizer.overflow)
    return engine.optimizer.largest_square().isfinite()


def quiet_third_parties() -> None:
    """Only what concerns the user may be printed: no banners and deprecation notes from inside of libraries."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")


def _config(cfg: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, generated: there is no second file to keep in step."""
    return {
        # Ranks may hold different numbers of rows; DeepSpeed only wants the product to be consistent.
        "train_micro_batch_size_per_gpu": max(1, cfg.schedule.batch_size // world_size),
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": cfg.engine.zero,
            "overlap_comm": distributed.device().type == "cuda",
            # 64 MB of gradients at a time keep a network busy; the default allocates 2 GB for them, and twice that to overlap.
            "reduce_bucket_size": 16_000_000,
        },
        # Its versions do not agree on the default.
        "gradient_clipping": cfg.optim.clip_gradient,
        # Any class but torch's own Adam counts as untested there; ours differs from it only in skipping groups.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Keep DeepSpeed from importing torch's compiler, which takes a second or two of every process.

    With ZeRO it looks whether an optimizer is its Muon. The functions of that one ask to be compiled as soon as they are imported.
    """
    compiled = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiled


def _avoid_cpu_extension() -> None:
    """Keep DeepSpeed from building a C++ extension at start on the CPU.

    Its shared-memory collectives want a compiler and ninja and take 40 s to build; gloo does the same work without them. DeepSpeed
    fills the table of its extensions when it is first read, and calls the compiler for that; so the entry is made without reading.
    """
    import deepspeed.ops

    if distributed.device().type == "cpu":
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
