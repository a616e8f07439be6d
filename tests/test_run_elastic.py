"""A run goes on with another number of processes than wrote its checkpoint: same state bit for bit, same curve, same divisions."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rounding import NEIGHBOUR, share_of_course
from tests.run_fixtures import (
    Done,
    Running,
    assert_same_run,
    divisions,
    dnc,
    end_ranks,
    killed_when_writing,
    last_step,
    make_dataset,
    metrics,
    on_a_smooth_network,
    signalled_in,
    start_ranks,
    without_report,
    write_config,
)

STEPS_PER_EPOCH = 8
DIVISION = 4 * STEPS_PER_EPOCH
"""The step of the division into four learners; the backbone waits in the epoch after it."""
END = 6 * STEPS_PER_EPOCH
COMPARED = 20
OPTIM = {"lr": 0.0005}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a configuration with everything random, the run ``whole`` that nobody disturbed, its ``neighbour`` (see
    ``rounding.py``), and ``killed``: 2 processes each."""
    folder = tmp_path_factory.mktemp("elastic")
    write_config(
        folder,
        make_dataset(folder),
        data={"augment": "color"},
        loss={"name": "margin", "learn_beta": "scalar"},
        division={"every": 2, "conquer_from": 5, "backbone_frozen_epochs": 1, "mask_penalty": 0.3},
        schedule={"epochs": 6},
        optim=OPTIM,
        checkpoint={"every_steps": 4, "keep": 50},
    )
    done = end_ranks(train(folder, "whole", 2))
    (folder / "result.json").write_text(json.dumps(done.result))
    assert last_step(folder / "runs" / "whole") == END
    done = end_ranks(train(folder, "neighbour", 2, neighbour=True))
    (folder / "neighbour.json").write_text(json.dumps(done.result))
    killed, left_behind = train(folder, "killed", 2, before=partial(killed_when_writing, "files.json", "step-00000024"))
    assert killed.wait().code == -signal.SIGKILL and left_behind.wait().code != 0
    assert (folder / "runs" / "killed" / "checkpoints" / "latest").read_text() == "step-00000020"
    return folder


def train(
    place: Path,
    name: str,
    world: int,
    *arguments: str,
    config: str = "run",
    before: Callable[[], None] = without_report,
    neighbour: bool = False,
) -> list[Running]:
    """Start so many processes of a run, on the smooth network."""
    before = partial(on_a_smooth_network, before, neighbour=neighbour)
    return start_ranks(["train", f"{config}.yaml", "--set", f"run.name={name}", *arguments], place, world, before=before)


def copy(place: Path, name: str, to: str) -> Path:
    shutil.copytree(place / "runs" / name, place / "runs" / to)
    return place / "runs" / to


def share_of_rounding(run: Path, reference: Path, neighbour: Path, steps: range) -> float:
    """By how much of what rounding allows the losses of these steps differ."""
    curves = [{line["step"]: line["loss"] for line in metrics(each, "train")} for each in (run, reference, neighbour)]
    first, expected, _ = (curve[steps[0]] for curve in curves)
    # Up to here both runs are one, bit for bit: this loss is of equal weights, and only a forward pass rounds differently.
    assert abs(first - expected) <= 4 * NEIGHBOUR * max(curves[1].values())
    # The neighbour left at the start of the run, and may have gone astray by now; then the first loss has to do.
    return share_of_course(*([curve[step] for step in steps] for curve in curves), least_steps=0)


def assert_ends_like_whole(place: Path, run: Path, done: Done, resumed_at: int) -> float:
    """The next losses as close as rounding lets them be, the same divisions and result where rounding decides neither; that share."""
    whole, neighbour = place / "runs" / "whole", place / "runs" / "neighbour"
    share = share_of_rounding(run, whole, neighbour, range(resumed_at + 1, resumed_at + COMPARED + 1))
    assert share < 1
    found, expected, moved = (divisions(each) for each in (run, whole, neighbour))
    assert found.keys() == expected.keys()
    for name, division in expected.items():
        assert found[name]["learner_of"] == division["learner_of"] or moved[name]["learner_of"] != division["learner_of"], name
    result, (expected_result, moved_result) = (
        done.result,
        (json.loads((place / f"{name}.json").read_text()) for name in ("result", "neighbour")),
    )
    assert result.keys() == expected_result.keys()
    differ = {key for key in result if result[key] != expected_result[key]}
    assert differ <= {"run"} | {key for key in result if moved_result[key] != expected_result[key]}
    assert [(line["kind"], line["step"]) for line in metrics(run)] == [(line["kind"], line["step"]) for line in metrics(whole)]
    return share


