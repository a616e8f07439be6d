"""Runs side by side: groups of seeds, paired differences, and cards that do not allow it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dnc_dist import cli
from dnc_dist.base.errors import InputError
from dnc_dist.rundir.comparison import Spread, compare_runs
from tests.test_card import CARD

EPOCHS = 4


def make_run(folder: Path, name: str, seed: int, recall: float, *, learners: int = 1, epochs: int = EPOCHS, **card: Any) -> Path:
    """A run directory as training leaves it, with an evaluation after every epoch; the last one finds ``recall``."""
    run = folder / name
    run.mkdir()
    config = {
        "run": {"dir": str(folder), "name": name, "seed": seed},
        "data": {"root": f"data/{name}", "workers": seed, "image_size": 32},
        "division": {"num_learners": learners},
        "schedule": {"epochs": EPOCHS},
        "tracker": {"project": name},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for epoch in range(1, epochs + 1):
        values = {"recall@1": recall - 0.1 * (epochs - epoch), "map@r": recall / 2, "num_queries": 9, "recall@1_std": 0.3}
        values["card"] = CARD.plain() | {"seed": seed, "epoch": epoch} | card
        lines.append({"step": 10 * epoch, "epoch": epoch, "kind": "evaluation", **values})
    lines.append({"step": 10 * epochs + 1, "epoch": epochs, "kind": "train", "loss": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_seeds_are_groups_and_differences_are_paired(tmp_path: Path) -> None:
    one = {0: 0.50, 1: 0.60, 2: 0.40}
    four = {2: 0.45, 0: 0.53, 7: 0.90}
    runs = [make_run(tmp_path, f"one-{seed}", seed, value) for seed, value in one.items()]
    runs += [make_run(tmp_path, f"four-{seed}", seed, value, learners=4) for seed, value in four.items()]
    found = compare_runs([runs[0], runs[3], *runs[1:3], *runs[4:]])
    assert [[run.path.name for run in group.runs] for group in found.groups] == [
        ["one-0", "one-1", "one-2"],
        ["four-2", "four-0", "four-7"],
    ]
    first, second = found.groups
    assert found.metrics == ["recall@1", "map@r"]
    spread = first.spread("recall@1")
    assert spread is not None and (spread.mean, spread.std) == (pytest.approx(0.5), pytest.approx(np.std([0.5, 0.6, 0.4], ddof=1)))
    # Seeds 0 and 2 are in both: +0.03 and +0.05. The means of the groups differ by 0.127.
    difference = second.difference(first, "recall@1")
    assert difference is not None and difference.n == 2
    assert (difference.mean, difference.std) == (pytest.approx(0.04), pytest.approx(np.std([0.03, 0.05], ddof=1)))
    assert found.config_differences() == {"division.num_learners": [1, 4]}


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path, "a", 0, 0.5), make_run(tmp_path, "b", 1, 0.7, commit="beef"), make_run(tmp_path, "c", 1, 0.75, learners=4)]
    assert cli.run(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    assert rows["recall@1"] == ["recall@1", "0.6000", "±", "0.1414", "0.7500", "+0.0500", "(n=1)"]
    assert rows["division.num_learners"] == ["division.num_learners", "1", "4"]
    assert "Measured by different code: 1, beef" in out and "not finished" not in out
    assert rows["protocol"] == ["protocol", "leave-one-out"] and rows["data_hash"] == ["data_hash", "abc"]
    assert cli.run(["compare", "--json", *map(str, runs)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["groups"][0]["metrics"]["recall@1"]["mean"] == pytest.approx(0.6)
    assert values["groups"][1]["difference"]["recall@1"] == {"mean": pytest.approx(0.05), "std": None, "n": 1}
    assert values["groups"][0]["runs"][1]["card"]["commit"] == "beef" and values["config_differences"] == {"division.num_learners": [1, 4]}


def test_no_seed_in_common_gives_no_difference(tmp_path: Path) -> None:
    found = compare_runs([make_run(tmp_path, "a", 0, 0.5), make_run(tmp_path, "b", 1, 0.7, learners=4)])
    assert found.groups[1].difference(found.groups[0], "recall@1") is None


def test_the_same_seed_twice_is_no_further_seed(tmp_path: Path) -> None:
    found = compare_runs([make_run(tmp_path, "a", 0, 0.5), make_run(tmp_path, "again", 0, 0.6, commit="other")])
    assert len(found.groups) == 2 and found.config_differences() == {}
    assert found.groups[1].difference(found.groups[0], "recall@1") == Spread(pytest.approx(0.1), None, 1)


def test_unfinished_runs_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    young = make_run(tmp_path, "young", 2, 0.1)
    (young / "metrics.jsonl").write_text('{"step": 1, "epoch": 0, "kind": "train", "loss": 1.0}\n')
    runs = [make_run(tmp_path, "a", 0, 0.5), make_run(tmp_path, "half", 1, 0.6, epochs=2), young]
    assert cli.run(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert f"seeds 0, 1, 2: {runs[0]}, {runs[1]}*, {young}*" in out
    assert f"{runs[1]} is not finished: 2 of 4 epochs" in out and f"{young} is not finished: 0 of 4 epochs" in out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"protocol": "query-gallery"}, "protocol: 'leave-one-out' in {a}, 'query-gallery' in {b}"),
        ({"parameters": {"recall_at": [1, 10]}}, "parameters: {{'recall_at': [1, 2]}} in {a}, {{'recall_at': [1, 10]}} in {b}"),
        ({"data_hash": "x", "num_queries": 8}, "data_hash: 'abc' in {a}, 'x' in {b}\n  num_queries: 9 in {a}, 8 in {b}"),
        ({"selected_on": "test"}, "selected_on: 'last' in {a}, 'test' in {b}"),
        ({"dimension": 4}, "dimension: 8 in {a}, 4 in {b}"),
    ],
)
def test_cards_are_not_mixed(change: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path, "a", 0, 0.5), make_run(tmp_path, "b", 1, 0.5, **change)
    assert cli.run(["compare", str(a), str(b)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and told.format(a=a, b=b) in captured.err


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a, old, bare, young = (make_run(tmp_path, name, 0, 0.5) for name in ("a", "old", "bare", "young"))
    (old / "metrics.jsonl").write_text('{"step": 1, "epoch": 4, "kind": "evaluation", "recall@1": 0.5}\n')
    (bare / "config.yaml").unlink()
    (young / "metrics.jsonl").write_text('{"step": 1, "epoch": 0, "kind": "train", "loss": 1.0}\n')
    for runs, message in (
        ([a, old], "numbers of .*old have no card"),
        ([a, bare], "bare has no config.yaml"),
        ([a, tmp_path / "a/../a"], "named twice"),
        ([young], "no run was evaluated so far"),
        ([tmp_path / "nowhere"], "is no directory"),
    ):
        with pytest.raises(InputError, match=message):
            compare_runs(runs)
