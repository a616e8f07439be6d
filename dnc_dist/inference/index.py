"""An index of embeddings for search: FAISS, by inner product of unit vectors, with the keys in a .json file beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import faiss
import numpy as np

from dnc_dist.base.errors import InputError
from dnc_dist.base.exact import squared_distance
from dnc_dist.base.files import replacing
from dnc_dist.base.foreign import parse_json, read_bytes
from dnc_dist.base.progress import Progress
from dnc_dist.embedder import Embedder
from dnc_dist.inference.table import MOST_KEY_BYTES, Keys, as_json, hash_of

Kind = Literal["flat", "ivf", "hnsw"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_MARGIN = 32
"""More candidates than are asked for, whose distances are computed again: FAISS's own are off by the rounding of their products."""
_ROWS_PER_CELL = 39
"""FAISS wants so many to find a cell's centre."""
_LEAST_CELLS = 8
_PART = 1 << 14  # rows added between two reports of progress
_LINKS, _BUILD_BREADTH, _SEARCH_BREADTH = 32, 200, 128
_AGAIN = "build it again with `dnc-dist index`"


@dataclass(frozen=True)
class IndexKeys:
    """What is beside an index: which file it belongs to (a hash of its bytes), its kind, its dimensions, and the keys of its rows."""

    file: str
    kind: Kind
    dim: int
    table: Keys


class Hits(NamedTuple):
    """The k nearest rows of each query, nearest first, ties by row; row -1 where there are no more.

    ``rows`` (Q, k) int64; ``similarity`` (Q, k) float64, the inner product of unit vectors (cosine).
    """

    rows: np.ndarray
    similarity: np.ndarray


def keys_file(path: Path) -> Path:
    """Where the keys of an index are."""
    return path.with_name(f"{path.name}.keys.json")


def build_index(path: Path, kind: Kind, keys: Keys, vectors: np.ndarray) -> None:
    """Write an index of the vectors (N, D), and its keys beside it.

    Args:
        path: the file.
        kind: "flat" compares with every row; "ivf" with those of the nearest of 4 sqrt(N) cells, a sixteenth of them but 8 at least; "hnsw"
            follows a graph of neighbours. The last two are for millions of rows, and may miss some.
        keys: of the rows.
        vectors: with norm 1.

    Raises:
        InputError: a folder of that name is there.
    """
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; give the name of a file")
    index = _empty_index(kind, vectors)
    with Progress(len(vectors) > _PART).phase("indexing", len(vectors), "rows") as phase:
        for first in range(0, len(vectors), _PART):
            index.add(part := vectors[first : first + _PART])
            phase.update(len(part))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(keys_file(path)) as beside, replacing(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
        file.flush()
        beside.write(as_json(IndexKeys(hash_of(Path(file.name)), kind, vectors.shape[1], keys)))


def _empty_index(kind: Kind, vectors: np.ndarray) -> Any:
    """An index that the vectors (N, D) can be added to; "ivf" has learned its cells from them."""
    rows, dim = vectors.shape
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = _BUILD_BREADTH, _SEARCH_BREADTH
        return graph
    cells = max(1, min(round(4 * rows**0.5), rows // _ROWS_PER_CELL))
    lists = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
    lists.nprobe = min(cells, max(_LEAST_CELLS, cells // 16))
    lists.train(vectors)
    return lists


class VectorIndex:
    """An index that was built. FAISS reads it: take one from those only whom you trust.

    Raises:
        InputError: it is missing or damaged, or its keys are those of another one.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            read_bytes(path)  # says why
        place = keys_file(path)
        if not place.is_file():
            raise InputError(f"{path} is no index of `dnc-dist index`: {place} is missing; build one from a file of embeddings")
        self.path, self.keys = path, parse_json(read_bytes(place, MOST_KEY_BYTES), IndexKeys, place, _AGAIN)
        if hash_of(path) != self.keys.file:
            raise InputError(f"{path} is damaged, or {place} belongs to another index; {_AGAIN}")
        try:
            self._index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise InputError(f"{path} cannot be read by FAISS ({str(error).splitlines()[0]}); {_AGAIN}") from error
        if self._index.ntotal != len(self.keys.table) or self._index.d != self.keys.dim:
            raise InputError(f"{path} is damaged: {self._index.ntotal} rows and {len(self.keys.table)} keys; {_AGAIN}")
        if self.keys.kind == "ivf":
            # Which row is where: needed to get vectors back.
            self._index.make_direct_map()  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.keys.table)

    def check(self, model: Embedder) -> None:
        """Refuse a model whose embeddings mean something else than those of the index.

        Raises:
            InputError: it is another one than the index was made with.
        """
        origin = self.keys.table.origin
        if origin.model != model.fingerprint:
            raise InputError(
                f"{self.path} holds {self.keys.dim} dimensions of {origin.run}, {origin.checkpoint}; {model.source}, {model.checkpoint} "
                f"({model.dim} dimensions) is another model, whose embeddings cannot be compared with those. "
                "Search with that run and checkpoint, or embed and index the images again with this one"
            )

    def search(self, queries: np.ndarray, k: int) -> Hits:
        """The nearest rows of each query.

        FAISS proposes more than k, and these are put in order by distances without the rounding of its products: an image that is in the
        index is found first, with distance 0, as far as its embedding has the same digits.

        Args:
            queries: (Q, D) float32 with norm 1.
            k: how many.
        """
        if not len(queries):
            return Hits(np.empty((0, k), np.int64), np.empty((0, k)))
        _, candidates = self._index.search(np.ascontiguousarray(queries, np.float32), min(k + _MARGIN, len(self)))
        rows = np.full((len(queries), k), -1, np.int64)
        similarity = np.full((len(queries), k), -np.inf)
        for at, found in enumerate(candidates):
            known = np.sort(found[found >= 0])
            distance = squared_distance(queries[at], self._index.reconstruct_batch(known))
            first = np.argsort(distance, kind="stable")[:k]
            rows[at, : len(first)], similarity[at, : len(first)] = known[first], 1 - distance[first] / 2
        return Hits(rows, similarity)