def state(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds of weights, buffers and optimizer, whatever number of processes wrote it."""
    model = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    found = dict(model["module"])
    parts = [
        torch.load(path, weights_only=True)["optimizer_state_dict"]
        for path in sorted(folder.glob("*_optim_states.pt"), key=lambda path: int(path.name.split("_")[3]))
    ]
    base = parts[0]["base_optimizer_state"] if parts else model["optimizer"]
    for group, options in enumerate(base["param_groups"]):
        found |= {f"{options['name']} {key}": torch.tensor(options[key]) for key in ("betas", "eps", "weight_decay")}
        for part in parts:
            weights, moments = part["single_partition_of_fp32_groups"][group], part["base_optimizer_state"]["state"].get(group, {})
            for key, value in {"weights": weights, **moments}.items():
                name = f"{options['name']} {key}"
                if key == "step":
                    assert found.setdefault(name, value) == value
                else:
                    found[name] = torch.cat([found[name] if name in found else value[:0], value[: len(weights)]])
    if not parts:
        found |= {f"{number} {key}": value for number, values in base["state"].items() for key, value in values.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 0])
def test_the_state_passes_through_any_number_of_processes_unchanged(zero: int, place: Path) -> None:
    """Each attempt is stopped in the division that it begins with, and so saves what it has loaded."""
    run = place / "runs" / f"passed-{zero}"
    if zero == 1:
        copy(place, "whole", run.name)
    else:
        stopped = train(
            place, run.name, 2, "--set", f"engine.zero={zero}", before=partial(signalled_in, "divide", DIVISION, signal.SIGTERM)
        )
        assert end_ranks(stopped).code == 75
    folder = run / "checkpoints" / f"step-{DIVISION:08d}"
    expected = state(folder)
    before = 2
    for world in (4, 1, 3, 2):
        arguments = ["--set", f"engine.zero={zero}", "--resume", f"runs/{run.name}/checkpoints/{folder.name}"]
        done = end_ranks(train(place, run.name, world, *arguments, before=partial(signalled_in, "divide", DIVISION, signal.SIGTERM)))
        assert done.code == 75
        said = f"checkpoint runs/{run.name}/checkpoints/{folder.name} was written by {before} process(es) and goes on with {world}\n"
        assert done.out.count(said) == 1
        assert len(list(folder.glob("*_optim_states.pt"))) == (world if zero else 0)
        found = state(folder)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        before = world
    if zero:
        # Not trivial: a group that has waited has taken fewer steps than another.
        assert expected["backbone step"] == DIVISION - 2 * STEPS_PER_EPOCH < expected["embedding step"] == DIVISION
        assert expected["loss weights"].shape == (1,) and expected["loss exp_avg_sq"].all()


@pytest.mark.slow
def test_before_the_first_step_there_is_nothing_of_adam(place: Path) -> None:
    before, at_start = partial(signalled_in, "evaluate", 0, signal.SIGTERM), ("--set", "evaluation.at_start=true")
    folder = place / "runs" / "young" / "checkpoints" / "step-00000000"
    assert end_ranks(train(place, "young", 2, *at_start, before=before)).code == 75
    expected = state(folder)
    assert not any("exp_avg" in name for name in expected)
    done = end_ranks(train(place, "young", 3, *at_start, before=before))
    assert done.code == 75 and "goes on with 3\n" in done.out
    found = state(folder)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_then_four(place: Path, record_property: Callable[[str, Any], None]) -> None:
    run = copy(place, "killed", "four")
    done = end_ranks(train(place, "four", 4))
    assert "goes on with 4\n" in done.out and "resumed in epoch 2, after step 20\n" in done.out
    record_property("largest share of what rounding allows", assert_ends_like_whole(place, run, done, 20))
    last = metrics(run, "evaluation")[-1]
    smoothly = partial(on_a_smooth_network, without_report)
    found = json.loads(dnc("evaluate", "runs/four", "--json", folder=place, before=smoothly).out)
    assert {name: found[name] for name in ("recall@1", "map@r", "nmi")} == {name: last[name] for name in ("recall@1", "map@r", "nmi")}


def killed_while_reading() -> None:
    """For ``before``: the process is killed when it has read the other number's optimizer state."""
    from dnc_dist.engine.zero import checkpoint as restore

    cut = restore.cut_partition

    def cutting(*args: Any) -> Any:
        cut(*args)
        os.killpg(0, signal.SIGKILL)

    restore.cut_partition = cutting


def test_two_processes_then_one_then_two(place: Path, record_property: Callable[[str, Any], None]) -> None:
    """The change itself is killed first, which leaves nothing behind."""
    run = copy(place, "killed", "one")
    entries = {path: path.stat().st_size for path in (run / "checkpoints").rglob("*") if ".tmp" not in str(path.relative_to(run))}
    assert end_ranks(train(place, "one", 1, before=killed_while_reading)).code == -signal.SIGKILL
    assert {path: path.stat().st_size for path in (run / "checkpoints").rglob("*")} == entries

    (alone,) = train(place, "one", 1)
    alone.wait_until(lambda: last_step(run) > 20 + COMPARED)
    alone.signal(signal.SIGTERM)
    assert alone.wait().code == 75
    assert last_step(run) < END
    done = end_ranks(train(place, "one", 2))
    assert "was written by 1 process(es) and goes on with 2\n" in done.out
    record_property("largest share of what rounding allows", assert_ends_like_whole(place, run, done, 20))


@pytest.mark.slow
def test_a_backbone_with_dropout_of_its_own(place: Path) -> None:
    """Exact on a resume, and said at start that another number of processes would not be."""
    write_config(
        place,
        place / "data",
        "dropout",
        data={"image_size": 32},
        model={"backbone": "rexnet_100"},
        division={"num_learners": 1, "conquer_from": None},
        schedule={"epochs": 1},
        checkpoint={"every_steps": 3, "keep": 50},
    )
    done = end_ranks(train(place, "dropped", 2, config="dropout"))
    assert done.out.count("the backbone has Dropout of its own") == 1
    again = copy(place, "dropped", "dropped-again")
    end_ranks(train(place, again.name, 2, "--resume", f"runs/{again.name}/checkpoints/step-00000003", config="dropout"))
    assert_same_run(again, place / "runs" / "dropped")
    alone = copy(place, "dropped", "dropped-alone")
    end_ranks(train(place, alone.name, 1, "--resume", f"runs/{alone.name}/checkpoints/step-00000003", config="dropout"))
    found, expected = ([line["loss"] for line in metrics(run, "train")][3:8] for run in (alone, place / "runs" / "dropped"))
    assert found != pytest.approx(expected, rel=1e-2)  # other features are dropped; rounding changes less


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "first", "then"), [(0, 1, 2), (1, 3, 2), (2, 4, 1), (2, 1, 3)])
def test_other_numbers_and_stages(zero: int, first: int, then: int, place: Path, record_property: Callable[[str, Any], None]) -> None:
    """Also: a boundary per class, two learners a step, and the same number afterwards goes on bit for bit."""
    write_config(
        place,
        place / "data",
        f"zero-{zero}",
        data={"augment": "color", "workers": 2},
        loss={"name": "margin", "learn_beta": "class"},
        division={"every": 2, "conquer_from": 5, "backbone_frozen_epochs": 1, "mask_penalty": 0.3, "learners_per_step": 2},
        schedule={"epochs": 6},
        optim=OPTIM,
        engine={"zero": zero},
        checkpoint={"every_steps": 4, "keep": 50},
    )
    whole, name = place / "runs" / f"whole-{zero}-{first}", f"changed-{zero}-{first}-{then}"
    end_ranks(train(place, whole.name, first, config=f"zero-{zero}"))
    run = copy(place, whole.name, name)
    end_ranks(train(place, name, then, "--resume", f"runs/{name}/checkpoints/step-00000020", config=f"zero-{zero}"))
    neighbour = place / "runs" / f"neighbour-{zero}-{first}-{then}"
    end_ranks(train(place, neighbour.name, first, config=f"zero-{zero}", neighbour=True))
    share = share_of_rounding(run, whole, neighbour, range(21, 21 + COMPARED))
    record_property("largest share of what rounding allows", share)
    assert share < 1
    found, expected, moved = ([each["learner_of"] for each in divisions(one).values()] for one in (run, whole, neighbour))
    assert found == expected or moved != expected

    again = copy(place, name, f"{name}-again")
    done = end_ranks(train(place, again.name, then, "--resume", f"runs/{again.name}/checkpoints/step-00000028", config=f"zero-{zero}"))
    assert "goes on with" not in done.out
    assert_same_run(again, run)
