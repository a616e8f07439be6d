"""Where ``module:Class`` is found: among installed packages, beside the configuration, or in the working directory."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import shorten

_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_folders: list[Path] = []


def search_in(folder: Path) -> None:
    """Look for the modules of ``module:Class`` in this folder, too, after the installed packages and before the working directory."""
    if (folder := folder.absolute()) not in _folders:
        _folders.insert(0, folder)


def find(address: str) -> Any:
    """What ``module:Class`` names, imported now.

    Raises:
        InputError: no such module or class.
    """
    if not _CLASS.fullmatch(address):
        raise InputError(f"{shorten(address)} is no module:Class; write for example my_package.my_module:MyClass")
    module_name, class_name = address.split(":")
    module = importlib.import_module(module_name) if address.startswith("dnc_dist.") else _foreign(module_name)
    cls = getattr(module, class_name, None)
    if cls is None:
        classes = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module_name]
        close = difflib.get_close_matches(class_name, classes, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(classes) or 'no class'}"
        raise InputError(f"the module {module_name} ({getattr(module, '__file__', None)}) has no class {class_name}; {hint}")
    return cls


def _foreign(name: str) -> Any:
    """A module of the user's, from wherever Python finds it, from ``search_in`` or from the working directory."""
    places = [str(folder) for folder in [*_folders, Path.cwd()]]
    # Last, so that no folder there hides an installed package; and for good, as the module may import its neighbours later.
    sys.path += [place for place in dict.fromkeys(places) if place not in sys.path]
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(f"the module {name} needs the package {error.name}, which is not installed; install it") from error
        raise InputError(
            f"there is no module {name} in {' or in '.join(dict.fromkeys(places))}, nor among the installed packages; start in the folder "
            "that holds it, install it, or name its folder in the environment variable PYTHONPATH"
        ) from None
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"the module {name} cannot be imported ({text}); correct it, `python -c 'import {name}'` shows where") from error
