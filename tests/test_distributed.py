"""The collectives on real gloo processes, against what one process computes; and that the test's own spawn can fail."""

from __future__ import annotations

import errno
import os
import time

import pytest
import torch

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.processes import distributed
from tests.spawn import spawn

# Rows of each rank: uneven, and some have none.
ROWS = {1: [3], 2: [3, 0], 4: [2, 0, 5, 1]}


def _rows(rank: int, count: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def _in_pairs(rank: int) -> list[int]:
    """Ranks 0 and 1 gather theirs, ranks 2 and 3 theirs."""
    groups = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    mine = groups[rank // 2]
    rows = torch.full((rank + 1, 1), float(rank), requires_grad=True)
    gathered = distributed.gather_rows(rows, grad="own", group=mine)
    gathered.sum().backward()
    assert rows.grad is not None and torch.equal(rows.grad, torch.full_like(rows, distributed.group_size(mine)))
    return [*gathered.flatten().int().tolist(), int(distributed.all_reduce_sum(torch.tensor(rank), group=mine))]


def _everything(counts: list[int]) -> dict[str, object]:
    rank, world = distributed.rank(), distributed.world_size()
    local = _rows(rank, counts[rank]).requires_grad_()
    gathered = {grad: distributed.gather_rows(local, grad=grad) for grad in ("none", "own", "sum")}  # type: ignore[arg-type]
    # Another function of the gathered rows on every rank.
    gradients = {grad: torch.autograd.grad(((rank + 1) * gathered[grad] ** 3).sum(), local)[0] for grad in ("own", "sum")}
    assert torch.equal(distributed.gather_rows(local, counts=counts), gathered["none"])
    plain = torch.tensor([rank, 1])
    summed = distributed.all_reduce_sum(plain)
    distributed.barrier()
    return {
        "gathered": {grad: value.detach() for grad, value in gathered.items()},
        "none_has_grad": gathered["none"].requires_grad,
        "gradients": gradients,
        "summed": summed,
        "plain": plain,
        "labels": distributed.gather_rows(torch.full((counts[rank],), rank)),
        "no_rows_anywhere": distributed.gather_rows(torch.zeros(0, 4, requires_grad=True), grad="own").shape,
        "objects": distributed.gather_objects({"rank": rank}),
        "from_last": distributed.broadcast_object(f"from {rank}", source=world - 1),
        "any": (distributed.any_rank(rank == world - 1), distributed.any_rank(False)),
        "groups": _in_pairs(rank) if world == 4 else None,
        "main": distributed.is_main(),
        "world": (world, distributed.group_size()),
    }


def _refused_on_main(error: Exception) -> str:
    def fail() -> None:
        raise error

    with pytest.raises((InputError, RunError)) as caught:
        distributed.on_main(fail)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (InputError("the message"), "InputError: the message"),
        (RunError("the message"), "RunError: the message"),
        (OSError(errno.ESTALE, "Stale file handle", "a/file"), "RunError: a/file: Stale file handle; check the shared folder"),
        (PermissionError(errno.EACCES, "Permission denied", "a/file"), "InputError: a/file: Permission denied; change its permissions"),
        (MemoryError(), "RunError: out of memory; use a machine with more"),
    ],
    ids=["input", "run", "machine", "permission", "memory"],
)
def test_why_rank_0_failed_is_known_to_every_rank(error: Exception, says: str) -> None:
    """None waits for what never comes."""
    first, second = spawn(_refused_on_main, 2, error)
    assert first == second and first.startswith(says)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_collectives(world: int) -> None:
    counts = ROWS[world]
    everything = torch.cat([_rows(rank, count) for rank, count in enumerate(counts)])
    starts = [sum(counts[:rank]) for rank in range(world)]
    for rank, result in enumerate(spawn(_everything, world, counts)):
        own = everything[starts[rank] : starts[rank] + counts[rank]]
        for gathered in result["gathered"].values():
            assert torch.equal(gathered, everything)
        assert not result["none_has_grad"]
        # This rank's own gradient, times the number of ranks.
        torch.testing.assert_close(result["gradients"]["own"], world * (rank + 1) * 3 * own**2)
        # Those of all ranks.
        torch.testing.assert_close(result["gradients"]["sum"], sum(range(1, world + 1)) * 3 * own**2)
        assert result["summed"].tolist() == [sum(range(world)), world]
        assert result["plain"].tolist() == [rank, 1], "the argument of all_reduce_sum stays as it was"
        assert result["labels"].tolist() == [r for r, count in enumerate(counts) for _ in range(count)]
        assert result["no_rows_anywhere"] == (0, 4)
        assert result["objects"] == [{"rank": r} for r in range(world)]
        assert result["from_last"] == f"from {world - 1}"
        assert result["any"] == (True, False)
        if world == 4:
            assert result["groups"] == ([0, 1, 1, 1] if rank < 2 else [2, 2, 2, 3, 3, 3, 3, 5])
        assert result["main"] == (rank == 0)
        assert result["world"] == (world, world)


def test_without_a_process_group_everything_is_the_identity() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    assert distributed.gather_rows(x, grad="own") is x
    assert not distributed.gather_rows(x).requires_grad
    assert torch.equal(distributed.all_reduce_sum(x), x.detach())
    assert distributed.gather_objects(3) == [3]
    assert distributed.broadcast_object(3) == 3
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    distributed.shutdown()


def test_local_range_covers_everything_once_and_evenly() -> None:
    for num_rows in (0, 1, 3, 10, 101):
        for world in (1, 2, 3, 7):
            ranges = [distributed.local_range(num_rows, rank, world) for rank in range(world)]
            assert [row for start, stop in ranges for row in range(start, stop)] == list(range(num_rows))
            sizes = [stop - start for start, stop in ranges]
            assert max(sizes) - min(sizes) <= 1
    assert distributed.local_range(5) == (0, 5)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match="sets RANK, WORLD_SIZE but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with `dnc-dist launch`"
    ):
        distributed.init()


def _fail_on_one() -> None:
    if distributed.rank() == 1:
        raise RuntimeError("only here")
    distributed.barrier()


def _hang_on_one() -> None:
    if distributed.rank() == 1:
        time.sleep(600)


def _die_on_one() -> None:
    if distributed.rank() == 1:
        os._exit(3)
    distributed.barrier()


def test_spawn_fails_when_one_rank_fails() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1:.*RuntimeError: only here"):
        spawn(_fail_on_one, 2)


def test_spawn_fails_when_one_rank_hangs() -> None:
    with pytest.raises(AssertionError, match=r"ranks without a result: .*still running: .*1"):
        spawn(_hang_on_one, 2, timeout=5)


def test_spawn_fails_when_one_rank_dies() -> None:
    with pytest.raises(AssertionError):
        spawn(_die_on_one, 2)
