"""Division in a training loop that is not ours: the page's code as it stands there, several processes equal one, states, wrong input."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

import dnc_dist
from dnc_dist import Divider
from dnc_dist.base.errors import InputError
from dnc_dist.processes import distributed
from tests.rounding import EXACT
from tests.spawn import spawn

PAGE = Path(__file__).resolve().parent.parent / "docs" / "divider.md"
DATA, LOOP, PROCESSES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)

# Measures recall@1 on the 20 classes that are not trained on; goes with the code of the page.
RECALL = """
def recall(net):
    torch.manual_seed(5)
    asked = 60 + torch.arange(400) % 20
    with torch.no_grad():
        z = divider.inference(net(vectors(asked)))
    nearest = torch.cdist(z, z).fill_diagonal_(torch.inf).argmin(1)
    return float((asked[nearest] == asked).float().mean())
"""
# A share of 400 queries is uncertain by 0.5 / sqrt(400) at most, the difference of two by sqrt(2) of that; five times this is no chance.
MARGIN = 5 * 2**0.5 * 0.5 / 400**0.5


def test_the_page_on_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(LOOP.splitlines()) <= 25
    levels, original = [], Divider.divide

    def divide(self: Divider, features: Tensor) -> Tensor:
        learner_of = original(self, features)
        levels.append((self.level, self.conquering))
        return learner_of

    monkeypatch.setattr(Divider, "divide", divide)
    names: dict[str, Any] = {}
    exec(DATA, names)
    untrained = copy.deepcopy(names["net"])
    exec(LOOP + RECALL, names)
    assert levels == [(1, False), (2, False), (4, False), (4, False)]
    divider = names["divider"]
    assert divider.conquering and divider.division.sizes.min() > 0
    assert names["recall"](names["net"]) > names["recall"](untrained) + MARGIN
    # Four learned masks have left each other, which only their gradients can do.
    assert len(torch.unique(divider.masks.masks.detach(), dim=0)) == 4


@pytest.mark.slow
def test_the_page_on_two_plain_processes(tmp_path: Path) -> None:
    """Started by torchrun, in a process group that the page makes itself."""
    tell = """
