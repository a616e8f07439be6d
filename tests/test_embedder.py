"""``load(run).embed(images)``: the same digits as the evaluation, from whatever an image may be, with nothing but the run's directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dnc_dist
from dnc_dist.base.errors import InputError
from dnc_dist.data.images import decode
from dnc_dist.data.rows import ShardReader
from dnc_dist.doctor.harness import relative_error
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.extract import extract
from dnc_dist.engine.setup import build_objective
from dnc_dist.engine.zero import load_weights, read_model
from dnc_dist.processes.signals import StopRequest
from dnc_dist.rundir.checkpoints import Checkpoints
from dnc_dist.rundir.folder import load_run_config
from tests.engine_fixtures import silent
from tests.run_fixtures import SIZE, end_ranks, make_dataset, start_ranks, without_report, write_config

PER_CLASS = 6
"""Images of a test class; each class is a shard of its own here, and so a block of the evaluation."""
DIM = 16


def trained(folder: Path, root: Path, zero: int, *, nproc: int = 1, **sections: Any) -> Path:
    """A short run of 1 -> 2 learners."""
    changes: dict[str, Any] = {
        "engine": {"zero": zero},
        "schedule": {"epochs": 2},
        "division": {"num_learners": 2, "conquer_from": None},
        "evaluation": {"nmi": "never"},
    }
    write_config(folder, root, f"zero{zero}", **(changes | sections))
    done = end_ranks(start_ranks(["train", f"zero{zero}.yaml"], folder, nproc, before=without_report))
    assert done.code == 0, done
    return folder / "runs" / f"zero{zero}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder")
    make_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return trained(place, place / "data", 1, nproc=2)


@pytest.fixture(scope="module")
def pictures(run: Path, place: Path) -> list[Path]:
    """The test images in the order of the evaluation, as files with the bytes that the data set stores."""
    data = RunData(load_run_config(run))
    assert data.test is not None
    reader, folder = ShardReader(data.index), place / "stored"
    folder.mkdir()
    files = []
    for at, row in enumerate(data.test.rows):
        files.append(folder / f"{at:03d}.jpg")
        files[-1].write_bytes(reader.read(int(row)))
    data.close()
    return files


def of_the_evaluation(run: Path, which: str = "embeddings") -> np.ndarray:
    """What the engine extracts from the test split with the run's newest checkpoint."""
    cfg = load_run_config(run)
    data = RunData(cfg)
    assert data.test is not None
    objective = build_objective(cfg, data.train.num_classes, initial_weights=False)
    checkpoints = Checkpoints(run, 2)
    folder = checkpoints.folder / checkpoints.choose("last")[0]
    load_weights(objective, read_model(folder).weights, folder)
    compute = getattr(objective, which)
    batches = data.sequential(data.test)
    found = extract(objective, compute, batches, name="test", num_rows=len(data.test), stop=StopRequest(), progress=silent())
    data.close()
    return found.values.numpy()


def test_embeddings_are_those_of_the_evaluation(run: Path, pictures: list[Path]) -> None:
    model = dnc_dist.load(run)
    found = model.embed(pictures, batch_size=PER_CLASS)
    assert found.dtype == np.float32 and found.shape == (len(pictures), DIM)
    np.testing.assert_array_equal(found, of_the_evaluation(run))
    np.testing.assert_allclose(np.linalg.norm(found.astype(np.float64), axis=1), 1, atol=DIM * 2.0**-23)
    np.testing.assert_array_equal(model.features(pictures, batch_size=PER_CLASS), of_the_evaluation(run, "features"))


