"""The options of dnc-dist's own parts, read from the text of their files: these import torch, which takes seconds.

Of a file only the class ``Options`` of a part is executed, and what it stands on: imports of the modules in ``_LIGHT``, assignments of
the module (a type, a number), and the options of a base class, which are read in the same way.
"""

from __future__ import annotations

import ast
import copy
import importlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pydantic

import dnc_dist

_LIGHT = {"typing", "collections.abc", "pathlib", "math", "re", "pydantic", "dnc_dist.base.parts", "dnc_dist.base.errors"}


def options(module: str, name: str) -> Any:
    """The class ``Options`` of a class, its own or that of a base; plain ``parts.Options`` where there is none.

    Raises:
        ImportError: it stands on something that is not read in this way.
    """
    return _options(module, name) or importlib.import_module("dnc_dist.base.parts").Options


def docstring(module: str, name: str) -> str | None:
    """The docstring of a class's own ``Options``, else that of the class."""
    found = _find_class(module, name)
    if found is None:
        return None
    own = next((node for node in found[1].body if isinstance(node, ast.ClassDef) and node.name == "Options"), None)
    return (ast.get_docstring(own) if own else None) or ast.get_docstring(found[1])


@cache
def _tree(module: str) -> ast.Module:
    path = Path(next(iter(dnc_dist.__path__))).joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def _imports(module: str) -> dict[str, tuple[str, str]]:
    """Name in a module -> where it comes from: (module, name there), or (module, "") for a module itself."""
    found: dict[str, tuple[str, str]] = {}
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
    return found


def _find_class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """The class of that name, in this module of dnc-dist or where the module imports it from."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    origin, original = _imports(module).get(name, ("", ""))
    return _find_class(origin, original) if origin.startswith("dnc_dist.") and original else None


@cache
def _options(module: str, name: str) -> Any:
    found = _find_class(module, name)
    if found is None:
        return None
    module, cls = found
    own = next((node for node in cls.body if isinstance(node, ast.ClassDef) and node.name == "Options"), None)
    if own is not None:
        return _run(module, f"{name}.Options", own)["Options"]
    bases = (_options(module, base.id) for base in cls.bases if isinstance(base, ast.Name))
    return next((found for found in bases if found is not None), None)


def _run(module: str, qualname: str, node: ast.stmt) -> dict[str, Any]:
    """The namespace after a statement of a module, with everything in it that the statement uses."""
    if isinstance(node, ast.ClassDef):
        node = _with_descriptions(node)
    namespace: dict[str, Any] = {"__name__": module, "_Annotated": Annotated, "_Field": pydantic.Field}
    # Names in annotations that are text (`"int"`) are none that our parts use.
    bound = {child.id for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)}
    for used in dict.fromkeys(child.id for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load)):
        if used not in namespace and used not in bound:
            namespace |= _value(module, used)
    # Annotations are evaluated at once: nobody could find their names later.
    exec(compile(ast.Module([node], []), f"<{qualname} of {module}>", "exec", dont_inherit=True), namespace)
    return namespace


def _value(module: str, name: str) -> dict[str, Any]:
    """What a name means in a module, as a namespace; empty for a builtin."""
    origin, original = _imports(module).get(name, ("", ""))
    if origin in _LIGHT or f"{origin}.{original}" in _LIGHT:
        found = importlib.import_module(origin)
        if not original:
            return {name: found}
        return {name: getattr(found, original) if hasattr(found, original) else importlib.import_module(f"{origin}.{original}")}
    if _find_class(module, name) is not None:
        return {name: SimpleNamespace(Options=options(module, name))}
    for node in _tree(module).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return {name: _run(module, name, node)[name]}
    if origin:
        raise ImportError(f"Options of {module} use {name} of {origin}, which is not imported to read them; see {__name__}")
    return {}


def _with_descriptions(cls: ast.ClassDef) -> ast.ClassDef:
    """The class with the docstring of each field in its annotation: pydantic looks for them in a file that it cannot find from here."""
    body = list(cls.body)
    for number, node in enumerate(body[:-1]):
        follows = body[number + 1]
        if isinstance(node, ast.AnnAssign) and isinstance(follows, ast.Expr) and isinstance(follows.value, ast.Constant):
            if "ClassVar" in ast.unparse(node.annotation):
                continue
            text = ast.Constant(" ".join(str(follows.value.value).split()))
            field = ast.Call(ast.Name("_Field", ast.Load()), [], [ast.keyword("description", text)])
            pair = ast.Tuple([node.annotation, field], ast.Load())
            annotation = ast.Subscript(ast.Name("_Annotated", ast.Load()), pair, ast.Load())
            body[number] = ast.AnnAssign(node.target, annotation, node.value, node.simple)
    quiet = ast.parse("model_config = {'use_attribute_docstrings': False}").body
    new = copy.copy(cls)
    new.body = [*body, *quiet]
    return ast.fix_missing_locations(new)