import json, os
found = {"learner_of": divider.learner_of.tolist(), "masks": divider.masks.masks.tolist(), "steps": list(batches)}
found |= {"weights": [value.tolist() for value in net.parameters()], "recall": [recall(untrained), recall(net)]}
with open(f"rank-{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
torch.distributed.destroy_process_group()
"""
    (tmp_path / "train.py").write_text(f"{DATA}import copy\nuntrained = copy.deepcopy(net)\n{PROCESSES}{LOOP}{RECALL}{tell}")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for name in ("learner_of", "masks", "weights", "recall"):
        assert one[name] == two[name], name
    before, after = one["recall"]
    assert after > before + MARGIN
    learner_of = np.array(one["learner_of"])
    assert len(one["steps"]) == len(two["steps"])
    for first, second in zip(one["steps"], two["steps"], strict=True):
        rows = first + second
        assert len(set(rows)) == len(rows) == 64 and len(first) == len(second)
        assert len(set(learner_of[rows])) == 1 and learner_of[rows[0]] >= 0


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, dnc_dist; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="Dividers"):
        _ = dnc_dist.Dividers


def problem(num_classes: int = 16, per_class: int = 6, dim: int = 12) -> tuple[Tensor, Tensor]:
    """Unit features (N, F) in float64 of classes that form four groups, and labels (N,)."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(num_classes * per_class) % num_classes
    centre = 2 * torch.randn(4, dim, generator=random, dtype=torch.float64)
    features = centre[labels % 4] + torch.randn(num_classes, dim, generator=random, dtype=torch.float64)[labels]
    return normalize(features + 0.3 * torch.randn(len(labels), dim, generator=random, dtype=torch.float64), dim=1), labels


def smooth_loss(z: Tensor, labels: Tensor) -> Tensor:
    """Of all pairs, also of those that lie on different processes."""
    return ((z @ z.T - (labels[:, None] == labels).to(z.dtype)) ** 2).mean()


def small_net(dim: int = 12) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(dim, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    return nn.parallel.DistributedDataParallel(net) if distributed.group_size() > 1 else net


class Course(NamedTuple):
    """What a training does, division by division; ``rows`` are this process's of every step."""

    learner_of: list[Tensor]
    learners: list[list[int]]
    rows: list[list[list[int]]]
    gradients: list[list[Tensor | None]]  # of network and masks in the first step after each division; masks last
    masks: list[Tensor]


def course(mode: str, kind: str, edges: list[int]) -> Course:
    """Four divisions of a few steps, the last of them conquering; ``edges``: where the features of the ranks begin and end."""
    features, labels = problem()
    divider = Divider(labels, 4, 8, mode=mode, masks=kind).double()  # type: ignore[arg-type]
    net = small_net()
    # Plain SGD: Adam divides by gradients, and where these are small rounding would grow.
    optimizer = torch.optim.SGD([*net.parameters(), *divider.parameters()], lr=0.3)
    rank = distributed.group_rank()
    found = Course([], [], [], [], [])
    data = TensorDataset(features, labels)
    for epoch in range(4):
        divider.divide(features[edges[rank] : edges[rank + 1]])
        if epoch == 3:
            divider.conquer()
        batches = divider.batches(epoch, batch_size=15, samples_per_class=3)
        for step, (learner, (inputs, targets)) in enumerate(zip(batches.learners, DataLoader(data, batch_sampler=batches), strict=True)):
            z = divider.project(net(inputs), learner)
            loss = smooth_loss(*divider.gather(z, targets)) + 0.1 * divider.penalty()
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                every = [*net.parameters(), *divider.parameters()]
                found.gradients.append([None if value.grad is None else value.grad.clone() for value in every])
            optimizer.step()
        found.learner_of.append(divider.learner_of)
        found.learners.append(batches.learners)
        found.rows.append(list(batches))
        found.masks.append(divider.masks.masks.detach().clone())
    return found


KINDS = [("hierarchical", "learned"), ("hierarchical", "fixed"), ("flat", "sliced"), ("flat", "learned")]


def refusals() -> list[str]:
    """Messages of what one rank does wrong, as this rank gets them."""
    features, labels = problem()
    start, stop = distributed.local_range(len(labels))
    mine, last = features[start:stop], distributed.rank() == distributed.world_size() - 1
    broken = mine.clone()
    broken[3, 1] = torch.nan
    other = Divider(labels, 4, 8, seed=int(last))
    messages = []
    for divider, given in (
        (Divider(labels, 4, 8), broken if last else mine),
        (Divider(labels, 4, 8), 2 * mine if last else mine),
        (Divider(labels, 4, 8), mine[:-1] if last else mine),
        (Divider(labels, 4, 8), normalize(mine[:, :-1]) if last else mine),
        (other, mine),
    ):
        with pytest.raises(InputError) as refused:
            divider.divide(given)
        messages.append(str(refused.value))
    whole = Divider(labels, 1, 8)
    whole.divide(mine)
    with pytest.raises(InputError, match=r"2 rows cannot be shared by 3 processes"):
        whole.batches(0, batch_size=2, samples_per_class=2)
    return messages


def on_ranks() -> tuple[list[Course], list[str]]:
    # The first process has no features, the last one most of them.
    edges = [0, 0, 30, 96]
    return [course(mode, kind, edges) for mode, kind in KINDS], refusals()


def test_three_processes_equal_one() -> None:
    alone = [course(mode, kind, [0, 96]) for mode, kind in KINDS]
    every = spawn(on_ranks, 3)
    for number, (mode, kind) in enumerate(KINDS):
        expected = alone[number]
        counts = [len(set(learners)) for learners in expected.learners]
        assert counts == ([1, 2, 4, 4] if mode == "hierarchical" else [4, 4, 4, 4])
        ranks = [courses[number] for courses, _ in every]
        for found in ranks:
            assert all(torch.equal(*pair) for pair in zip(found.learner_of, expected.learner_of, strict=True))
            assert found.learners == expected.learners
            assert all(torch.equal(*pair) for pair in zip(found.masks, ranks[0].masks, strict=True)), "masks differ between processes"
        for epoch, steps in enumerate(expected.rows):
            assert [list(chain(*parts)) for parts in zip(*(found.rows[epoch] for found in ranks), strict=True)] == steps
        for found in ranks:
            for ours, theirs in zip(chain(*found.gradients), chain(*expected.gradients), strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None and theirs is not None:
                    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)
        of_masks = [gradients[-1] for gradients in expected.gradients]
        if kind == "learned":
            assert all(gradient is not None and bool(gradient.any()) for gradient in of_masks[:3])
        else:
            assert of_masks[0] is None
        assert of_masks[3] is None, "masks learn while conquering"
    messages = every[0][1]
    assert all(other == messages for _, other in every)
    expectations = [
        "rank 2: row 3 .* not finite",
        "rank 2: row 0 .* length 2; normalise",
        "95 features for 96 labels",
        r"\[11, 12\]",
        "same arguments",
    ]
    for message, expectation in zip(messages, expectations, strict=True):
        assert re.search(expectation, message), message


def test_learners_share_a_mask_until_they_part() -> None:
    """At level k the K/k leaves of a learner stay equal bit for bit; a learner's gradient reaches its own leaves only."""
    found = course("hierarchical", "learned", [0, 96])
    assert [len(torch.unique(masks, dim=0)) for masks in found.masks] == [1, 2, 4, 4]
    assert torch.equal(found.masks[1][0], found.masks[1][1]) and torch.equal(found.masks[1][2], found.masks[1][3])
    assert torch.equal(found.masks[2], found.masks[3]), "masks move while conquering"


def divided(times: int = 3, **options: Any) -> tuple[Divider, Tensor, Tensor]:
    features, labels = problem()
    divider = Divider(labels, 4, 8, **options)
    for _ in range(times):
        divider.divide(features)
    return divider, features.float(), labels


def test_batches_are_of_one_learner_and_balanced() -> None:
    divider, _, labels = divided()
    learner_of, batches = divider.learner_of, divider.batches(0, batch_size=12, samples_per_class=3)
    assert len(batches) == len(list(batches)) == 96 // 12
    turns = [batches.learners.count(learner) for learner in range(4)]
    assert max(turns) - min(turns) <= 1
    for learner, rows in zip(batches.learners, batches, strict=True):
        assert len(set(rows)) == len(rows) <= 12
        assert (learner_of[rows] == learner).all()
        assert int(torch.unique(labels[rows], return_counts=True)[1].min()) >= 2
    assert list(divider.batches(0, batch_size=12, samples_per_class=3)) == list(batches)
    assert list(divider.batches(1, batch_size=12, samples_per_class=3)) != list(batches)


def test_projections_are_unit_rows_in_the_subspace() -> None:
    divider, _, _ = divided(masks="fixed")
    raw = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    z = divider.project(raw, 2)
    assert torch.equal(z != 0, (torch.arange(8) // 2 == 2).expand(5, 8))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    each = divider.project(raw, torch.tensor([0, 1, 2, 3, 2]))
    assert torch.equal(each[2], z[2]) and torch.equal(each[4], z[4])
    assert float(divider.penalty()) == 0
    divider.conquer()
    torch.testing.assert_close(divider.project(raw, 2), normalize(raw, dim=1))
    torch.testing.assert_close(divider.inference(raw), normalize(raw, dim=1))
    sliced, _, _ = divided(1, mode="flat", masks="sliced")
    torch.testing.assert_close(sliced.inference(raw).view(5, 4, 2).norm(dim=2), torch.full((5, 4), 0.5))


@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_state_goes_through_a_file(tmp_path: Path, times: int) -> None:
    divider, features, labels = divided(times, start="previous")
    with torch.no_grad():
        divider.masks.masks.mul_(torch.rand(4, 8))
    if times == 3:
        divider.conquer()
    torch.save(divider.state_dict(), tmp_path / "divider.pt")
    other = Divider(labels, 4, 8, start="previous")
    other.load_state_dict(torch.load(tmp_path / "divider.pt", weights_only=True))
    assert torch.equal(other.masks.masks, divider.masks.masks)
    assert (other.level, other.conquering) == (divider.level, divider.conquering)
    # Both go on alike: the next division, which begins at the last one, and its batches.
    assert torch.equal(other.divide(features), divider.divide(features))
    ours, theirs = other.division, divider.division
    assert ours is not None and theirs is not None
    for name, value in vars(theirs).items():
        np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)
    assert list(other.batches(5, batch_size=12)) == list(divider.batches(5, batch_size=12))


def test_a_wrong_state_is_refused_and_changes_nothing() -> None:
    divider, features, labels = divided()
    state = divider.state_dict()
    for other in (Divider(labels.flip(0), 4, 8), Divider(labels, 2, 8), Divider(labels, 4, 16), Divider(labels, 4, 8, seed=1)):
        with pytest.raises(InputError, match="other labels, num_learners"):
            other.load_state_dict(state)
        assert other.division is None and not other.conquering
    extra = state["_extra_state"]
    short = extra["division"] | {"learner_of": torch.zeros(7, dtype=torch.int16)}
    for damaged in ("nothing", {}, extra | {"division": {}}, extra | {"division": 3}, extra | {"division": short}):
        with pytest.raises(InputError, match="damaged"):
            Divider(labels, 4, 8).load_state_dict(state | {"_extra_state": damaged})
    later = copy.deepcopy(divider)
    assert torch.equal(later.divide(features), divider.divide(features))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_learners": 3}, "power of two"),
        ({"num_learners": 0}, "at least 1"),
        ({"num_learners": 16}, "at most 8"),
        ({"mode": "tree"}, "hierarchical or flat"),
        ({"masks": "sliced"}, "mode='flat'"),
        ({"masks": "none"}, "is no mask; allowed are learned, fixed, sliced"),
        ({"mode": "flat", "masks": "sliced", "embedding_dim": 9}, "multiple of 4"),
        ({"labels": torch.zeros(4, 2, dtype=torch.int64)}, r"labels of shape \(4, 2\)"),
        ({"labels": torch.rand(8)}, r"must be \(N,\) integers"),
        ({"labels": list(range(8))}, "0 classes"),
        ({"labels": [[0], [1, 1]]}, r"must be \(N,\) integers"),
        ({"num_learners": True}, "num_learners=True must be a whole number"),
        ({"embedding_dim": 8.0}, "embedding_dim=8.0 must be a whole number"),
        ({"seed": None}, "seed=None must be a whole number"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Divider(**{"labels": problem()[1], "num_learners": 4, "embedding_dim": 8, **arguments})


def test_whole_numbers_may_be_those_of_numpy_and_torch() -> None:
    features, labels = problem()
    divider = Divider(labels.numpy(), np.int64(4), np.int32(8), seed=np.uint8(3), mode="flat")
    divider.divide(features)
    assert list(divider.batches(0, batch_size=np.int64(8))) == list(divider.batches(0, batch_size=8))
    raw = torch.randn(5, 8)
    for learner in (np.int64(2), torch.tensor(2), torch.full((5,), 2, dtype=torch.int32)):
        assert torch.equal(divider.project(raw, learner), divider.project(raw, 2))  # type: ignore[arg-type]


def test_wrong_calls_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem()
    divider = Divider(labels, 4, 8, start="previous")
    raw = torch.randn(5, 8)
    for early in (lambda: divider.batches(0, batch_size=8), lambda: divider.project(raw, 0), lambda: divider.learner_of):
        with pytest.raises(InputError, match=r"call divide\(features\) first"):
            early()
    nan = features.clone()
    nan[9, 2] = torch.inf
    for given, message in (
        (features[:-1], "95 features for 96 labels"),
        (features[:, 0], r"shape \(96,\)"),
        (labels[:, None], "torch.int64"),
        (features.numpy(), "ndarray"),
        (nan, "row 9 .* not finite"),
        (3 * features, "row 0 .* length 3; normalise"),
    ):
        with pytest.raises(InputError, match=message):
            divider.divide(given)  # type: ignore[arg-type]
    assert divider.division is None
    for _ in range(3):
        divider.divide(features.bfloat16())  # rounded, and still unit rows
    for call, message in (
        (
            lambda: divider.divide(normalize(features[:, :-1])),
            "11 columns, those of the last division 12",
        ),
        (lambda: divider.project(raw[:, :7], 0), r"must be \(B, 8\)"),
        (lambda: divider.project(raw, 4), "use 0 to 3"),
        (lambda: divider.project(raw, -1), "learner=-1 must be"),
        (lambda: divider.project(raw, [0] * 5), "learner=.* must be a whole number"),
        (lambda: divider.project(raw, torch.tensor([0, 1, 4, 3, -1])), "learner=4 does not exist"),
        (lambda: divider.project(raw, torch.tensor([0, 1, -2, 3, -1])), "learner=-2 does not exist"),
        (lambda: divider.project(raw, torch.ones(5, dtype=torch.bool)), "type torch.bool"),
        (lambda: divider.project(raw.long(), 0), "type torch.int64 must be a floating-point tensor"),
        (lambda: divider.project(raw.numpy(), 0), "type ndarray must be a floating-point tensor"),
        (lambda: divider.project(raw, torch.zeros(4, dtype=torch.int64)), r"learner of shape \(4,\)"),
        (lambda: divider.batches(-1, batch_size=8), "epoch=-1"),
        (lambda: divider.batches(0, batch_size=8, samples_per_class=1), "samples_per_class=1"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="init_process_group"):
        divider.divide(features)
