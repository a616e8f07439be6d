"""The doctor on real processes: what it says about a healthy machine, and that it finds what is broken."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dnc_dist.base.errors import InputError
from dnc_dist.config import RunConfig, load_config, parse_tree
from dnc_dist.data.index import open_index
from dnc_dist.data.readers import read
from dnc_dist.data.shards import write_shards
from dnc_dist.doctor import env, facts
from dnc_dist.doctor.table import Check, Section, as_json, render
from dnc_dist.engine.dataset import Passes
from dnc_dist.processes import distributed
from tests.doctor_fixtures import ALONE, found, ranks, row
from tests.engine_fixtures import damage, make_dataset
from tests.run_fixtures import dnc, draw_folder, write_config
from tests.spawn import spawn


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and ``run.yaml``."""
    folder = tmp_path_factory.mktemp("doctor")
    write_config(folder, make_dataset(folder / "whole"))
    return folder


# ---------------------------------------------------------------- env


def test_environment_of_one_process(place: Path) -> None:
    values = found(ranks("env", "run.yaml", "--json", folder=place, world=1)[0])
    assert values["world_size"] == 1
    assert row(values, "torch")["value"] == torch.__version__
    assert row(values, "W&B")["value"] == "not chosen (tracker.kind=jsonl)"
    assert "reference implementation" in row(values, "kernels")["value"]
    assert row(values, "faiss search")["value"].startswith("on the CPU")
    assert {row(values, name)["status"] for name in ("C compiler", "Python headers", "kernel cache")} == {"ok"}
    (rank,) = values["env"]["ranks"]
    assert rank["memory"] > 0 and rank["run_disk"] > 0 and rank["clock_offset"] == 0
    assert [path.name for path in place.iterdir() if "doctor" in path.name] == []


def test_environment_as_a_table_on_two_ranks(place: Path) -> None:
    first, second = ranks("env", folder=place)
    assert first.code == second.code == 0 and second.out == ""
    title, *lines = first.out.splitlines()
    assert title.startswith("env: 2 rank(s) on 1 host(s): ")
    assert any(line.split() == ["same", "versions", "on", "2", "rank(s)", "ok"] for line in lines)
    assert any("is written and read by all ranks" in line and line.endswith("ok") for line in lines)


def _facts() -> facts.Facts:
    return facts.gather_facts(Path("."))[0]


def test_other_versions_and_broken_installations_are_found() -> None:
    mine = _facts()
    other = dataclasses.replace(
        mine, host="b", versions=mine.versions | {"torch": "1.0", "faiss": facts.ABSENT}, import_error="ImportError: no libfaiss"
    )
    failed = [check for check in env._software([mine, other]) if check.status == "failed"]
    assert [check.name for check in failed] == ["imports", "same versions", "same versions"]
    assert failed[0].value == "rank 1 (b): ImportError: no libfaiss"
    assert failed[1].value == f"torch {torch.__version__} on rank 0, 1.0 on rank 1 (b)"
    two = dataclasses.replace(mine, versions=mine.versions | {"faiss": "1.15.1 (faiss-gpu), 1.15.1 (faiss-cpu)"})
    assert [(check.name, check.status) for check in env._software([two]) if check.status != "ok"] == [("faiss", "warning")]
    missing = [check.name for check in env._software([other, other]) if check.status == "failed"]
    assert missing == ["faiss", "imports"]


def test_gpus_are_judged() -> None:
    mine = dataclasses.replace(_facts(), driver=False)
    assert [check.status for check in env._devices([mine, mine])] == ["warning"]
    assert [check.status for check in env._devices([dataclasses.replace(mine, driver=True)])] == ["failed"]
    new, old = (dataclasses.replace(mine, gpu=facts.Gpu("G", 80 * 2**30, version), num_gpus=2) for version in ((9, 0), (7, 5)))
    assert [(check.value, check.status) for check in env._devices([new, new])][1:] == [("2 x G, 80 GB, capability 9.0", "ok")]
    assert [check.status for check in env._devices([new, old])] == ["ok", "ok", "warning"]
    assert [check.status for check in env._devices([new, mine])] == ["failed", "ok", "ok"]
    assert "3 ranks share 2 GPUs" in [check.value for check in env._devices([new, new, new])][-1]


def _as_on_another_machine() -> None:
    """Rank 1's clock is ahead, and the run's folder is not there."""
    env._SHARED_WITHIN_SECONDS = 0.2
    if os.environ["RANK"] == "1":
        now = time.time
        time.time = lambda: now() + 5
        env._attend = lambda folder: (folder / "elsewhere" / "1").write_text("here")


