"""Rank and world for everybody else: plain functions that also work without a process group (one rank).

``init`` joins the group that torchrun or SLURM describes in the environment. Collectives here are the only ones in the
package; each is the identity on one rank, so callers never ask whether they are distributed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

from dnc_dist.base.errors import InputError, RunError, explain
from dnc_dist.base.foreign import environment_int
from dnc_dist.processes import rendezvous

_local_rank: int | None = None  # once the variable LOCAL_RANK means a device


def init(timeout_seconds: float = 1800) -> None:
    """Collective. Join the process group described by torchrun's variables, else SLURM's, else be the only rank.

    Args:
        timeout_seconds: of collectives, and of the store of the ranks.

    Raises:
        InputError: the variables are incomplete or wrong, or not all ranks come to the address that they name.
    """
    if dist.is_initialized():
        return
    start = rendezvous.read_environment()
    if start.world == 1 or rendezvous.is_loopback(start.address):
        rendezvous.use_loopback()
    store = dist.HashStore() if start.world == 1 else rendezvous.join(start, timeout_seconds)
    mine = _claim_device()
    if mine is not None:
        torch.cuda.set_device(mine)
    dist.init_process_group(
        "gloo" if mine is None else "nccl",
        store=store,
        rank=start.rank,
        world_size=start.world,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=mine,
    )


def _claim_device() -> torch.device | None:
    """The CUDA device of this rank, if there are any; from now on the variable LOCAL_RANK is its number.

    DeepSpeed takes LOCAL_RANK for the number of a device, which it is not where each process sees one GPU only, as under
    ``srun --gpus-per-task=1``.
    """
    mine = device()
    if mine.type != "cuda":
        return None
    global _local_rank
    _local_rank = local_rank()
    os.environ["LOCAL_RANK"] = str(mine.index)
    return mine


def set_timeout(seconds: float) -> None:
    """Seconds after which a collective that begins from now on fails, in every group of this rank (also those of DeepSpeed)."""
    for group in c10d._world.pg_map:
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def store(name: str) -> dist.Store:
    """A place under this name in the store through which the ranks found each other, with a connection of its own.

    Its operations may wait for ever if the process that holds the store (the launcher, else rank 0) is stopped.
    """
    return dist.PrefixStore(name, c10d._get_default_store()).clone()  # type: ignore[attr-defined]


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else environment_int("RANK", 0)


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else environment_int("WORLD_SIZE", 1, least=1)


def local_rank() -> int:
    """This process's rank on its machine."""
    return environment_int("LOCAL_RANK", 0) if _local_rank is None else _local_rank


def is_main() -> bool:
    """Whether this is rank 0, the only one that prints and writes."""
    return rank() == 0


