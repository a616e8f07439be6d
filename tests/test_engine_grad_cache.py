"""GradCache: rows that go through the backbone in chunks give the loss, the gradient and the steps of rows that go at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnc_dist.base.errors import InputError
from dnc_dist.doctor.harness import Outcome, errors_of, tensor_errors
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.grad_cache import in_chunks
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_engine, build_objective
from dnc_dist.processes import distributed
from tests.engine_fixtures import config, damage, division_by_hand, kept, make_dataset
from tests.rounding import EXACT, NEIGHBOUR, TIMES
from tests.spawn import spawn
from tests.test_engine_parity import LEARNERS, ZERO_CHANGES, Case, case_outcome, curve

CHUNKS = 5
WORLDS = (1, 2, 4)
TOGETHER = {"learners_per_step": 2}
PROXY = {"name": "proxy_anchor", "scale": 16.0}
CASES = {
    "divided, dropout, colour": Case(
        {"model": {"dropout": 0.4}, "data": {"augment": "color"}, "loss": {"learn_beta": "class"}, "division": TOGETHER}
    ),
    "divided, proxies": Case({"loss": PROXY, "division": TOGETHER}),
    "conquer": Case({"loss": PROXY, "model": {"dropout": 0.4}}, level=1, conquer=True),
    "frozen backbone": Case({"model": {"dropout": 0.4}, "division": TOGETHER}, frozen=True),
    # With four processes one of them has a dummy alone.
    "fewer rows than chunks": Case({"schedule": {"batch_size": 10, "samples_per_class": 5}}, only=3),
    "undecodable images": Case({}, level=1, data="damaged"),
}


def _changed(changes: dict[str, dict[str, Any]], **engine: Any) -> dict[str, dict[str, Any]]:
    return {**changes, "model": {**changes.get("model", {}), "batch_norm": "frozen"}, "engine": engine}


def _unused_parameter(root: Path, run: Path, zero: int, chunks: int) -> Tensor:
    """What one step of the engine makes of a parameter of the backbone that takes part in nothing."""
    cfg = config(root, run, **_changed({}, zero=zero, grad_cache_chunks=chunks))
    data = RunData(cfg)
    objective = build_objective(cfg, data.train.num_classes).train()
    objective.backbone.unused = nn.Parameter(torch.ones(3))
    engine = build_engine(objective, cfg)
    schedule = data.schedule(division_by_hand(data.train.labels, LEARNERS), 0, conquer=False)
    loss, _ = engine(next(data.train_batches(schedule, first_step=0, skip=0)), Phase(0, LEARNERS, False, False))
    engine.backward(loss)
    engine.step()
    return objective.backbone.unused.detach()


def _compute(roots: dict[str, str], place: str) -> dict[str, dict[str, float]]:
    """Errors of steps in chunks relative to those at once, on as many processes; of the engine's relative to one process with ZeRO 0."""
    run = Path(place) / "run"
    errors = {}
    for name, case in CASES.items():
        outcomes: list[Outcome] = []
        for chunks in (1, CHUNKS):
            cfg = config(Path(roots[case.data]), run, **_changed(case.changes, grad_cache_chunks=chunks))
            outcomes.append(case_outcome(case, cfg, torch.float64))
        plain, chunked = outcomes
        assert plain.stats["loss"] > 0
        errors[name] = errors_of(chunked, plain)
    if distributed.world_size() == 1:
        cfg = config(Path(roots["whole"]), run, **_changed(ZERO_CHANGES, zero=0))
        expected = curve(cfg)
        torch.save(tuple(expected), f"{place}/curve.pt")
        errors["neighbour"] = errors_of(curve(cfg, neighbour=True), expected)
    for zero in (0, 1, 2) if distributed.world_size() < 4 else ():
        found = curve(config(Path(roots["whole"]), run, **_changed(ZERO_CHANGES, zero=zero, grad_cache_chunks=CHUNKS)))
        errors[f"ZeRO {zero}"] = errors_of(found, kept(Path(place) / "curve.pt"))
        unused = [_unused_parameter(Path(roots["whole"]), run, zero, chunks) for chunks in (1, CHUNKS)]
        errors[f"unused parameter, ZeRO {zero}"] = {"parameter": float((unused[1] - unused[0]).abs().max())}
    return errors


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, float]]]:
    """By number of processes."""
    place = tmp_path_factory.mktemp("grad-cache")
    whole = make_dataset(place / "dataset")
    roots = {"whole": str(whole), "damaged": str(damage(whole, place / "damaged", train=[0, 1, 2, 8, 9, 10, 31]))}
    return {world: spawn(_compute, world, roots, str(place))[0] for world in WORLDS}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_loss_and_gradients_equal_those_without_chunks(errors: dict[int, dict[str, dict[str, float]]], world: int, name: str) -> None:
    assert {key: error for key, error in errors[world][name].items() if not error <= EXACT} == {}


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_deepspeed_takes_the_same_steps(errors: dict[int, dict[str, dict[str, float]]], world: int, zero: int) -> None:
    allowed = {key: TIMES * error + NEIGHBOUR for key, error in errors[1]["neighbour"].items()}
    assert max(allowed.values()) < 1e-3  # a bug changes more
    assert {key: error for key, error in errors[world][f"ZeRO {zero}"].items() if not error <= allowed[key]} == {}


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_the_engine_takes_a_parameter_without_a_gradient(errors: dict[int, dict[str, dict[str, float]]], world: int, zero: int) -> None:
    """Weight decay alone moves it, with chunks and without; and no hook waits for its gradient."""
    assert errors[world][f"unused parameter, ZeRO {zero}"] == {"parameter": 0.0}