def test_other_clocks_and_folders_are_found(place: Path) -> None:
    values = found(ranks("env", "--json", folder=place, before=_as_on_another_machine)[0], code=1)
    assert [abs(rank["clock_offset"] - ahead) < 0.5 for rank, ahead in zip(values["env"]["ranks"], (0, 5), strict=True)] == [True, True]
    assert row(values, "clocks")["status"] == "warning" and row(values, "clocks")["value"].startswith("rank 1 (")
    assert row(values, "run.dir")["status"] == "failed"
    assert f"{place} of rank 0 is not shared with rank 1 (" in row(values, "run.dir")["value"]


def test_a_folder_that_cannot_be_written_is_found() -> None:
    check = env.shared_folder(Path("/proc/nowhere/runs"), ["a"])
    assert check.status == "failed" and check.value.startswith("/proc: ")


def _for_triton(**changes: Any) -> list[tuple[str, str]]:
    """Names and values of the warnings about what Triton needs, for a rank with a GPU and one without."""
    mine = dataclasses.replace(_facts(), compiler="/usr/bin/cc", python_header="/usr/include/Python.h", kernel_cache="/k", host="a")
    on_gpu = dataclasses.replace(mine, gpu=facts.Gpu("G", 80 * 2**30, (9, 0)), kernel_cache_system="ext4")
    without = dataclasses.replace(mine, compiler="", python_header="", kernel_cache_system="nfs")
    return [
        (check.name, check.value) for check in env._toolchain([without, dataclasses.replace(on_gpu, **changes)]) if check.status != "ok"
    ]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({}, None),
        ({"compiler": ""}, ("C compiler", "none on rank 1 (a)")),
        ({"python_header": ""}, ("Python headers", "none on rank 1 (a)")),
        ({"kernel_cache_system": "nfs4"}, ("kernel cache", "/k (nfs4) on rank 1 (a)")),
        ({"kernel_cache_system": "fuse.sshfs"}, ("kernel cache", "/k (fuse.sshfs) on rank 1 (a)")),
        ({"kernel_cache_system": None}, None),
    ],
)
def test_what_triton_needs_on_a_gpu(changes: dict[str, Any], warning: tuple[str, str] | None) -> None:
    assert _for_triton(**changes) == ([warning] if warning else [])


