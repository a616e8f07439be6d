"""Whether the FAISS that is installed searches, and whether it finds on a GPU what it finds on the CPU.

``python -m dnc_dist.retrieval.faiss_check N`` searches on GPU number N: in a process of its own, as FAISS ends the one in which a
call of CUDA fails.
"""

from __future__ import annotations

import subprocess
import sys

import faiss
import numpy as np

from dnc_dist.base.errors import InputError

_ROWS, _DIM, _NEAREST = 256, 32, 8
_MOST_SECONDS = 120.0


def faiss_note(gpu: int | None) -> str:
    """Search on the CPU, and on the GPU of this number if there is one and FAISS is built for it; what searched, in a few words.

    Raises:
        InputError: a search failed, or found something else than what is near.
    """
    rows, expected = _example()
    _compare("the CPU", faiss.knn(rows, rows, _NEAREST)[0], expected)
    if not hasattr(faiss, "StandardGpuResources"):
        return "on the CPU, as FAISS is built without GPUs"
    if gpu is None:
        return "on the CPU; FAISS is built for GPUs, too"
    if faiss.get_num_gpus() <= gpu:
        raise InputError(
            f"FAISS sees {faiss.get_num_gpus()} GPU(s), torch has number {gpu}; update the driver, or install faiss-cpu instead"
        )
    try:
        command = [sys.executable, "-m", __name__, str(gpu)]
        subprocess.run(command, capture_output=True, text=True, timeout=_MOST_SECONDS, check=True)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"FAISS does not come back from GPU {gpu} within {_MOST_SECONDS:.0f} s; look at the driver") from error
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise InputError(f"FAISS cannot search on GPU {gpu} ({why}); update the driver, or install faiss-cpu instead") from error
    return "on the GPU, the same as on the CPU"


def _search_on(gpu: int) -> None:
    rows, expected = _example()
    resources = faiss.StandardGpuResources()
    resources.noTempMemory()  # it would reserve 1.5 GB
    _compare(f"GPU {gpu}", faiss.knn_gpu(resources, rows, rows, _NEAREST, device=gpu)[0], expected)


def _example() -> tuple[np.ndarray, np.ndarray]:
    """Rows, and the squared distances of each to the nearest ones.

    Whole numbers up to 15: all products and sums are exact in float32 and in TF32, in any order.
    """
    rows = np.random.default_rng(0).integers(0, 16, (_ROWS, _DIM)).astype(np.float32)
    return rows, np.sort(np.square(rows[:, None] - rows).sum(2), axis=1)[:, :_NEAREST]


def _compare(place: str, distance: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(distance, expected):
        wrong = int((distance != expected).any(1).sum())
        raise InputError(f"FAISS on {place} finds wrong neighbours for {wrong} of {_ROWS} rows; install it anew")


if __name__ == "__main__":
    _search_on(int(sys.argv[1]))
