"""A model without its run: loaded as the run is, and as ONNX."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dnc_dist
from dnc_dist.base.files import replacing
from dnc_dist.inference import export as inference_export
from tests.inference_fixtures import CLASSES, DIM, PER_CLASS, refused, run, two_runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_runs(tmp_path_factory)


def test_an_export_is_loaded_as_the_run_is(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    assert run("export", place / "runs/one", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
    original, model = dnc_dist.load(place / "runs/one"), dnc_dist.load(out)
    images = sorted((place / "pictures/test").rglob("*.png"))
    np.testing.assert_array_equal(model.embed(images), original.embed(images))
    np.testing.assert_array_equal(model.features(images), original.features(images))
    assert model.fingerprint == original.fingerprint and (model.checkpoint, model.epoch) == (original.checkpoint, 1)
    assert not [text for text in (str(place), "cache-of-this-machine") if text in (out / "config.yaml").read_text()]
    assert str(place) not in (out / "README.md").read_text()
    assert original.state is not None
    text = (out / "README.md").read_text()
    assert f"| recall@1 | {original.state.metrics['recall@1']:.4f} |" in text and "protocol `leave-one-out`" in text
    assert f"train: {CLASSES * PER_CLASS} images of {CLASSES} classes" in text and "| loss | margin |" in text
    # It takes the place of the run in every command, also for an index that was made with the run.
    capsys.readouterr()
    assert run("search", out, images[0], "--index", place / "all.index", "--top", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(images[0])
    assert run("export", out, "--out", out.with_name("again")) == 0
    assert dnc_dist.load(out.with_name("again")).fingerprint == original.fingerprint
    # Again into the same folder; but into no other.
    assert run("export", place / "runs/one", "--out", out) == 0
    assert "which no export has" in refused(capsys, "export", place / "runs/one", "--out", place / "runs/one")
    assert "is a file; give a folder" in refused(capsys, "export", place / "runs/one", "--out", place / "one.yaml")
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-100])
    assert "model.safetensors is damaged" in refused(capsys, "export", out, "--out", tmp_path / "third")


def test_an_export_that_cannot_be_written_leaves_the_one_before(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    assert run("export", place / "runs/one", "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*given: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(inference_export, "replacing", lambda path: full() if path.name == "README.md" else replacing(path))
        assert run("export", place / "runs/two", "--out", out) == 1
    with monkeypatch.context() as patch:  # a network disk says so as late as here
        patch.setattr(os, "fsync", full)
        assert run("export", place / "runs/two", "--out", out) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run("export", out, "--out", out) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_onnx_computes_the_same(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime
    import torch

    assert run("export", place / "runs/one", "--out", tmp_path / "model", "--onnx") == 0
    told = re.search(r"largest difference from torch in a coordinate ([0-9.e-]+)", capsys.readouterr().out)
    assert told is not None and float(told[1]) < 1e-3
    model = dnc_dist.load(tmp_path / "model")
    session = onnxruntime.InferenceSession(str(tmp_path / "model/model.onnx"), providers=["CPUExecutionProvider"])
    images = sorted((place / "pictures/test").rglob("*.png"))
    for some in (images[:1], images):
        # Prepared as the card says.
        data = model.cfg.data
        raw = np.stack([np.asarray(Image.open(path).convert("RGB").resize((data.image_size, data.image_size))) for path in some])
        pixels = ((raw.astype(np.float32) / 255 - np.float32(data.mean)) / np.float32(data.std)).transpose(0, 3, 1, 2)
        (found,) = session.run(["embedding"], {"pixels": np.ascontiguousarray(pixels)})
        np.testing.assert_allclose(found, model.embed(list(raw)), atol=5 * 128 * 9 * 2.0**-24)
    assert "model.onnx" in (tmp_path / "model/README.md").read_text() and isinstance(torch.__version__, str)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "masks", "size"), [("conv4", "sliced", 32), ("resnet18", "fixed", 64), ("vit_tiny_patch16_224", "learned", 224)]
)
def test_onnx_of_other_networks(tmp_path: Path, backbone: str, masks: str, size: int) -> None:
    pytest.importorskip("onnxruntime")
    import torch

    from dnc_dist.embedder import Embedder, Exported
    from dnc_dist.engine.network import build_network
    from dnc_dist.inference.onnx import onnx_bytes
    from tests.engine_fixtures import config

    changes = {"backbone": backbone, "masks": masks, "embedding_dim": DIM, "batch_norm": "frozen"}
    mode = "flat" if masks == "sliced" else "hierarchical"
    cfg = config(tmp_path, tmp_path / "run", model=changes, data={"image_size": size}, division={"num_learners": 4, "mode": mode})
    network = build_network(cfg, initial_weights=False)
    model = Embedder(network, cfg, tmp_path, Exported("run", "step-00000001", 0, 4), torch.device("cpu"), None)
    content, difference = onnx_bytes(model)
    assert content and 0 <= difference < 1e-4


def test_without_its_packages_onnx_says_what_to_install(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dnc_dist.inference import onnx

    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    message = refused(capsys, "export", place / "runs/one", "--out", tmp_path / "model", "--onnx")
    assert "--onnx needs onnx, onnxscript, onnxruntime" in message and "pip install 'dnc-dist[onnx]'" in message
    assert not (tmp_path / "model").exists()