def test_the_kind_of_a_file_system(tmp_path: Path) -> None:
    home, late = tmp_path / "my home", tmp_path / "late"
    (home / "below").mkdir(parents=True)
    late.mkdir()
    point = str(home).replace(" ", r"\040")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"1 0 8:1 / / rw,relatime - ext4 /dev/root rw\n2 1 0:5 / {point} rw shared:1 master:2 - nfs4 server:/x rw\n"
        f"3 1 8:2 / {late} rw - xfs /dev/b rw\n4 3 0:6 / {late} rw - lustre o:/x rw\n"
    )
    found = [facts._file_system(path, mounts) for path in (tmp_path, home / "below" / "not yet", late, tmp_path / "latecomer")]
    assert found == ["ext4", "nfs4", "lustre", "ext4"]
    assert facts._file_system(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("listing", "visible", "found"),
    [
        ("echo 'GPU 0: X (UUID: y)'", None, True),
        ("echo 'GPU 0: X (UUID: y)'", "0", True),
        ("echo 'GPU 0: X (UUID: y)'", "", False),
        ("echo 'No devices were found'; exit 6", None, False),
        ("echo 'NVIDIA-SMI has failed'; exit 9", None, False),
    ],
)
def test_a_driver_counts_with_its_gpus(
    listing: str, visible: str | None, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{listing}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert facts._driver_has_gpus() is found


def test_shared_memory_is_judged_by_what_the_workers_load() -> None:
    four = [dataclasses.replace(_facts(), shared_memory=2 * 2**30)] * 4
    of_workers = {workers: parse_tree({"data": {"root": ".", "workers": workers}}, "test") for workers in (1, 40)}
    found = {workers: next(check for check in env._resources(four, cfg) if check.name == "/dev/shm") for workers, cfg in of_workers.items()}
    assert [check.status for check in found.values()] == ["ok", "warning"] and "--shm-size" in found[40].hint


def _forge_faiss() -> None:
    import faiss

    search = faiss.knn

    def forged(*args: Any) -> Any:
        distance, found = search(*args)
        distance[3, 1] += 1
        return distance, found

    faiss.knn = forged


def _kernels_for_everybody() -> None:
    """The folder for compiled kernels is one that everybody can write to, and DNC_KERNELS asks for kernels."""
    os.environ.pop("TRITON_CACHE_DIR", None)
    tempfile.tempdir = os.getcwd()
    folder = Path(f"dnc-dist-triton-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)


WITH_TRITON = {"DNC_KERNELS": "triton", "TRITON_INTERPRET": "1"}


def test_wrong_neighbours_of_faiss_are_found(place: Path) -> None:
    done = dnc("doctor", "env", "--json", folder=place, env=ALONE, before=_forge_faiss)
    assert row(found(done, code=1), "faiss search")["hint"].startswith("FAISS on the CPU finds wrong neighbours for 1 of 256 rows")


@pytest.mark.parametrize("command", ["doctor", "train"])
def test_kernels_that_others_could_have_written_are_not_run(command: str, tmp_path: Path) -> None:
    write_config(tmp_path, Path("nowhere"))
    message = f"dnc-dist-triton-{os.getuid()} for compiled kernels is not a folder that this user alone can use; remove it, or set TRITON_"
    if command == "train":
        done = dnc("train", "run.yaml", folder=tmp_path, env=WITH_TRITON, before=_kernels_for_everybody)
        assert message in done.error and not (tmp_path / "runs").exists()
        return
    done = dnc("doctor", "env", "--json", folder=tmp_path, env=WITH_TRITON | ALONE, before=_kernels_for_everybody)
    assert message in row(found(done, code=1), "kernels")["hint"]


# ---------------------------------------------------------------- data


def test_a_whole_dataset_passes(place: Path) -> None:
    values = found(ranks("data", "run.yaml", "--json", folder=place)[0])
    index = open_index(place / "whole" / "data")
    assert row(values, "manifest")["value"] == f"content {index.content_hash} on 2 rank(s)"
    assert row(values, "train")["value"] == "72 images of 12 classes"
    assert row(values, "protocol")["value"] == "leave-one-out"
    # Shards of one class: a sample of up to 8 is every one of their 6 images.
    assert values["data"]["images_read"] == len(index) == 90
    assert values["data"]["undecodable"] == {}


def test_truncated_and_missing_shards_are_named(place: Path) -> None:
    broken = place / "broken"
    shutil.copytree(place / "whole" / "data", broken)
    first, second = open_index(broken).shard_paths[:2]
    os.truncate(first, 1000)
    second.unlink()
    done = dnc("doctor", "data", "run.yaml", "--set", f"data.root={broken}", "--nproc", "2", "--json", folder=place)
    check = row(found(done, code=1), "files")
    assert f"{first} has 1,000 bytes instead of" in check["value"] and f"{second} is missing" in check["value"]
    assert done.err.splitlines()[-1] == "error: 1 check(s) failed: data: files"


def test_undecodable_images_are_named(place: Path) -> None:
    damage(place / "whole" / "data", place / "damaged", train=[5, 40], test=[3])
    first, second = ranks("data", "run.yaml", "--set", f"data.root={place / 'damaged'}", "--decode", "all", "--json", folder=place)
    values = found(first, code=1)
    assert second.code == 1 and second.out == ""
    index = open_index(place / "damaged")
    rows = [int(index.view("train").rows[at]) for at in (5, 40)] + [int(index.view("test").rows[3])]
    assert set(values["data"]["undecodable"]) == {index.key(number) for number in rows}
    assert row(values, "images")["value"].startswith("3 of 90 cannot be decoded: ")


def test_another_dataset_on_one_rank_is_found(place: Path) -> None:
    other = make_dataset(place / "other")
    index = json.loads((other / "manifest.json").read_text()) | {"content_hash": "0" * 32}
    (other / "manifest.json").write_text(json.dumps(index))
    first, _ = ranks("data", "run.yaml", "--json", folder=place, env_of_1={"DNC_LOCAL_DATA": str(other)})
    values = found(first, code=1)
    assert row(values, "manifest")["status"] == "failed" and "0" * 32 in row(values, "manifest")["value"]
    assert "holds another dataset than data.root" in row(values, "files")["value"]


def _refused(cfg: RunConfig, other: Path) -> str:
    if distributed.rank() == 1:
        os.environ["DNC_LOCAL_DATA"] = str(other)
    with pytest.raises(InputError) as caught:
        Passes(cfg)
    return str(caught.value)


def test_the_same_images_in_other_shards_on_one_rank(tmp_path: Path) -> None:
    """What is read from front to back is planned by the shards. The images are the same, so the copy is one of data.root."""
    drawn = draw_folder(tmp_path / "drawn", {"a": 4, "b": 4}, {"c": 3, "d": 3})
    for shards in (1, 2):
        write_shards(read("folder", drawn), tmp_path / f"in-{shards}", shards=shards)
    one, two = (open_index(tmp_path / f"in-{shards}") for shards in (1, 2))
    assert one.content_hash == two.content_hash
    write_config(tmp_path, tmp_path / "in-1")
    first, second = spawn(_refused, 2, load_config(tmp_path / "run.yaml"), tmp_path / "in-2")
    assert first == second and "the same in other shards, on rank 1 than on rank 0" in first
    done, _ = ranks("data", "run.yaml", "--json", folder=tmp_path, env_of_1={"DNC_LOCAL_DATA": str(tmp_path / "in-2")})
    value = row(found(done, code=1), "manifest")["value"]
    assert value.startswith(f"rank 0 has content {one.content_hash}, rank 1 (") and value.endswith(") the same in other shards")


def test_what_does_not_fit_the_configuration_is_found(place: Path) -> None:
    write_shards(read("folder", draw_folder(place / "few", {"a": 4, "b": 4, "c": 1}, {"d": 2})), place / "few" / "data")
    done, *_ = ranks("data", "run.yaml", "--set", "data.root=few/data", "--json", folder=place, world=1)
    values = found(done, code=1)
    assert done.err.splitlines()[-1] == "error: 1 check(s) failed: data: division"
    assert row(values, "train")["status"] == "warning" and "1 class(es) with one image" in row(values, "train")["hint"]
    assert row(values, "division")["status"] == "failed"
    assert "set division.num_learners to at most 1" in row(values, "division")["hint"]


# ---------------------------------------------------------------- network


def test_the_network_is_measured(place: Path) -> None:
    values = found(ranks("network", "--json", folder=place)[0])
    assert values["world_size"] == 2
    measured = values["network"]["collectives"]
    assert {(one["operation"], one["bytes"]) for one in measured} == {
        (operation, size) for operation in ("all-reduce", "all-gather") for size in (2**10, 2**15, 2**20, 2**24)
    }
    for one in measured:
        share = {"all-reduce": 1.0, "all-gather": 0.5}[one["operation"]]
        assert one["gb_per_s"] == pytest.approx(one["bytes"] * share / one["microseconds"] / 1e3)
    assert values["network"]["store_microseconds"] > 0


def _forge_gather() -> None:
    gather = dist.all_gather

    def forged(parts: list[torch.Tensor], part: torch.Tensor) -> None:
        gather(parts, part)
        parts[0] += 1

    dist.all_gather = forged


def test_wrong_numbers_from_the_network_are_found(place: Path) -> None:
    first, _ = ranks("network", "--json", folder=place, before=_forge_gather)
    values = found(first, code=1)
    assert {check["name"] for check in values["checks"] if check["status"] == "failed"} == {
        f"all-gather {size}" for size in ("1 KB", "32 KB", "1 MB", "16 MB")
    }


@pytest.mark.slow
def test_all_checks_together(place: Path) -> None:
    done = dnc("doctor", "run.yaml", folder=place)
    assert done.code == 0, done
    assert [line.split(":")[0] for line in done.out.splitlines() if line[:1].strip()] == ["env", "data", "network", "parity"]


# ---------------------------------------------------------------- command line and tables


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dato"], "dato is neither a configuration file nor one of the checks env, data, network, parity"),
        (["data"], "data needs a CONFIG, whose data.root it looks at"),
        (["env", "--set", "optim.lr=1"], "--set changes a CONFIG; give one"),
        (["env", "a.yaml", "b.yaml"], "give one of env, data, network, parity (or none, for all of them) and at most one CONFIG"),
        (["env", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, place: Path) -> None:
    assert dnc("doctor", *arguments, folder=place).error.startswith(message)


def test_workers_start_no_workers(place: Path) -> None:
    assert ranks("env", "--nproc", "2", folder=place, world=1)[0].error.startswith("--nproc starts workers, but srun or torchrun")


def test_one_rank_cannot_be_compared(place: Path) -> None:
    assert ranks("parity", folder=place, world=1)[0].error.startswith("doctor parity needs two workers or more: --nproc 2")


def test_the_table_shows_a_hint_beside_what_needs_one() -> None:
    section = Section("env", "here", [Check("a", "1"), Check("long name", "22", "warning", "do this")], {"x": 1})
    assert render(section).splitlines() == ["env: here", "  a          1   ok", "  long name  22  warning  do this"]
    assert json.loads(as_json([section], 3))["x"] == 1
