"""What the first launch of a Triton kernel needs besides a GPU: a C compiler, Python's headers, and a private cache folder.

Triton builds its launcher as an extension of Python at the first launch. It loads the launcher and every kernel from its cache.
"""

from __future__ import annotations

import os
import shutil
import stat
import sysconfig
import tempfile
from pathlib import Path

import torch

CACHE_VARIABLE = "TRITON_CACHE_DIR"


def compiler() -> str | None:
    """The C compiler that Triton takes here: CC, else gcc, else clang; None if there is none."""
    named = os.environ.get("CC")
    return shutil.which(named) if named is not None else shutil.which("gcc") or shutil.which("clang")


def python_header() -> Path:
    """Where Triton's compiler looks for Python.h, which may not be there."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder that no package fills.
    return Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]) / "Python.h"


def missing() -> str | None:
    """What Triton lacks here to build its launcher, and how to get it; None if nothing is missing."""
    if compiler() is None:
        named = os.environ.get("CC")
        lack = "there is no C compiler (gcc or clang)" if named is None else f"CC={named} is no program"
        return f"{lack}; install gcc, or set CC to a C compiler"
    if not (header := python_header()).is_file():
        return f"Python's headers are not installed ({header} does not exist); install python3-dev, or use a Python that brings them"
    return None


def cache_folder() -> Path:
    """Where Triton keeps compiled kernels: TRITON_CACHE_DIR, or below TRITON_HOME, else this user's folder for temporary files.

    Triton's own default is below the home folder. This is not: the machines of a cluster share homes, and network file systems
    are slow with many small files and show renamed ones late.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    if home := os.environ.get("TRITON_HOME"):
        return Path(home) / ".triton" / "cache"
    return Path(tempfile.gettempdir()) / f"dnc-dist-triton-{os.getuid()}"


def use_cache_folder() -> None:
    """Let Triton use ``cache_folder``, which is made if nobody has chosen another one.

    Raises:
        RuntimeError: the folder cannot be made, or others can write to it; its files are executed.
    """
    if os.environ.get(CACHE_VARIABLE) or os.environ.get("TRITON_HOME"):
        return
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise RuntimeError(f"{folder} for compiled kernels cannot be made ({error.strerror}); set {CACHE_VARIABLE} to a folder") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RuntimeError(
            f"{folder} for compiled kernels is not a folder that this user alone can use; remove it, or set {CACHE_VARIABLE} to another one"
        )
    os.environ[CACHE_VARIABLE] = str(folder)


def check_launch(device: torch.device) -> None:
    """Compile and launch a tiny kernel on this device, as the first step of a run will.

    Raises:
        RuntimeError: Triton cannot; says what is missing and what to do.
    """
    use_cache_folder()
    try:
        from dnc_kernels.probe import add_one

        added = add_one(torch.zeros(3, device=device)).tolist()
    except Exception as error:  # compilers, linkers, drivers and file systems fail in their own ways
        reason = missing() or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise RuntimeError(f"Triton cannot launch a kernel on {device}: {reason}; DNC_KERNELS=reference does without Triton") from error
    if added != [1.0, 1.0, 1.0]:
        raise RuntimeError(f"Triton computes 0 + 1 = {added} on {device}: look at the driver; DNC_KERNELS=reference does without Triton")
