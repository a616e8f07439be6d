"""Where ``module:Class`` is found: among installed packages, beside the configuration, or in the working directory.

A run directory may be somebody else's, and its ``config.yaml`` may name anything. So code in it is never executed, wherever the
command starts and however the name leads there.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import shorten

_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_folders: list[Path] = []
_refused: list[Path] = []


def search_in(folder: Path) -> None:
    """Look for the modules of ``module:Class`` in this folder, too, after the installed packages and before the working directory."""
    if (folder := folder.absolute()) not in _folders:
        _folders.insert(0, folder)


def never_from(folder: Path) -> None:
    """Import nothing from this folder or below: it may be somebody else's. Modules that are imported already stay."""
    if (folder := folder.resolve()) not in _refused:
        _refused.append(folder)


def find(address: str) -> Any:
    """What ``module:Class`` names, imported now.

    Raises:
        InputError: no such module or class.
    """
    if not _CLASS.fullmatch(address):
        raise InputError(f"{shorten(address)} is no module:Class; write for example my_package.my_module:MyClass")
    module_name, class_name = address.split(":")
    module = _own(module_name) if address.startswith("dnc_dist.") else _foreign(module_name)
    cls = getattr(module, class_name, None)
    if cls is None:
        classes = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module_name]
        close = difflib.get_close_matches(class_name, classes, n=1)
        hint = f"did you mean {close[0]}?" if close else _hidden(module_name, module) or f"it has {', '.join(classes) or 'no class'}"
        raise InputError(f"the module {module_name} ({getattr(module, '__file__', None)}) has no class {class_name}; {hint}")
    return cls


def _own(name: str) -> Any:
    """A module of dnc-dist. An error inside it is a bug and keeps its traceback."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise InputError(f"dnc-dist has no module {name}; `dnc-dist config --keys` lists its parts") from None


def _places() -> list[str]:
    """Folders to look in beside Python's own."""
    folders = dict.fromkeys([*_folders, Path.cwd()])
    return [str(folder) for folder in folders if not _is_refused(str(folder))]


def _foreign(name: str) -> Any:
    """A module of the user's, from wherever Python finds it, from ``search_in`` or from the working directory."""
    if (top := name.partition(".")[0]) in sys.stdlib_module_names:
        raise InputError(f"{top} is a module of Python's standard library, where no part is; if it is a file of yours, rename it")
    places = _places()
    # Last, so that no folder there hides an installed package; and for good, as the module may import its neighbours later.
    sys.path += [place for place in places if place not in sys.path]
    importlib.invalidate_caches()
    if name not in sys.modules:
        _check_place(name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(f"the module {name} needs the package {error.name}, which is not installed; install it") from error
        where = f"in {' or in '.join(places)}, nor among" if places else "among"
        raise InputError(
            f"there is no module {name} {where} the installed packages; start in the folder "
            "that holds it, install it, or name its folder in the environment variable PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:  # a script may end itself
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"the module {name} cannot be imported ({text}); correct it, `python -c 'import {name}'` shows where") from error


def _check_place(name: str) -> None:
    """Refuse a module in a folder of ``never_from``. Finds it as Python does, package by package, but executes none of them.

    Raises:
        InputError: it is in such a folder.
    """
    path: Any = None  # Python's own
    words = name.split(".")
    for number in range(1, len(words) + 1):
        spec = PathFinder.find_spec(".".join(words[:number]), path)
        if spec is None:
            return  # no file; the import says so
        path = list(spec.submodule_search_locations or ())
        for place in [*([spec.origin] if spec.has_location and spec.origin else []), *path]:
            if _is_refused(place):
                raise InputError(
                    f"the module {name} lies in a run directory ({place}), from where no code is executed; "
                    "start in the folder of your module, or install it"
                )


def _is_refused(place: str) -> bool:
    # The folder of a link counts, and what it leads to.
    ways = [Path(place).resolve(), Path(place).parent.resolve()]
    return any(way.is_relative_to(folder) for way in ways for folder in _refused)


def _hidden(name: str, module: Any) -> str | None:
    """What to say where an installed module has the name of a file of the user's."""
    file = f"{name.partition('.')[0]}.py"
    for place in map(Path, _places()):
        found = getattr(module, "__file__", None)
        if (place / file).is_file() and (found is None or not Path(found).is_relative_to(place)):
            return f"it hides {place / file}; rename that one"
    return None
