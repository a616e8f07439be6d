"""What an offline run of W&B holds: its files, in the order in which `wandb sync` sends them, read by W&B's own message definitions.

A ``.wandb`` file is a log in LevelDB's format: after a header of 7 bytes, blocks of 32 KiB with records that have a checksum, a length
and a type (whole, first, middle, last part).
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _HEAD = 1 << 15, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _messages(path: Path) -> Iterator[bytes]:
    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B", path
    while at + _HEAD <= len(data):
        if _BLOCK - at % _BLOCK < _HEAD:
            at += _BLOCK - at % _BLOCK
            continue
        checksum, length, kind = int.from_bytes(data[at : at + 4], "little"), int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part = data[at + _HEAD : at + _HEAD + length]
        if kind == 0 or len(part) < length:
            return  # what a kill has left of the last record
        assert checksum == zlib.crc32(part, zlib.crc32(bytes([kind]))), f"{path}: a record is damaged"
        at += _HEAD + length
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            yield parts


@dataclass
class OfflineRun:
    """All processes of one run."""

    files: list[Path]
    steps: list[int] = field(default_factory=list)
    """W&B's own number of each row."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    tags: set[tuple[str, ...]] = field(default_factory=set)
    media: set[str] = field(default_factory=set)
    """Files beside the log, below ``files/``."""

    def kinds(self) -> list[tuple[str, int]]:
        """Kind and step of each row that is a line of ``metrics.jsonl``."""
        found = []
        for row in self.rows:
            names = {name.removeprefix("debug/").partition("/")[0] for name in row}
            kind = names & {"train", "division", "evaluation", "epoch"}
            # "epoch" is a value of every line, too.
            kind = kind - {"epoch"} or kind
            if kind and "epoch" in row:
                found.append((*kind, row["step"]))
        return found


def _items(items: Any) -> dict[str, Any]:
    """Names and values; what a dict holds comes as single items with a path."""
    found: dict[str, Any] = {}
    for item in items:
        *path, last = [item.key] if item.key else item.nested_key
        inside = found
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = json.loads(item.value_json)
    return found


def _files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    for message in _messages(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        yield record


def read_finished_run(run_dir: Path, seconds: float = 30.0) -> OfflineRun:
    """What W&B was given, once the newest file is whole: W&B's service may write its last records a moment after ``finish`` returned."""
    end = time.monotonic() + seconds
    while not (files := _files(run_dir)) or not any(record.WhichOneof("record_type") == "exit" for record in _records(files[-1])):
        assert time.monotonic() < end, f"W&B's run in {run_dir} has no end after {seconds:g} s"
        time.sleep(0.1)
    return read_offline_runs(run_dir)


def read_offline_runs(run_dir: Path) -> OfflineRun:
    """Everything that W&B was given in this run directory."""
    run = OfflineRun(_files(run_dir))
    for path in run.files:
        run.media |= {str(file.relative_to(path.parent / "files")) for file in (path.parent / "files").rglob("*") if file.is_file()}
        for record in _records(path):
            match record.WhichOneof("record_type"):
                case "history":
                    values = _items(record.history.item)
                    run.steps.append(record.history.step.num)
                    run.rows.append({name: value for name, value in values.items() if not name.startswith("_")})
                case "summary":
                    run.summary |= _items(record.summary.update)
                case "run":
                    run.ids.add(record.run.run_id)
                    run.groups.add(record.run.run_group)
                    run.tags.add(tuple(record.run.tags))
                case "artifact":
                    run.artifacts.append(record.artifact)
    return run