def test_order_and_batch_size_do_not_matter(run: Path, pictures: list[Path]) -> None:
    model = dnc_dist.load(run)
    found = model.embed(pictures)
    # Sums of at most 128 x 9 products in another order, in each of four layers and the embedding.
    bound = 5 * 128 * 9 * 2.0**-24
    order = np.random.default_rng(0).permutation(len(pictures))
    for other in (model.embed([pictures[at] for at in order], batch_size=7), model.embed([pictures[at] for at in order], batch_size=1)):
        assert relative_error(torch.from_numpy(other), torch.from_numpy(found[order])) < bound


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_every_stage_of_zero(place: Path, pictures: list[Path], zero: int) -> None:
    run = trained(place, place / "data", zero)
    np.testing.assert_array_equal(dnc_dist.load(run).embed(pictures, batch_size=PER_CLASS), of_the_evaluation(run))


def test_an_image_may_be_a_path_an_array_or_of_pillow(run: Path, pictures: list[Path]) -> None:
    model, few = dnc_dist.load(run, device="cpu"), pictures[:4]
    expected = model.embed(few)
    opened = [Image.open(path) for path in few]
    arrays = [np.array(decode(path.read_bytes())) for path in few]
    for images in ([str(path) for path in few], opened, arrays, np.stack(arrays), (path for path in few), [few[0], opened[1], *arrays[2:]]):
        np.testing.assert_array_equal(model.embed(images), expected)
    np.testing.assert_array_equal(model.embed(few[0]), model.embed(arrays[0]))
    assert model.embed(opened[0]).shape == (1, DIM)
    assert model.embed([]).shape == (0, DIM)


