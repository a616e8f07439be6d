"""Where the main thread of this process is, for a reader who knows the project, and whether it waits for other ranks there."""

from __future__ import annotations

import linecache
import re
import sys
import threading
from pathlib import Path
from types import FrameType

_COLLECTIVES = ("torch.distributed", "deepspeed.comm")
# Host code that on a GPU takes long only when the device does, since launches queue up behind a collective that waits.
_LAUNCHING = ("torch", "deepspeed", "triton.runtime", "triton.backends")
_NOT_LAUNCHING = ("torch.utils.data", "torch.multiprocessing", "torch._inductor", "torch._dynamo")
# Reading a value from the device waits for all that was launched before.
_READING = re.compile(r"\.(item|tolist|cpu|numpy|synchronize)\(|\b(bool|float|int)\(")


def remember_sources() -> None:
    """Read the project's source files now: later their file system may be what hangs."""
    for name, module in list(sys.modules.items()):
        if _inside(name, ("dnc_dist",)) and module.__file__:
            linecache.getlines(module.__file__)


def main_thread(on_gpu: bool) -> tuple[str, bool]:
    """Where the main thread is (see ``place``); for other threads to ask."""
    main = threading.main_thread().ident
    assert main is not None
    return place(sys._current_frames()[main], on_gpu)


def place(innermost: FrameType, on_gpu: bool) -> tuple[str, bool]:
    """Where a thread is in this project's code, and whether it waits there for others: in a collective, or for the GPU.

    A GPU runs behind the host; so a collective that waits for a rank shows as a host that waits for its GPU.
    """
    frames = [innermost]
    while (caller := frames[-1].f_back) is not None:
        frames.append(caller)
    ours = [frame for frame in frames if _inside(_module(frame), ("dnc_dist",))] or frames[:1]
    collective = next((frame.f_code.co_name for frame in frames if _module(frame) == "torch.distributed.distributed_c10d"), "")
    if any(_inside(_module(frame), _COLLECTIVES) for frame in frames):
        # Whoever wants a collective calls ``distributed``, so that frame says nothing.
        caller = next((frame for frame in ours if _module(frame) != "dnc_dist.processes.distributed"), ours[0])
        return f"{_name(caller)} ({collective or 'a collective'})", True
    if on_gpu and _waits_for_device(innermost):
        return f"{_name(ours[0])} (waiting for the GPU)", True
    inner = "" if innermost is ours[0] else f" ({_name(innermost)})"
    return f"{_name(ours[0])}{inner}", False


def _waits_for_device(frame: FrameType) -> bool:
    module = _module(frame)
    if _inside(module, ("dnc_dist",)):
        # From what was remembered only, without a look at the file.
        lines = linecache.cache.get(frame.f_code.co_filename, (0, None, [], ""))[2]  # type: ignore[misc]
        return frame.f_lineno <= len(lines) and bool(_READING.search(lines[frame.f_lineno - 1]))
    return _inside(module, _LAUNCHING) and not _inside(module, _NOT_LAUNCHING)


def _inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _name(frame: FrameType) -> str:
    """``dnc_dist/data/stream.py:120 load``."""
    parts, top = Path(frame.f_code.co_filename).parts, _module(frame).partition(".")[0]
    start = len(parts) - 1 - parts[::-1].index(top) if top in parts else len(parts) - 1
    return f"{'/'.join(parts[start:])}:{frame.f_lineno} {frame.f_code.co_name}"