def test_bf16_autocast_differs_by_rounding_only(tmp_path: Path) -> None:
    """Both round to bf16 in other sums: as far apart as a few times the distance of one of them from float64."""
    root, case = make_dataset(tmp_path / "dataset"), Case({"model": {"dropout": 0.4}})
    found = {}
    for name, chunks, precision in (("plain", 1, "bf16"), ("chunked", CHUNKS, "bf16"), ("exact", 1, "fp32")):
        cfg = config(root, tmp_path / "run", **_changed(case.changes, precision=precision, grad_cache_chunks=chunks))
        found[name] = case_outcome(case, cfg, torch.float64 if name == "exact" else torch.float32)
    allowed = tensor_errors(found["plain"].tensors, found["exact"].tensors)
    assert 1e-4 < allowed["tensors of backbone"] < 0.1  # bf16 it is, and no noise
    errors = tensor_errors(found["chunked"].tensors, found["plain"].tensors)
    assert {key: error for key, error in errors.items() if not error <= TIMES * allowed[key]} == {}


class _Network(nn.Module):
    """With a dropout of its own, a frozen layer, and one that takes part in nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten())
        self.layers[0].bias.requires_grad_(False)
        self.aside = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def _loss(features: Tensor) -> Tensor:
    """Every row with every other."""
    return torch.cdist(features.float(), features.float()).square().mean().sqrt()


def _by_hand(compute: Callable[[Tensor], Tensor], images: Tensor, network: nn.Module) -> dict[str, Tensor | None]:
    """The chunks with an ordinary graph each, all at a time; sums in the order of the chunks."""
    features = [compute(part) for part in images.tensor_split(CHUNKS)]
    rows = torch.cat([part.detach() for part in features]).requires_grad_()
    (grad,) = torch.autograd.grad(_loss(rows), rows)
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    sums: dict[str, Tensor | None] = dict.fromkeys(trained)
    for part, cotangent in zip(features, grad.tensor_split(CHUNKS), strict=True):
        for name, value in zip(trained, torch.autograd.grad(part, list(trained.values()), cotangent, allow_unused=True), strict=True):
            sums[name] = value if sums[name] is None or value is None else sums[name] + value
    return sums


@pytest.mark.parametrize("autocast", [False, True])
def test_random_numbers_of_the_network_are_kept(autocast: bool) -> None:
    """Bit for bit the gradient of the same chunks in one graph, with the same numbers from torch's own dropout; in bf16, too."""
    network, images = _Network(), torch.randn(23, 3, 8, 8)

    def compute(part: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return network(part)

    torch.manual_seed(1)
    expected = _by_hand(compute, images, network)
    ends = torch.rand(3)

    torch.manual_seed(1)
    features = in_chunks(compute, [images], CHUNKS, network)
    assert features.dtype == (torch.bfloat16 if autocast else torch.float32)
    loss = _loss(features)
    torch.manual_seed(2)  # whoever draws in between
    between = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), between)
    for name, value in network.named_parameters():
        if name.startswith("aside"):
            assert expected[name] is None and value.grad is not None and not value.grad.any()
        elif value.requires_grad:
            assert expected[name].any() and torch.equal(value.grad, expected[name]), name
    assert network.layers[0].bias.grad is None
    torch.manual_seed(1)
    in_chunks(compute, [images], CHUNKS, network)
    assert torch.equal(torch.rand(3), ends)  # what is drawn after the step does not change


