"""The command line: help without heavy imports, exit codes, and messages without tracebacks."""

from __future__ import annotations

import errno
import importlib
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch.distributed as dist
import yaml

from dnc_dist import __version__, cli
from dnc_dist.base.errors import InputError, RunError, Stopped
from dnc_dist.processes.worker import run_worker


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "exp.yaml"
    path.write_text("data: {root: images}\n")
    return str(path)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of the only rank; neither it nor the process group outlives the test."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def stub(monkeypatch: pytest.MonkeyPatch, module: str, **names: Callable[..., Any]) -> None:
    """Put a light module in the place of one that imports DeepSpeed."""
    fake = types.ModuleType(module)
    for name, value in names.items():
        setattr(fake, name, value)
    monkeypatch.setitem(sys.modules, module, fake)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["config", "--keys"],
        ["--version"],
        ["launch", "--help"],
        ["train", "--help"],
        ["data", "prepare", "--help"],
        ["config", "configs/quickstart.yaml"],
        ["evaluate", "--help"],
    ],
)
def test_what_only_prints_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from dnc_dist.cli import run; assert run(sys.argv[1:]) == 0; print({'torch', 'numpy', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("set()\n")


def test_help_needs_no_pydantic() -> None:
    """It takes longer to import than a help should take as a whole."""
    code = "import sys; from dnc_dist.cli import run; assert run(sys.argv[1:]) == 0; print({'pydantic', 'torch'} & set(sys.modules))"
    for arguments in (["data", "prepare", "--help"], ["launch", "--help"], ["train", "--help"], ["evaluate", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("set()\n"), arguments


def test_the_launcher_starts_its_workers_before_torch_is_imported(tmp_path: Path) -> None:
    """One worker needs no store of torch; with several the launcher imports torch once they are started."""
    seen = tmp_path / "seen"
    code = f"""
import subprocess, sys
from pathlib import Path
from dnc_dist.config import load_config
from dnc_dist.processes.launch import launch_workers, workers, workers_here
workers._has_driver = lambda: False  # as on a machine without GPUs
start = subprocess.Popen
def note(*args, **options):
    with Path({str(seen)!r}).open("a") as file:
        file.write(f"{{'torch' in sys.modules}} ")
    return start(*args, **options)
subprocess.Popen = note
load_config("configs/quickstart.yaml")
assert workers_here(None) == 2
for count in (1, 2):
    assert launch_workers([sys.executable, "-c", ""], count) == 0
    print(count, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 False\n2 True\n" and seen.read_text() == "False False False "


def test_help_lists_every_command_with_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    for name, line in cli.COMMANDS.items():
        command = getattr(importlib.import_module(f"dnc_dist.commands.{name}"), name)
        assert isinstance(command, click.Command) and command.name == name
        assert f"{name} " in text and line in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"dnc-dist, version {__version__}\n"


def test_config_prints_a_tree_that_can_be_used(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", config_file, "--set", "optim.lr=1e-3"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["optim"]["lr"] == 0.001
    copy = tmp_path / "copy.yaml"
    copy.write_text(text)
    assert cli.run(["config", str(copy)]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config"], "error: give a CONFIG file, or --keys for the reference of all keys\nsee `dnc-dist config --help`\n"),
        (["config", "none.yaml"], "error: none.yaml: no such configuration file; see configs/ for examples\n"),
        (["train", "none.yaml"], "error: none.yaml: no such configuration file; see configs/ for examples\n"),
        (["launch", "none.yaml", "--nproc", "2"], "error: none.yaml: no such configuration file; see configs/ for examples\n"),
        (
            ["launch", "none.yaml", "--nnodes", "2"],
            "error: --nnodes 2 needs --rdzv HOST:PORT, one of the machines and a free port, the same on all of them\n"
            "see `dnc-dist launch --help`\n",
        ),
        (
            ["launch", "x", "--nproc", "0"],
            "error: Invalid value for '--nproc': 0 is not in the range x>=1.\nsee `dnc-dist launch --help`\n",
        ),
        (["lunch"], "see `dnc-dist --help`\n"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(message) and "Traceback" not in err


def test_launch_refuses_a_wrong_configuration_before_it_starts_anything(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["launch", config_file, "--nproc", "2", "--set", "division.num_learners=3"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {config_file}: 1 problem(s)\n  division.num_learners=3 must be a power of two")


def test_launch_hands_everything_to_the_workers(config_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    stub(
        monkeypatch,
        "dnc_dist.processes.launch",
        launch_workers=lambda *args, terms, **kwargs: calls.append((args, kwargs, terms)) or 75,
        workers_here=lambda nproc: nproc or 3,
    )
    arguments = ["launch", config_file, "--set", "optim.lr=1", "--set", "run.seed=2", "--resume", "never", "--nnodes", "2", "--rdzv", "a:1"]
    assert cli.run(arguments) == 75
    options = ["--resume", "never", "--set", "optim.lr=1", "--set", "run.seed=2"]
    command = [sys.executable, "-m", "dnc_dist", "train", *options, "--", config_file]  # its name may begin with a dash
    ((given, others, terms),) = calls
    assert given == (command, 3) and others == {
        "nnodes": 2,
        "rendezvous": "a:1",
        "wait": 600,
        "secret_file": Path("runs/.exp.launch-secret"),
    }
    assert terms["optim.lr"] == 1 and terms["--resume"] == "never" and "data.root" not in terms


@pytest.mark.usefixtures("one_rank")
def test_train_ends_with_the_result(config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def train(cfg: Any, resume: str, at_end: Callable[[], None]) -> dict[str, Any]:
        print("training", cfg.optim.lr, resume)
        at_end()
        return {"run": cfg.run.name, "recall@1": 0.5}

    stub(monkeypatch, "dnc_dist.engine.trainer", train=train)
    stub(monkeypatch, "dnc_dist.report", build_report=lambda run: run / "report.html")
    assert cli.run(["train", config_file, "--set", "optim.lr=0.5", "--resume", "never"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["training 0.5 never", "report: runs/exp/report.html"]
    assert lines[-1].startswith("RESULT ") and json.loads(lines[-1].removeprefix("RESULT ")) == {"run": "exp", "recall@1": 0.5}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("one class is not enough"), 2, "error: one class is not enough\n"),
        (Stopped("saved"), 75, "stopped: saved\n"),
        (TypeError("a bug"), 1, "TypeError: a bug\n"),
    ],
)
def test_how_train_fails(
    config_file: str, error: Exception, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(cfg: Any, resume: str, at_end: Callable[[], None]) -> dict[str, Any]:
        raise error

    stub(monkeypatch, "dnc_dist.engine.trainer", train=train)
    assert cli.run(["train", config_file]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(message)
    assert ("Traceback" in err) == (code == 1)


def test_evaluate_prints_a_table_or_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def evaluate_run(run: Path, data: Path | None, *, protocol: str | None, checkpoint: str, per_query: Path | None) -> dict[str, Any]:
        calls.append((run, data, protocol, checkpoint, per_query))
        return {"recall@1": 0.51239, "protocol": "leave-one-out", "card": {"protocol": "leave-one-out", "seed": 3}}

    stub(monkeypatch, "dnc_dist.engine.evaluate", evaluate_run=evaluate_run)
    assert cli.run(["evaluate", "runs/x"]) == 0
    assert capsys.readouterr().out == "recall@1       0.5124\ncard.protocol  leave-one-out\ncard.seed      3\n"
    changes = ["--protocol", "query-gallery", "--checkpoint", "last", "--per-query", "q.csv"]
    assert cli.run(["evaluate", "runs/x", "data/y", *changes, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["card"] == {"protocol": "leave-one-out", "seed": 3}
    assert calls == [
        (Path("runs/x"), None, None, "best", None),
        (Path("runs/x"), Path("data/y"), "query-gallery", "last", Path("q.csv")),
    ]


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate_run(*args: Any, **kwargs: Any) -> dict[str, Any]:
        raise KeyError("bug")

    stub(monkeypatch, "dnc_dist.engine.evaluate", evaluate_run=evaluate_run)
    with pytest.raises(KeyError):
        cli.run(["evaluate", "runs/x"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/report.html"), 1, "/x/report.html: No space left on device; free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), 1, "/x: Disk quota exceeded; free space there"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "/x: Read-only file system; choose a folder that can be written"),
        (PermissionError(errno.EACCES, "Permission denied", b"/x\xe9"), 2, "/x\\udce9: Permission denied; change its permissions"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a", None, "b"), 2, "a: b: No such file or directory; check the"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "Too many open files; raise the limit of open files (`ulimit -n 4096`)"),
        (OSError(errno.EADDRINUSE, "Address already in use"), 2, "Address already in use; choose another port"),
        (OSError(errno.EIO, "Input/output error", "/x"), 1, "/x: Input/output error; check the disk"),
        (OSError("odd"), 1, "odd"),
        (OSError(), 1, "OSError"),
        (FileNotFoundError("Caught it\nTraceback\nFileNotFoundError: /x"), 1, "FileNotFoundError: /x"),
        (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"), 2, "'caf\\udce9' is no utf-8 text (surrogates not"),
        (UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "unexpected end of data"), 2, r"b'caf\xe9' is no utf-8 text (unexpected end"),
        (MemoryError("Unable to allocate 3 TiB"), 1, "out of memory (Unable to allocate 3 TiB); use a machine with more"),
        (RecursionError("maximum recursion depth exceeded"), 1, "something is nested too deeply to be read"),
        (RunError("the model has diverged"), 1, "the model has diverged\n"),
        (
            type("DistNetworkError", (RuntimeError,), {})("failed to bind. port: 29500, code: -98, name: EADDRINUSE, message: x"),
            2,
            "port 29500: Address already in use; choose another port",
        ),
        (type("DistStoreError", (RuntimeError,), {})("Timed out after 601 seconds\nC++"), 1, "Timed out after 601 seconds\n"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, Exception) else "",
)  # fmt: skip
def test_what_the_machine_refuses_is_one_sentence(
    error: Exception, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate_run(*args: Any, **kwargs: Any) -> dict[str, Any]:
        raise error

    stub(monkeypatch, "dnc_dist.engine.evaluate", evaluate_run=evaluate_run)
    assert cli.run(["evaluate", "runs/x"]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and "Traceback" not in err
    assert isinstance(error, RunError) or re.search(r"\n  \(dnc_dist/commands/evaluate.py, line \d+; DNC_TRACEBACK=1 shows", err)
    if not isinstance(error, RunError):
        monkeypatch.setenv("DNC_TRACEBACK", "1")
        with pytest.raises(type(error)):
            cli.run(["evaluate", "runs/x"])


@pytest.mark.parametrize("launched", [False, True])
def test_a_worker_says_what_the_machine_refuses(
    launched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/x")

    monkeypatch.setenv("RANK", "3")
    if launched:
        monkeypatch.setenv("DNC_ERROR_FILE", str(tmp_path / "3.json"))
    assert run_worker(work) == 1
    err = capsys.readouterr().err
    if launched:
        record = json.loads((tmp_path / "3.json").read_text())
        assert record["message"].startswith("rank 3: /x: No space left on device; free") and record["traceback"] == "" and not err
    else:
        assert err.startswith("error on rank 3: /x: No space left on device; free space there") and "Traceback" not in err


def test_a_rank_that_is_no_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "abc")
    assert run_worker(lambda: None) == 2
    assert capsys.readouterr().err.startswith("error: the environment variable RANK is 'abc', not a whole number")


def test_an_interrupt_is_one_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def evaluate_run(*args: Any, **kwargs: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    stub(monkeypatch, "dnc_dist.engine.evaluate", evaluate_run=evaluate_run)
    assert cli.run(["evaluate", "runs/x"]) == 1
    assert capsys.readouterr().err.split() == ["interrupted"]


def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(f"{sys.executable} -m dnc_dist config --keys | head -1", shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("run: ") and done.stderr == ""


@pytest.mark.parametrize("traceback", ["", "1"])
def test_another_pipe_that_breaks_is_an_error(traceback: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only a reader of our output may leave: a service or a worker that is gone is told of."""
    monkeypatch.setenv("DNC_TRACEBACK", traceback)

    def evaluate_run(*args: Any, **kwargs: Any) -> dict[str, Any]:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    stub(monkeypatch, "dnc_dist.engine.evaluate", evaluate_run=evaluate_run)
    assert cli.run(["evaluate", "runs/x"]) == 1
    assert "Broken pipe" in capsys.readouterr().err
