"""What runs on a GPU: its command lines are right, its limits fit, a step that fails or hangs ends alone, and missing numbers are told."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from bench import kmeans, margin
from benchmarks import step_waits
from benchmarks.gpu import SECONDS, STEPS, Step, command, install, run_step
from benchmarks.gpu_targets import TARGETS, targets
from dnc_dist.cli import cli
from dnc_dist.commands.train import train
from dnc_dist.config import load_config

ROOT = Path(__file__).resolve().parent.parent
WORDS = [(step, rehearsal) for step in STEPS for rehearsal in (False, True)]
FAMILIES = {"margin": margin.IMPLEMENTATIONS, "kmeans": kmeans.IMPLEMENTATIONS}


class Parsed(Exception):
    """The arguments were accepted."""


def accept(command: click.Command, words: list[str]) -> None:
    """Parse the words as those of a command of click, without running it, and its configuration, if it has one."""
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, words
        command, words = found, words[1:]
    given = command.make_context("command", list(words)).params
    if command is train:
        load_config(ROOT / given["config"], given["overrides"])


@pytest.mark.parametrize(("step", "rehearsal"), WORDS, ids=lambda value: getattr(value, "name", value))
def test_the_command_line_of_every_step_is_accepted(step: Step, rehearsal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = command(step, tmp_path, "a_gpu", rehearsal=rehearsal)
    assert words[:3] == [sys.executable, "-m", step.module] and "{" not in " ".join(words)
    monkeypatch.chdir(ROOT)
    if step.module == "pytest":
        assert [word for word in words if word.endswith(".py") and not (ROOT / word).is_file()] == []
    elif step.module == "dnc_dist":
        accept(cli, words[3:])
    elif step.module == "benchmarks.step_waits":
        accept(train, words[3:])
    else:
        parse = argparse.ArgumentParser.parse_args

        def parse_only(parser: argparse.ArgumentParser) -> None:
            raise Parsed(parse(parser))

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        monkeypatch.setattr(sys, "argv", words[2:])
        with pytest.raises(Parsed) as accepted:
            importlib.import_module(step.module).main()
        if step.module.startswith("bench."):
            family = step.module.removeprefix("bench.")
            assert set(accepted.value.args[0].only.split(",")) <= FAMILIES[family].keys()


def test_the_limits_fit_into_ten_minutes_and_budgets_into_their_limits() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert sum(step.limit for step in STEPS) <= SECONDS < 600
    for step in STEPS:
        if "--budget" in step.gpu:
            assert float(step.gpu[step.gpu.index("--budget") + 1]) < step.limit


def test_the_page_has_every_step_and_its_limit() -> None:
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8").partition("### Ten minutes on a GPU")[2].partition("<!-- ")[0]
    told = {
        name: float(limit)
        for names, limits in re.findall(r"^\| (`[\w`, -]+`) \| .* \| ([\d, ]+) \|$", page, re.MULTILINE)
        for name, limit in zip(re.findall(r"`([\w-]+)`", names), limits.split(","), strict=True)
    }
    assert told == {step.name: step.limit for step in STEPS}


def test_without_xdist_the_tests_run_one_after_the_other() -> None:
    [tests] = [step for step in STEPS if step.name == "tests"]
    lines = [command(tests, Path("out"), "gpu", rehearsal=False, xdist=xdist) for xdist in (True, False)]
    assert "-n" in lines[0] and "-n" not in lines[1] and len(lines[0]) == len(lines[1]) + 2


def test_a_wheel_that_cannot_be_installed_does_not_cost_the_others(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    assert install(wheels, site) == f"{wheels} holds no wheels"
    with zipfile.ZipFile(wheels / "whole-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("whole.py", "")
        wheel.writestr("whole-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: whole\nVersion: 1.0\n")
        wheel.writestr("whole-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("whole-1.0.dist-info/RECORD", "")
    assert install(wheels, site) == "" and (site / "whole.py").is_file()
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no archive")
    failures = install(wheels, tmp_path / "second")
    assert failures.startswith("broken-1.0-py3-none-any.whl: ") and "whole" not in failures and (tmp_path / "second" / "whole.py").is_file()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_outcomes_of_steps(tmp_path: Path) -> None:
    def run(code: str, seconds: float) -> str:
        return run_step("step", python(code), tmp_path / "log", seconds, dict(os.environ)).outcome

    assert run("print('all well')", 60) == "ok" and "all well" in (tmp_path / "log").read_text()
    assert run("raise SystemExit(3)", 60) == "failed (3)"
    assert run("", 0) == "out of time"


def test_a_step_out_of_time_ends_with_all_that_it_started(tmp_path: Path) -> None:
    marked = tmp_path / "pid"
    code = f"import pathlib, subprocess, time; p = subprocess.Popen(['sleep', '300']); pathlib.Path({str(marked)!r}).write_text(str(p.pid))"
    found = run_step("step", python(f"{code}; print('begun', flush=True); time.sleep(300)"), tmp_path / "log", 5, dict(os.environ))
    assert found.outcome == "out of time" and found.seconds < 60
    assert "begun" in (tmp_path / "log").read_text()
    state = Path(f"/proc/{marked.read_text()}/stat")
    deadline = time.monotonic() + 20
    while state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def row(family: str, name: str, **facts: object) -> str:
    return json.dumps({"family": family, "implementation": name, "outcome": "ok"} | facts) + "\n"


def test_numbers_stand_beside_their_targets_and_missing_ones_are_told(tmp_path: Path) -> None:
    assert targets(tmp_path).count("missing") == len(TARGETS) + 1  # and the quickstart
    small = {"rows": 1024, "dim": 512, "learners": 4, "masks": "soft"}
    lines = [
        row("margin", "triton", full_ms=[1.0], graph_ms=[0.5], **small),
        row("margin", "triton", **small | {"rows": 65536}, full_ms=[9.0], peak_mb=2000.0, roofline=0.61),
        row("margin", "compile", full_ms=[1.9], **small),
        row("margin", "compile-graphs", **small | {"outcome": "out of memory"}),
        row("margin", "pytorch-metric-learning", full_ms=[30.0], **small),
    ]
    (tmp_path / "kernels_margin_gpu.jsonl").write_text("".join(lines) + '{"cut": "o')
    (tmp_path / "step.jsonl").write_text(json.dumps({"problem": {"backbone": "conv4"}, "bare_over_ours": 0.93}) + "\n")
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    shares = {"share_data": 0.25, "share_divide": 0.1, "share_evaluate": 0.05}
    (run / "metrics.jsonl").write_text(
        json.dumps({"kind": "epoch", "epoch": 0, "images_per_second": 4321.0, "seconds": 3.0} | shares) + "\n"
    )
    page = targets(tmp_path)
    for expected in (
        "faster than pytorch-metric-learning | at least 10 x | 30 x | met |",
        "faster than torch.compile | at least 2 x | 1.9 x | not met |",
        "in CUDA graphs | at least 2 x | missing: compile-graphs: out of memory | |",
        "memory | below 2000 MB | 2000 MB | not met |",
        "share of the roofline | at least 60 % | 61 % | met |",
        "flash-kmeans | at least 3 x | missing: no row of flash-kmeans at this size | |",
        "conv4: share of the bare network's speed | at least 90 % | 93 % | met |",
        "resnet18: share of the bare network's speed | at least 90 % | missing: no row of resnet18 | |",
        "| 0 | 4321 | 25 % | 10 % | 5 % | 3.0 |",
    ):
        assert expected in page, page


def test_a_damaged_line_in_the_middle_is_no_missing_number(tmp_path: Path) -> None:
    (tmp_path / "kernels_margin_gpu.jsonl").write_text('{"cut": "o\n' + row("margin", "triton"))
    with pytest.raises(ValueError):
        targets(tmp_path)


def placed(path: str, code: str, **names: Callable[[], None]) -> Callable[[], None]:
    """A function `train_epoch` or whatever the code defines, as if it stood in this file of the package."""
    namespace: dict[str, object] = dict(names)
    exec(compile(code, str(step_waits.PACKAGE / path), "exec"), namespace)
    found = namespace[code.split("def ")[1].split("(")[0]]
    assert callable(found)
    return found


def test_waits_are_counted_by_the_line_of_ours_that_leads_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:1)", stacklevel=1)

    waits = step_waits.Waits()
    loss = placed("loss/margin.py", "\n\ndef of_step():\n    read()\n", read=read)
    epoch = placed("engine/trainer.py", "def train_epoch():\n    loss()\n", loss=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", waits)
        epoch()
        epoch()
        loss()
        read()
    assert waits.counts["train_epoch", "dnc_dist/loss/margin.py:4 of_step"] == 2
    assert waits.counts["elsewhere", "dnc_dist/loss/margin.py:4 of_step"] == 1
    assert sum(waits.counts.values()) == 4 and waits.table().startswith("4 waits")


def test_other_warnings_are_shown_as_ever() -> None:
    waits, shown = step_waits.Waits(), []
    waits._show = lambda *arguments: shown.append(str(arguments[0]))
    waits(UserWarning("something else"), UserWarning, "file.py", 1)
    assert shown == ["something else"] and not waits.counts


def rehearse(out: Path, *only: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out", str(out), "--only", *only]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)


def test_a_folder_with_results_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "summary.md").write_text("of another run")
    done = rehearse(tmp_path, "step")
    assert done.returncode == 1 and "give --out another folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["summary.md"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_runs_and_one_step_that_fails_does_not_end_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = rehearse(out, "waits", "step", "profile", "margin")
    outcomes = {step["name"]: step["outcome"] for step in json.loads((out / "summary.json").read_text())["steps"]}
    # Without the step that makes the data set there is nothing to train on.
    assert done.returncode == 1 and outcomes.pop("waits") == "failed (2)", done.stdout
    assert outcomes == dict.fromkeys(("margin", "step", "profile"), "ok"), done.stdout
    assert "A rehearsal on a CPU" in (out / "summary.md").read_text()
    assert re.search(r"conv4: share .* \| \d+ % \|", (out / "targets.md").read_text())
    assert (out / "profile" / "step.json").stat().st_size > 1000 and "Self CPU" in (out / "profile" / "step.txt").read_text()