def test_every_gradient_arrives_once_and_little_is_stored() -> None:
    """A parameter's hooks see one gradient, as ZeRO wants it; and the graph stores the network's memory of one chunk at most."""
    network, images, arrived, stored = _Network(), torch.randn(40, 3, 8, 8), [], [0]
    for name, value in network.named_parameters():
        if value.requires_grad:
            value.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    own = sum(value.nbytes for value in network.parameters())

    def pack(value: Tensor) -> Tensor:
        stored[-1] += value.nbytes
        return value

    def compute(part: Tensor) -> Tensor:
        stored.append(0)
        return network(part)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        compute(images)
        at_once = stored[-1]
        stored.append(0)
        features = in_chunks(compute, [images], 10, network)
        assert sum(stored[2:]) <= own
        loss = _loss(features)
        stored.append(0)
        loss.backward()
        assert len(stored[-10:]) == 10 and max(stored[-10:]) <= at_once / 10 + own
    assert sorted(arrived) == [name for name, value in sorted(network.named_parameters()) if value.requires_grad]


def test_a_parameter_that_changes_before_the_backward_pass_is_an_error() -> None:
    network = _Network()
    loss = _loss(in_chunks(network, [torch.randn(6, 3, 8, 8)], 2, network))
    with torch.no_grad():
        network.layers[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("of", ["instance statistics", "spectral norm"])
def test_a_network_that_changes_with_every_pass_is_refused(of: str) -> None:
    """Its gradient would not be that of the features which the loss saw, or statistics would move several times a step."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)) if of == "spectral norm" else nn.Conv2d(3, 4, 3)
    norm = nn.InstanceNorm2d(4, track_running_stats=True) if of == "instance statistics" else nn.Identity()
    network = nn.Sequential(layer, norm, nn.Flatten())
    images = torch.randn(6, 3, 8, 8)
    with pytest.raises(InputError, match=r"engine\.grad_cache_chunks=2 .* every pass changes (0\.parametrizations|1\.running_mean)"):
        in_chunks(network, [images], 2, network)
    # In evaluation mode, or with statistics that stand, it is as any other.
    in_chunks(network.eval(), [images], 2, network)


@pytest.mark.parametrize(
    ("norm", "says"), [("global", "model.batch_norm=global needs"), ("auto", "model.batch_norm=auto, which is global")]
)
def test_statistics_of_the_whole_batch_are_refused(tmp_path: Path, norm: str, says: str) -> None:
    cfg = config(tmp_path, tmp_path / "run", model={"batch_norm": norm}, engine={"grad_cache_chunks": 4})
    with pytest.raises(InputError, match=r"^engine\.grad_cache_chunks=4 computes a batch in parts") as refused:
        build_objective(cfg, 3)
    assert says in str(refused.value) and "model.batch_norm=frozen" in str(refused.value)


def test_a_network_without_batch_norm_is_trained_in_chunks_from_scratch(tmp_path: Path) -> None:
    cfg = config(
        tmp_path,
        tmp_path / "run",
        model={"backbone": "test_vit", "weights": "none", "batch_norm": "auto"},
        data={"image_size": 160},
        engine={"grad_cache_chunks": 4},
    )
    assert build_objective(cfg, 3).grad_cache_chunks == 4