def device() -> torch.device:
    """The device of this rank: its CUDA device, else the CPU."""
    return torch.device("cuda", local_rank() % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")


def group_size(group: ProcessGroup | None = None) -> int:
    """Ranks in a group; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def group_rank(group: ProcessGroup | None = None) -> int:
    """This process's place in a group; 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


# Its name in torch 2.13, which deprecates the older one.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_traffic = {"gather": 0, "reduce": 0}


def traffic() -> dict[str, int]:
    """Bytes that this rank has received from others since its start, by kind of collective.

    "gather": the rows of the other ranks (with the padding of uneven parts); "reduce": 2 (n - 1) / n times the size of what n
    ranks sum, as a ring does it. Objects (at start and in checkpoints) and DeepSpeed's own collectives are not counted.
    """
    return dict(_traffic)


def barrier() -> None:
    """Collective. Wait for every rank."""
    if group_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Collective. The sum over ranks, as a new tensor without gradient."""
    total = tensor.detach().clone()
    if (ranks := group_size(group)) > 1:
        dist.all_reduce(total, group=group)
        _traffic["reduce"] += 2 * (ranks - 1) * total.nbytes // ranks
    return total


def _all_gather_rows(local: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> Tensor:
    most, ranks = max(counts), len(counts)
    if most == 0:
        return local
    if local.shape[0] < most:
        local = torch.cat([local, local.new_zeros((most - local.shape[0], *local.shape[1:]))])
    every = local.new_empty((ranks * most, *local.shape[1:]))
    _all_gather_single(every, local.contiguous(), group=group)
    _traffic["gather"] += (ranks - 1) * local.nbytes
    if min(counts) == most:
        return every
    return torch.cat([part[:count] for part, count in zip(every.split(most), counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, grad: str, counts: Sequence[int], group: ProcessGroup | None) -> Tensor:
        me = dist.get_rank(group)
        ctx.grad, ctx.group, ctx.size, ctx.start, ctx.stop = grad, group, len(counts), sum(counts[:me]), sum(counts[: me + 1])
        return _all_gather_rows(local.detach(), counts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.grad == "own":
            return ctx.size * grads[0][ctx.start : ctx.stop], None, None, None
        return all_reduce_sum(grads[0], ctx.group)[ctx.start : ctx.stop], None, None, None


def gather_rows(
    local: Tensor, *, grad: Literal["none", "own", "sum"] = "none", counts: Sequence[int] | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """Collective, with "sum" in the backward, too. The rows of all ranks in rank order; ranks may hold different numbers, also none.

    Args:
        local: (n_r, ...) this rank's rows.
        grad: "none"; "own": what this rank alone has for its rows, times the group's size (every rank computes the whole loss, and
            the engine averages over ranks); "sum": what all ranks have for this rank's rows (each computes a part of the loss).
        counts: n_r of every rank of the group; None: they are exchanged first, for which the host waits.

    Returns:
        (sum of n_r, ...)
    """
    if group_size(group) == 1:
        return local.detach() if grad == "none" else local
    if counts is None:
        counts = _all_gather_rows(torch.full((1,), len(local), device=local.device), [1] * group_size(group), group).tolist()
    return _all_gather_rows(local.detach(), counts, group) if grad == "none" else _GatherRows.apply(local, grad, counts, group)


def exchange_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Collective. Hand every rank its part of these rows; what all ranks have for this one.

    Args:
        rows: (sum of n_r, ...) first the n_0 rows for rank 0, then those for rank 1, and so on.
        counts: n_r of every rank, the same on all ranks.

    Returns:
        (W, n_r, ...) of the n_r of this rank, in rank order.
    """
    if group_size() == 1:
        return rows.detach()[None]
    ranks, mine = len(counts), counts[rank()]
    received = rows.new_empty((ranks, mine, *rows.shape[1:]))
    dist.all_to_all_single(received.flatten(0, 1), rows.detach().contiguous(), [mine] * ranks, list(counts))
    _traffic["gather"] += (ranks - 1) * received[0].nbytes
    return received


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Collective. The picklable value of rank ``source``, on every rank."""
    if group_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Collective. The picklable values of all ranks, in rank order, on every rank."""
    if group_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def count_ranks(flag: bool) -> Tensor:
    """Collective. On how many ranks the flag is set, () int64; nothing waits for the device before it is read. On the CPU for one rank."""
    return all_reduce_sum(torch.full((), int(flag), device=device() if group_size() > 1 else "cpu"))


def any_rank(flag: bool) -> bool:
    """Collective. Whether the flag is set on at least one rank."""
    return bool(count_ranks(flag))


def on_main(function: Callable[..., Any], *args: Any) -> Any:
    """Collective. Call on rank 0; its result, or why there is none, on every rank.

    Raises:
        InputError, RunError: on every rank, what it raised on rank 0, also what the machine refused there (see ``explain``).
    """
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_main():
        try:
            outcome = (function(*args), None)
        except (InputError, RunError, OSError, MemoryError) as error:
            outcome = (None, explain(error))
    value, problem = broadcast_object(outcome)
    if problem is not None:
        raise problem
    return value


def rank_groups(most: int) -> dict[int, ProcessGroup]:
    """Collective. For each m of 2..``most`` that divides W: the group of W/m consecutive ranks that this rank belongs to."""
    groups: dict[int, ProcessGroup] = {}
    world = world_size()
    for parts in range(2, most + 1):
        if world % parts == 0:
            size = world // parts
            # Every rank makes every group, in the same order.
            made = [dist.new_group(list(range(start, start + size))) for start in range(0, world, size)]
            groups[parts] = made[rank() // size]
    return groups


def local_range(num_rows: int, rank_: int | None = None, world: int | None = None) -> tuple[int, int]:
    """The balanced contiguous slice [start, stop) of ``range(num_rows)`` that belongs to a rank."""
    me = rank() if rank_ is None else rank_
    ranks = world_size() if world is None else world
    return num_rows * me // ranks, num_rows * (me + 1) // ranks
