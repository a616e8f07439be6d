"""Everything that needs a GPU, in ten minutes on one H100 or H200 without a network: tests, benchmarks, one training.

    python3 -m benchmarks.gpu [--out runs/gpu] [--wheels FOLDER]
    python3 -m benchmarks.gpu --device cpu          # a rehearsal: the same commands with tiny sizes, on a machine without a GPU

Every step has a time limit and a log of its own. One that fails or outlasts its limit does not keep the next from running, and what it
has written stays. At the end OUT has `summary.md`, what became of each step, and `targets.md`, the measured numbers beside the targets.
Only torch with CUDA, triton and numpy have to be there; FOLDER has the wheels of all else that pyproject.toml names, pytest, and the
baselines pytorch-metric-learning and flash-kmeans. DNC_COMMIT names the commit where git cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 590.0  # of all steps together on a GPU
REHEARSAL_SECONDS = 1800.0
REHEARSED = "A rehearsal on a CPU: it shows that the commands work. Its numbers say nothing.\n\n"
GRACE = 3.0  # seconds that a step has to end once it was asked to
TESTS = [f"tests/test_triton_{name}.py" for name in ("gpu", "sampling", "margin", "lloyd")]
TESTS += [f"tests/test_{name}.py" for name in ("retrieval_search", "retrieval_places", "model_batch_norm")]
TRAINING = ["--set", "run.dir={out}/runs", "--set", "tracker.kind=jsonl", "--set", "data.root={out}/glyphs"]
"""Of every training: `{out}` is the folder of results."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of its log and of its line in the summary.
        limit: seconds on a GPU.
        module: what `python -m` runs.
        gpu: arguments on a GPU.
        cpu: arguments of the rehearsal.
        instead: what the rehearsal leaves out or does in its place.
    """

    name: str
    limit: float
    module: str
    gpu: list[str]
    cpu: list[str]
    instead: str = ""


def training(name: str, *more: str) -> list[str]:
    """Arguments of a training of the quickstart."""
    values = [part for value in (f"run.name={name}", *more) for part in ("--set", value)]
    return ["configs/quickstart.yaml", *TRAINING, *values]


def bench(family: str, limit: float, budget: float, implementations: list[str], others: str = "") -> Step:
    """Of the kernels' benchmarks. No row is begun after `budget` seconds, so that the last one ends within the limit."""
    # A file of its own: a line that a time limit has cut off must not stand in the midst of another's.
    kept = ["--only", ",".join(implementations), "--out", f"{{out}}/kernels_{family}_{{machine}}{others.replace('-', '_')}.jsonl"]
    on_gpu = ["--device", "cuda", "--seconds", "0.2", "--budget", str(budget), *kept]
    instead = "one tiny size, in Triton's interpreter"
    return Step(f"{family}{others}", limit, f"bench.{family}", on_gpu, ["--device", "cpu", "--quick", *kept], instead)


ONE_EPOCH = ("schedule.epochs=1", "division.conquer_from=null", "evaluation.at_start=false", "evaluation.nmi=never")
TINY = (*ONE_EPOCH, "data.workers=0")
# A package may be missing that only one file needs; and two ranks cannot share a GPU.
PYTEST = [*TESTS, "-p", "no:cacheprovider", "--continue-on-collection-errors", "-k", "not on_two_ranks and not number_of_ranks"]
WORKERS = ["-n", "8"]  # of the tests, most of whose time is compilation; left out where pytest-xdist is not there
STEPS = [
    Step("doctor", 30, "dnc_dist", ["doctor", "env", "--nproc", "1"], ["doctor", "env", "--nproc", "1"]),
    Step("tests", 120, "pytest", [*PYTEST, *WORKERS, "--durations=5"], [*PYTEST, "--collect-only"], "the tests are only collected"),
    Step(
        "data",
        25,
        "dnc_dist",
        ["data", "prepare", "glyphs", "--out", "{out}/glyphs"],
        ["data", "prepare", "glyphs", "--out", "{out}/glyphs", "--classes", "24", "--image-size", "32"],
        "24 characters",
    ),
    Step("waits", 40, "benchmarks.step_waits", training("waits", *ONE_EPOCH), training("waits", *TINY), "no wait can be seen on a CPU"),
    # Ours at every size first: a compilation of torch.compile must not take the time for it.
    bench("margin", 45, 35, ["triton", "eager", "eager-blocks"]),
    bench("margin", 80, 65, ["pytorch-metric-learning", "compile", "compile-graphs"], "-others"),
    bench("kmeans", 55, 45, ["triton", "flash-kmeans", "eager"]),
    bench("kmeans", 25, 18, ["eager-tf32", "compile"], "-others"),
    Step(
        "scaling",
        45,
        "benchmarks.scaling",
        ["--measure", "configs/vehicleid.yaml", "--measured", "{out}/scaling.json", "--rows", "32", "80", "128", "--steps", "20"],
        ["--measure", "configs/quickstart.yaml", "--measured", "{out}/scaling.json", "--rows", "8", "16"]
        + ["--steps", "3", "--calls", "1", "--size", "4096"],
        "the small network, batches of 8 and 16",
    ),
    Step("quickstart", 60, "dnc_dist", ["train", *training("quickstart")], ["train", *training("quickstart", *TINY)], "one epoch"),
    Step(
        "step",
        30,
        "benchmarks.step",
        ["--arms", "bare", "ours", "--out", "{out}/step.jsonl"],
        ["--arms", "bare", "ours", "--backbones", "conv4", "--rounds", "2", "--out", "{out}/step.jsonl"],
        "2 rounds of the small network",
    ),
    Step(
        "profile",
        30,
        "benchmarks.step_profile",
        ["--out", "{out}/profile"],
        ["--out", "{out}/profile", "--steps", "1"],
        "one step, of the CPU",
    ),
]


