"""The network as ONNX, compared with torch before anybody gets it."""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.rng import numpy_generator
from dnc_dist.embedder import Embedder
from dnc_dist.engine.network import EmbeddingNetwork

INPUT, OUTPUT = "pixels", "embedding"
MOST_DIFFERENCE = 1e-3
"""Of a coordinate of a unit vector; rounding in fp32 stays far below, another operator does not."""
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_BATCHES = (1, 2, 7)


class _Graph(nn.Module):
    """Normalised pixels (B, 3, S, S) float32 -> unit embeddings (B, D)."""

    def __init__(self, network: EmbeddingNetwork) -> None:
        super().__init__()
        self.backbone, self.head, self.masks = network.backbone, network.head, network.masks

    def forward(self, pixels: Tensor) -> Tensor:
        return self.masks.whole(self.head(self.backbone(pixels)))


def check_packages() -> None:
    """Refuse to begin where something is missing.

    Raises:
        InputError: names the packages.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"--onnx needs {', '.join(missing)}, which is not installed: pip install 'dnc-dist[onnx]'")


def onnx_bytes(model: Embedder) -> tuple[bytes, float]:
    """The network from normalised pixels to embeddings as an ONNX file of any batch size, and how far onnxruntime is from torch.

    The difference is the largest of any coordinate, on random pixels in batches of several sizes, both in fp32 on the CPU.

    Raises:
        RunError: the network cannot be written as ONNX, or computes something else there.
    """
    import onnxruntime

    # The model's own may be on a GPU.
    graph = _Graph(copy.deepcopy(model.network).cpu()).eval()
    content = _exported(graph, model.cfg.data.image_size)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    generator = numpy_generator(0, "onnx")
    largest = 0.0
    for rows in _BATCHES:
        pixels = generator.standard_normal((rows, 3, model.cfg.data.image_size, model.cfg.data.image_size)).astype(np.float32)
        with torch.inference_mode():
            expected = graph(torch.from_numpy(pixels)).numpy()
        (found,) = session.run([OUTPUT], {INPUT: pixels})
        if found.shape != expected.shape:
            raise RunError(f"the ONNX model gives {found.shape} for {rows} images instead of {expected.shape}; nothing was written")
        largest = max(largest, float(np.abs(found - expected).max()))
    if not largest <= MOST_DIFFERENCE:
        raise RunError(
            f"the ONNX model differs from this one by {largest:.1e} in a coordinate, more than {MOST_DIFFERENCE:.0e}; it was not written"
        )
    return content, largest


def _exported(graph: _Graph, size: int) -> bytes:
    # Its notes concern those who write exporters.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    # Two images: a single one would be taken for a batch that is always 1.
    example = torch.zeros(2, 3, size, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"torch cannot write this network as ONNX ({reason}); without --onnx the export works") from error
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content
