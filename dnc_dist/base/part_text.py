"""The options of dnc-dist's own parts, read from the text of their files: these import torch, which takes seconds.

Of a file only the class ``Options`` of a part is executed, and what it stands on: imports of the modules in ``_LIGHT``, assignments of
the module (a type, a number), and the options of a base class, which are read in the same way. ``described`` and ``summary`` execute
nothing, and do without pydantic.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import dnc_dist

_LIGHT = {"typing", "collections.abc", "pathlib", "math", "re", "pydantic", "dnc_dist.base.parts", "dnc_dist.base.errors"}
# What an executed class is given beside its own. Its validator would never be used: the class of a chosen part derives from it.
_QUIET = ast.parse("model_config = {'use_attribute_docstrings': False, 'defer_build': True}").body


class Described(NamedTuple):
    """An option or a key, for people: its default, the words that are allowed if it is one of a few, and its meaning."""

    required: bool
    default: Any
    words: list[Any]
    meaning: str


def options(module: str, name: str) -> Any:
    """The class ``Options`` of a class, its own or that of a base; plain ``parts.Options`` where there is none.

    Raises:
        ImportError: it stands on something that is not read in this way.
    """
    found = _find_options(module, name)
    return importlib.import_module("dnc_dist.base.parts").Options if found is None else _made(*found)


def described(module: str, name: str) -> dict[str, Described]:
    """The options of a class, also those that its ``Options`` inherit.

    Raises:
        ValueError: a default is no plain value.
    """
    if (found := _find_options(module, name)) is None:
        return {}
    node, known = _own_options(_class(*found)), dict[str, Described]()
    assert node is not None
    for base in node.bases:
        if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name) and _find_class(found[0], base.value.id):
            known |= described(found[0], base.value.id)
    for field, docstring in _documented(node):
        value: Any = field.value
        if isinstance(value, ast.Call):  # Field(default, ge=...)
            value = value.args[0]
        of = field.annotation
        words = ast.literal_eval(of.slice) if isinstance(of, ast.Subscript) and ast.unparse(of.value) == "Literal" else ()
        default = None if value is None else ast.literal_eval(value)
        known[_name(field)] = Described(value is None, default, [words] if isinstance(words, str) else list(words), _one_line(docstring))
    return known


def docstrings(module: str, name: str) -> dict[str, str]:
    """The docstrings of the fields of a class."""
    return {_name(field): docstring for field, docstring in _documented(_class(module, name))}


def summary(module: str, name: str) -> str:
    """The first paragraph, in one line, of the docstring of a class's own ``Options``, else of that of the class."""
    if (found := _find_class(module, name)) is None:
        return ""
    own = _own_options(found[1])
    text = (ast.get_docstring(own) if own else None) or ast.get_docstring(found[1])
    return one_paragraph(text)


def one_paragraph(text: str | None) -> str:
    """The beginning of a docstring, in one line."""
    return _one_line((text or "").split("\n\n")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _name(field: ast.AnnAssign) -> str:
    assert isinstance(field.target, ast.Name)
    return field.target.id


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


def _class(module: str, name: str) -> ast.ClassDef:
    return next(node for node in _tree(module).body if isinstance(node, ast.ClassDef) and node.name == name)


def _own_options(cls: ast.ClassDef) -> ast.ClassDef | None:
    return next((node for node in cls.body if isinstance(node, ast.ClassDef) and node.name == "Options"), None)


def _find_options(module: str, name: str) -> tuple[str, str] | None:
    """Module and name of the class whose ``Options`` a class has: its own, or those of a base."""
    if (found := _find_class(module, name)) is None:
        return None
    module, cls = found
    if _own_options(cls):
        return module, cls.name
    bases = (_find_options(module, base.id) for base in cls.bases if isinstance(base, ast.Name))
    return next((found for found in bases if found is not None), None)


@cache
def _made(module: str, name: str) -> Any:
    """The class ``Options`` in a class, executed."""
    own = _own_options(_class(module, name))
    assert own is not None
    return _run(module, f"{name}.Options", own)["Options"]


def _run(module: str, qualname: str, node: ast.stmt) -> dict[str, Any]:
    """The namespace after a statement of a module, with everything in it that the statement uses."""
    import pydantic

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


def _documented(cls: ast.ClassDef) -> Iterator[tuple[ast.AnnAssign, str]]:
    """The fields of a class, each with its docstring."""
    for node, follows in pairwise(cls.body):
        docstring = follows.value if isinstance(follows, ast.Expr) else None
        if isinstance(node, ast.AnnAssign) and isinstance(docstring, ast.Constant) and "ClassVar" not in ast.unparse(node.annotation):
            yield node, inspect.cleandoc(str(docstring.value))


def _with_descriptions(cls: ast.ClassDef) -> ast.ClassDef:
    """The class with the docstring of each field in its annotation: pydantic looks for them in a file that it cannot find from here."""
    body = list(cls.body)
    for node, text in _documented(cls):
        field = ast.Call(ast.Name("_Field", ast.Load()), [], [ast.keyword("description", ast.Constant(_one_line(text)))])
        pair = ast.Tuple([node.annotation, field], ast.Load())
        annotation = ast.Subscript(ast.Name("_Annotated", ast.Load()), pair, ast.Load())
        body[body.index(node)] = ast.AnnAssign(node.target, annotation, node.value, node.simple)
    new = copy.copy(cls)
    new.body = [*body, *_QUIET]
    return ast.fix_missing_locations(new)