@dataclass
class Outcome:
    """What became of a step: "ok", "failed (exit code)", "out of time"."""

    name: str
    outcome: str
    seconds: float
    note: str = ""


def command(step: Step, out: Path, machine: str, *, rehearsal: bool, xdist: bool = True) -> list[str]:
    """The command line of a step."""
    arguments = step.cpu if rehearsal else [word for word in step.gpu if xdist or word not in WORKERS]
    return [sys.executable, "-m", step.module, *(part.format(out=out, machine=machine) for part in arguments)]


def run_step(name: str, words: list[str], log: Path, seconds: float, environment: dict[str, str], note: str = "") -> Outcome:
    """Run a command in a session of its own, so that what it has started ends with it."""
    if seconds <= 0:
        return Outcome(name, "out of time", 0.0, "not started")
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        child = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = child.wait(seconds)
            outcome = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
        finally:
            _end(child)
    return Outcome(name, outcome, round(time.monotonic() - started, 1), note)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the session of a step, and what its command has left behind: asked first, so that it can write what it has."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)


def install(wheels: Path, site: Path) -> str:
    """The wheels into a folder of this run; of those that cannot be installed, why."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        return f"{wheels} holds no wheels"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]

    def error(these: list[Path]) -> str:
        done = subprocess.run([*pip, *map(str, these)], capture_output=True, text=True, check=False)
        return (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else ""

    if not error(found):
        return ""
    # Each alone: one that does not fit must not cost the others.
    return "; ".join(f"{wheel.name}: {reason}" for wheel in found if (reason := error([wheel])))


def machine_name(device: str) -> str:
    """Of result files: the GPU, as `a_b_c`.

    Raises:
        SystemExit: there is none.
    """
    if device == "cpu":
        return "cpu"
    ask = "import torch; print(torch.cuda.get_device_name())"
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise SystemExit(f"no GPU that torch can use ({(asked.stderr.strip().splitlines() or ['?'])[-1]}); --device cpu rehearses")
    return re.sub(r"[^a-z0-9]+", "_", asked.stdout.strip().lower())


def summary(outcomes: list[Outcome]) -> str:
    """A table of the steps."""
    lines = ["| step | outcome | seconds | |", "| --- | --- | --- | --- |"]
    lines += [f"| {one.name} | {one.outcome} | {one.seconds:.1f} | {one.note} |" for one in outcomes]
    ok, seconds = sum(one.outcome == "ok" for one in outcomes), sum(one.seconds for one in outcomes)
    lines.append(f"| together | {ok} of {len(outcomes)} ok | {seconds:.1f} | |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all steps; 1 if one was not ok."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of results; a new one")
    parser.add_argument("--wheels", type=Path, help="folder with the wheels of what is not installed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal with tiny sizes")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these steps (default: all)")
    args = parser.parse_args()
    out, rehearsal = args.out.resolve(), args.device == "cpu"
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{args.out} holds files already; give --out another folder, so that no result is lost or mixed up")
    # Where this process is ended, the step that runs has to end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started, machine = time.monotonic(), machine_name(args.device)
    out.mkdir(parents=True, exist_ok=True)
    places = [str(ROOT / "kernels"), str(ROOT)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    if rehearsal:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as site:
        if args.wheels:
            failures = install(args.wheels, Path(site))
            places.append(site)
            outcomes.append(Outcome("wheels", "failed" if failures else "ok", round(time.monotonic() - started, 1), failures))
        xdist = any((Path(place) / "xdist").is_dir() for place in (site, *sys.path))
        environment["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
        for step in STEPS:
            if args.only and step.name not in args.only:
                continue
            left = (REHEARSAL_SECONDS if rehearsal else SECONDS) - (time.monotonic() - started)
            seconds = left if rehearsal else min(step.limit, left)
            words = command(step, out, machine, rehearsal=rehearsal, xdist=xdist)
            outcomes.append(run_step(step.name, words, out / f"{step.name}.log", seconds, environment, step.instead if rehearsal else ""))
            print(f"{outcomes[-1].name}: {outcomes[-1].outcome}, {outcomes[-1].seconds} s", flush=True)
            # At once: whatever ends this process, what was done until then is told.
            _write(out, outcomes, rehearsal)
    for page in ("summary.md", "targets.md"):
        print(f"\n{(out / page).read_text(encoding='utf-8')}")
    return int(any(one.outcome != "ok" for one in outcomes))


def _write(out: Path, outcomes: list[Outcome], rehearsal: bool) -> None:
    from benchmarks.gpu_targets import targets

    told: dict[str, Any] = {"rehearsal": rehearsal, "steps": [asdict(one) for one in outcomes]}
    (out / "summary.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    for name, page in (("summary", summary(outcomes)), ("targets", targets(out))):
        (out / f"{name}.md").write_text((REHEARSED if rehearsal else "") + page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
