"""Arrays and tensors in files that may come from elsewhere, read as ``foreign`` reads other bytes."""

from __future__ import annotations

import errno
import math
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import read_bytes, shorten

if TYPE_CHECKING:
    import numpy as np

MOST_UNPACKED = 1 << 32
"""Arrays beyond this size are none of ours: a division of a billion images fits."""


class Array(NamedTuple):
    """What an array of a file has to be: kinds of its dtype (as ``numpy.dtype.kind``), dimensions, and whether it has to be there."""

    kinds: str
    ndim: int
    required: bool = True


@contextmanager
def reading(path: Path, cure: str = "") -> Iterator[None]:
    """Where a library reads foreign bytes, which make it raise almost anything: that becomes an InputError.

    What the machine refuses (memory, a disk that fails, a shared folder that is gone) says nothing of the bytes, and stays what it is.

    Raises:
        InputError: the file is missing, or damaged.
        OSError, MemoryError: the machine's; an OSError names the file.
    """
    if not path.is_file():
        read_bytes(path)  # says why
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):  # "can't allocate", "Cannot allocate": libraries' own words for it
            raise MemoryError(_brief(error)) from error
        # What keeps zipfile from finding an archive's end is behind its own error.
        failure = error.__context__ if isinstance(error, zipfile.BadZipFile) else error
        # Bytes that lead to a place before the file's beginning are no failure of the disk, nor is what a library says without a number.
        if isinstance(failure, OSError) and failure.errno not in (None, errno.EINVAL):
            failure.filename = failure.filename or str(path)
            raise failure from None
        raise InputError(f"{path} is damaged ({_brief(error)}){f'; {cure}' if cure else ''}") from error


def read_arrays(path: Path, shapes: Mapping[str, Array], cure: str = "", most: int = MOST_UNPACKED) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file that unpacks to at most ``most`` bytes. No object is unpickled.

    Raises:
        InputError: it is missing or damaged, or an array is missing or of another kind.
        OSError, MemoryError: as of ``reading``.
    """
    with reading(path, cure), zipfile.ZipFile(path) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        if (size := sum(sizes.values())) > most:
            tail = f"; {cure}" if cure else ""
            raise InputError(f"{path} unpacks to {size:,} bytes, at most {most:,} are read; it is not what it should be{tail}")
        names = {name: f"{name}.npy" for name, shape in shapes.items() if shape.required or f"{name}.npy" in sizes}
        found = {name: _read_array(archive, member) for name, member in names.items()}
    check_arrays(found, shapes, path, cure)
    return found


def _read_array(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    """An array, for which no memory is taken before it is known to be there."""
    from numpy.lib import format as npy  # only here: a command that prints help or a configuration does without

    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    with archive.open(member) as file:
        shape, _, dtype = read_header[npy.read_magic(file)](file)
        size = archive.getinfo(member).file_size
        if math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"{member}: an array {shape} of {dtype} in {size:,} bytes")
        file.seek(0)
        array: np.ndarray = npy.read_array(file, allow_pickle=False)
    return array


def check_arrays(found: Mapping[str, np.ndarray], shapes: Mapping[str, Array], source: str | Path, cure: str = "") -> None:
    """Refuse arrays that are not what they should be.

    Raises:
        InputError: an array has another type or number of dimensions.
    """
    import numpy as np

    tail = f"; {cure}" if cure else ""
    for name, array in found.items():
        kinds, ndim, _ = shapes[name]
        # Items of no bytes could be any number of them.
        if array.dtype.kind not in kinds or array.ndim != ndim or not array.dtype.itemsize:
            raise InputError(f"{source} is damaged: {name} is an array of {array.dtype} with {array.ndim} dimension(s){tail}")
        if array.dtype.kind == "U" and array.size:
            codes = np.frombuffer(array.tobytes(), np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
            if codes.max() > sys.maxunicode:
                raise InputError(f"{source} is damaged: {name} holds numbers that are no characters{tail}")


def read_tensors(path: Path, cure: str = "", *, mapped: bool = False) -> Any:
    """What ``torch.save`` wrote: tensors, numbers and text in lists and dictionaries. No object is unpickled.

    Args:
        path: the file.
        cure: what the user can do about a damaged one.
        mapped: leave the tensors' bytes on disk until they are used.

    Raises:
        InputError: it is missing, or holds something else.
        OSError, MemoryError: as of ``reading``.
    """
    import torch  # 1.5 s: commands that read no tensors do without

    tail = f"; {cure}" if cure else ""
    with reading(path, cure):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(member.file_size != member.compress_size for member in archive.infolist()):
                    raise InputError(f"{path} is compressed, as torch never writes it; it is not what it should be{tail}")
        try:
            found = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        except pickle.UnpicklingError:
            raise InputError(
                f"{path} holds something else than tensors, numbers and text; it could run code and is not read{tail}"
            ) from None
    waiting, seen = [found], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            # A tensor of another kind has no bytes, and one that repeats its bytes may have any size.
            if (
                value.layout != torch.strided
                or value.device.type != "cpu"
                or value.is_quantized
                or value.nbytes > value.untyped_storage().nbytes()
            ):
                raise InputError(f"{path} is damaged: it holds a sparse, quantized or expanded tensor{tail}")
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return found


def read_column(path: Path, kind: Array, cure: str = "") -> np.ndarray:
    """The array of an .npy file, mapped instead of read. No object is unpickled.

    Raises:
        InputError: it is missing, or is an array of another kind.
        OSError, MemoryError: as of ``reading``.
    """
    import numpy as np

    with reading(path, cure):
        array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype.kind not in kind.kinds or array.ndim != kind.ndim or not array.dtype.itemsize:
        tail = f"; {cure}" if cure else ""
        raise InputError(f"{path} is damaged: an array of {array.dtype} with {array.ndim} dimension(s){tail}")
    return array


def _brief(error: BaseException) -> str:
    """An error of a library, on one line."""
    lines = str(error).strip().splitlines()
    return shorten(lines[0], 200).strip("'\"") if lines else type(error).__name__