def test_a_folder_is_read_at_any_depth_by_name(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name, source in (("b/c/1.jpg", 2), ("b/0.jpg", 1), ("a.jpg", 0), ("z.JPG", 3)):
        shutil.copy(pictures[source], tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.jpg").write_text("no image")
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    model = dnc_dist.load(run)
    np.testing.assert_array_equal(model.embed(tmp_path), model.embed(pictures[:4]))


@pytest.mark.parametrize("mode", ["flat", "hierarchical"])
def test_learners_keep_their_subspaces_when_the_whole_set_is_trained(mode: str, tmp_path: Path) -> None:
    """The last division is then of one learner, and sliced masks have no subspace of one."""
    make_dataset(tmp_path)
    division = {"mode": mode, "num_learners": 2, "every": 1, "conquer_from": 2, "conquer_batches": "whole"}
    masks = {"masks": "sliced" if mode == "flat" else "learned"}
    model = dnc_dist.load(trained(tmp_path, tmp_path / "data", 0, division=division, schedule={"epochs": 3}, model=masks))
    assert model.num_learners == 2
    image = np.zeros((32, 32, 3), np.uint8)
    parts = [model.embed(image, learner=learner) for learner in range(2)]
    assert mode == "hierarchical" or not (parts[0] * parts[1]).any()
    with pytest.raises(InputError, match=r"learner=2: the model has 2 learner"):
        model.embed(image, learner=2)


def test_images_in_memory_may_be_shared_and_reused(run: Path, pictures: list[Path]) -> None:
    """One opened file many times, and makers of images that use one buffer or one object for all."""
    model, arrays = dnc_dist.load(run), [np.array(Image.open(path).convert("RGB")) for path in pictures[:4]] * 5
    expected = model.embed(arrays)

    def in_one_buffer() -> Iterator[np.ndarray]:
        buffer = np.empty_like(arrays[0])
        for array in arrays:
            buffer[:] = array
            yield buffer

    def in_one_image() -> Iterator[Image.Image]:
        image = Image.new("RGB", arrays[0].shape[1::-1])
        for array in arrays:
            image.paste(Image.fromarray(array))
            yield image

    for made in (in_one_buffer(), in_one_image()):
        np.testing.assert_array_equal(model.embed(made), expected)
    once, *others = model.embed([Image.open(pictures[0])] * 16)
    np.testing.assert_array_equal(others, np.broadcast_to(once, (15, DIM)))


def test_the_subspace_of_a_learner(run: Path, pictures: list[Path]) -> None:
    model = dnc_dist.load(run)
    assert model.num_learners == 2
    masks = model.network.masks.level_masks(2).detach().relu().numpy()
    # The whole embedding is the raw one normalised, so that a mask on it gives the same direction.
    for learner in (0, 1):
        masked = model.embed(pictures[:5]) * masks[learner]
        expected = masked / np.linalg.norm(masked, axis=1, keepdims=True)
        np.testing.assert_allclose(model.embed(pictures[:5], learner=learner), expected, atol=4 * DIM * 2.0**-24)
    with pytest.raises(InputError, match=r"learner=2: the model has 2 learner\(s\)"):
        model.embed(pictures, learner=2)


def test_nothing_but_the_run_is_needed(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    expected = dnc_dist.load(run).embed(pictures[:3])
    copy = tmp_path / "elsewhere"
    shutil.copytree(run, copy)
    for name in ("metrics.jsonl", "divisions", "log.txt", "gallery.npz"):
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    text = (copy / "config.yaml").read_text()
    root = load_run_config(copy).data.root
    (copy / "config.yaml").write_text(text.replace(str(root), "/no/such/data").replace("weights: none", "weights: /no/such/weights.pth"))
    code = (
        "import sys; import dnc_dist; assert 'torch' not in sys.modules\n"
        "import numpy as np; model = dnc_dist.load(sys.argv[1]); np.save(sys.argv[2], model.embed(sys.argv[3:]))\n"
        "import torch.distributed; assert not torch.distributed.is_initialized()"
    )
    arguments = [str(copy), str(tmp_path / "found.npy"), *map(str, pictures[:3])]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    # The batch norm of given weights is frozen instead of global: in evaluation both use the running statistics.
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), expected)


def test_checkpoints_are_chosen_by_name(run: Path) -> None:
    tags = Checkpoints(run, 2).tags()
    assert dnc_dist.load(run).checkpoint == dnc_dist.load(run, checkpoint="last").checkpoint == tags[-1]
    older = dnc_dist.load(run, checkpoint=tags[0])
    assert older.checkpoint == tags[0] and older.fingerprint != dnc_dist.load(run).fingerprint
    assert dnc_dist.load(run).fingerprint == dnc_dist.load(run).fingerprint
    with pytest.raises(InputError, match="has no checkpoint step-1; it has step-"):
        dnc_dist.load(run, checkpoint="step-1")


def test_what_is_no_image_is_refused_by_name(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    model = dnc_dist.load(run)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(pictures[0].read_bytes()[:-300])
    with pytest.raises(InputError, match=r"broken.jpg is no image that can be read: OSError: .*; leave it out, or give unreadable=\"nan\""):
        model.embed([pictures[0], broken])

    def endless() -> Iterator[Path]:
        yield broken
        while True:
            yield pictures[0]

    with pytest.raises(InputError, match=r"broken.jpg is no image that can be read"):
        model.embed(endless())  # at once, and not when all others are done
    found = model.embed([pictures[0], broken, tmp_path / "none.jpg", pictures[1]], unreadable="nan")
    assert np.isnan(found).any(1).tolist() == [False, True, True, False]
    np.testing.assert_array_equal(found[[0, 3]], model.embed([pictures[0], pictures[0], pictures[0], pictures[1]])[[0, 3]])
    for wrong, message in (
        ([pictures[0], 3], "image 1 is int; give paths, PIL images or arrays"),
        (np.zeros((SIZE, SIZE)), r"image 0 is an array \(16, 16\) of float64"),
        (torch.zeros(3, SIZE, SIZE), "Tensor is no image"),
        (None, "NoneType is no image"),
    ):
        with pytest.raises(InputError, match=message):
            model.embed(wrong)
    with pytest.raises(InputError, match="holds no image"):
        (tmp_path / "empty").mkdir()
        model.embed(tmp_path / "empty")
    with pytest.raises(InputError, match="is no run directory"):
        dnc_dist.load(tmp_path)


def test_progress_is_written_only_if_asked_for(run: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = dnc_dist.load(run)
    model.embed(pictures)
    assert capsys.readouterr() == ("", "")
    model.embed(pictures, progress=True)
    assert f"embedding: {len(pictures)}/{len(pictures)} img" in capsys.readouterr().err
