"""Files of embeddings: Parquet, or .npy with the keys in a .json file beside it. Both say which model made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dnc_dist.base.arrays import Array, read_column, reading
from dnc_dist.base.errors import InputError
from dnc_dist.base.files import replacing
from dnc_dist.base.foreign import parse_json, read_bytes

SUFFIXES = (".parquet", ".npy")
MOST_KEY_BYTES = 1 << 34
"""Of a file of keys: those of ten million images."""
_AGAIN = "write it again with `dnc-dist embed`"
_METADATA = b"dnc_dist"
_ROWS_IN_GROUP = 1 << 14
_COLUMNS = {"key": pa.string(), "path": pa.string(), "class": pa.string(), "label": pa.int64()}


@dataclass(frozen=True)
class Origin:
    """What made embeddings: the model's fingerprint, run and checkpoint, and the images that it could not read (key, why)."""

    model: str
    run: str
    checkpoint: str
    unreadable: list[tuple[str, str]]


@dataclass(frozen=True)
class Keys:
    """What is known of each embedding, row by row; None where it is not known. ``paths`` are absolute."""

    origin: Origin
    keys: list[str]
    paths: list[str | None]
    classes: list[str | None]
    labels: list[int | None]

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.paths) == len(self.classes) == len(self.labels):
            raise ValueError("not as many keys as paths, classes and labels")

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class ArrayKeys:
    """What is beside an .npy file: which file it belongs to (see ``hash_of``), and the keys of its rows."""

    file: str
    table: Keys


def hash_of(path: Path) -> str:
    """A hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_place(out: Path) -> None:
    """Refuse a name that no file of embeddings can have.

    Raises:
        InputError: another ending, or a folder is there.
    """
    if out.suffix not in SUFFIXES:
        raise InputError(f"--out {out} does not end in {' or '.join(SUFFIXES)}; the ending says what is written")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give the name of a file")


def keys_file(out: Path) -> Path:
    """Where the keys of an .npy file are."""
    return out.with_suffix(".keys.json")


def as_json(keys: Any) -> bytes:
    """A dataclass of keys as it is written beside a file; what is no UTF-8 is written with backslashes."""
    return json.dumps(asdict(keys), ensure_ascii=False, indent=0).encode("utf-8", "backslashreplace")


def write_table(out: Path, keys: Keys, dim: int, blocks: Iterable[np.ndarray]) -> None:
    """Write a file of embeddings, one block (n, D) of rows after the other: the whole file is there at the end, or the one before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npy":
        # Both take their places at the end, one right after the other; should only one get there, the hash tells.
        with replacing(keys_file(out)) as beside, replacing(out) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(keys), dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks:
                file.write(np.ascontiguousarray(block, "<f4").tobytes())
            file.flush()
            beside.write(as_json(ArrayKeys(hash_of(Path(file.name)), keys)))
        return
    schema = pa.schema([*_COLUMNS.items(), ("embedding", pa.list_(pa.float32(), dim))])
    schema = schema.with_metadata({_METADATA: json.dumps(asdict(keys.origin), ensure_ascii=False)})
    columns = {"key": keys.keys, "path": keys.paths, "class": keys.classes, "label": keys.labels}
    with replacing(out) as file, pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["class"]) as writer:
        for start, block in _row_groups(blocks):
            rows = slice(start, start + len(block))
            arrays = [pa.array(columns[name][rows], kind) for name, kind in _COLUMNS.items()]  # type: ignore[index]
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1), pa.float32()), dim)
            writer.write_table(pa.table([*arrays, vectors], schema=schema))


def _row_groups(blocks: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Larger blocks, each with the row that it begins at: readers of Parquet like few groups."""
    start, waiting = 0, []
    for block in blocks:
        waiting.append(block)
        if (rows := sum(map(len, waiting))) >= _ROWS_IN_GROUP:
            yield start, np.concatenate(waiting)
            start, waiting = start + rows, []
    if waiting:
        yield start, np.concatenate(waiting)


def read_table(path: Path) -> tuple[Keys, np.ndarray]:
    """The keys and vectors (N, D) float32 of a file of embeddings.

    Raises:
        InputError: it cannot be read, or is no file of embeddings.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} is no file of embeddings: those end in {' or '.join(SUFFIXES)}, as `dnc-dist embed` writes them")
    keys, vectors = _read_npy(path) if path.suffix == ".npy" else _read_parquet(path)
    if vectors.ndim != 2 or len(vectors) != len(keys) or not len(keys):
        raise InputError(f"{path} is damaged: {len(keys)} keys and an array {vectors.shape}; {_AGAIN}")
    if not np.isfinite(vectors).all():
        raise InputError(f"{path} is damaged: it holds numbers that are not finite; {_AGAIN}")
    return keys, vectors


def _read_npy(path: Path) -> tuple[Keys, np.ndarray]:
    vectors = read_column(path, Array("f", 2), _AGAIN)
    place = keys_file(path)
    beside = parse_json(read_bytes(place, MOST_KEY_BYTES), ArrayKeys, place, _AGAIN)
    if hash_of(path) != beside.file:
        raise InputError(f"{path} is damaged, or {place} belongs to another file; {_AGAIN}")
    return beside.table, np.array(vectors, np.float32)


def _read_parquet(path: Path) -> tuple[Keys, np.ndarray]:
    with reading(path, _AGAIN):
        table = pq.read_table(path, memory_map=True)
    kinds = {field.name: field.type for field in table.schema}
    vectors = kinds.pop("embedding", None)
    text = (table.schema.metadata or {}).get(_METADATA)
    if kinds != _COLUMNS or text is None or not pa.types.is_fixed_size_list(vectors) or vectors.value_type != pa.float32():
        raise InputError(f"{path} was not written by `dnc-dist embed`; {_AGAIN}")
    column = table["embedding"].combine_chunks()
    if column.null_count or table["key"].null_count:
        raise InputError(f"{path} is damaged: a row has no key or no embedding; {_AGAIN}")
    found = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), vectors.list_size)
    keys = (table[name].to_pylist() for name in _COLUMNS)
    return Keys(parse_json(text, Origin, path, _AGAIN), *keys), np.ascontiguousarray(found)
