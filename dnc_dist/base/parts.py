"""Parts: whatever a configuration chooses by name. A part is one class in one file, with its options as a class inside it.

Names stand in ``part_table`` alone; ``package.module:Class`` takes anybody's class. The options of our own parts are read from the text of
their files (``part_text.py``), without importing these: most import torch, and ``--help`` and ``config`` have to answer at once.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from dnc_dist.base import part_text
from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import shorten
from dnc_dist.base.part_modules import find
from dnc_dist.base.part_table import BASES, OTHER_NAMES, TABLE
from dnc_dist.base.part_text import Described


class Options(BaseModel):
    """Base of all options: unknown keys are refused, values cannot change, field docstrings are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def conflicts(self, cfg: Any) -> Iterator[str]:
        """What in the whole configuration does not go with this part, in sentences that name the key to change."""
        yield from ()


class Named(Options):
    """The options of a chosen part, with the name that chose it."""

    part: ClassVar[tuple[str, str, bool]]
    """How ``named_class`` made this class, for processes that are handed an instance."""
    name: str
    """Short name of the part, or `module:Class`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (*self.part, self.model_dump())


def is_own(kind: str, name: str) -> bool:
    """Whether the name stands for a part of dnc-dist, so that its options can be read without importing it.

    Only of an address of our own: a text in a configuration may lead to any file.
    """
    return _address(kind, name) in (*TABLE[kind].values(), OTHER_NAMES.get(kind))


def _address(kind: str, name: str) -> str:
    """``module:Class`` of a name.

    Raises:
        InputError: no such name.
    """
    table = TABLE[kind]
    if name in table:
        return table[name]
    if ":" in name:
        return name
    if kind in OTHER_NAMES:
        return OTHER_NAMES[kind]
    close = difflib.get_close_matches(name, table, n=1)
    allowed = f"did you mean {close[0]}? Allowed are" if close else "allowed are"
    raise InputError(f"{shorten(name)} is no {kind}; {allowed} {', '.join(table)}, or module:Class of your own")


def load(kind: str, name: str) -> type[Any]:
    """Import the class of a part.

    Raises:
        InputError: no such name, module or class, a class of another kind, or one that lacks a method.
    """
    cls: type[Any] = find(_address(kind, name))
    if not is_kind(kind, cls):
        raise InputError(f"{name} is no {kind}; derive the class from {BASES[kind].replace(':', '.')}")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise InputError(f"{name} lacks {' and '.join(missing)}, which every class of its kind has to define; see docs/extending.md")
    if not issubclass(getattr(cls, "Options", Options), Options):
        raise InputError(f"the class Options of {name} must derive from dnc_dist.base.parts.Options")
    return cls


def is_kind(kind: str, cls: Any) -> bool:
    """Whether a class is a part of a kind."""
    return inspect.isclass(cls) and issubclass(cls, find(BASES[kind]))


@cache
def options_class(kind: str, name: str) -> type[Options]:
    """The ``Options`` of a part. Those of dnc-dist's own are read from their files; another module is imported.

    Raises:
        InputError: as ``load``.
    """
    if is_own(kind, name):
        return part_text.options(*_address(kind, name).split(":"))
    return getattr(load(kind, name), "Options", Options)


def named_class(kind: str, name: str, *, imported: bool = False) -> type[Named]:
    """The options of a part and its name, in one class: what stands in a configuration.

    Args:
        kind: of part.
        name: of the part.
        imported: derive it from the class in the module, which is what the part itself is given.

    Raises:
        InputError: as ``load``.
    """
    return _named_class(kind, name, imported)


@cache
def _named_class(kind: str, name: str, imported: bool) -> type[Named]:
    options: type[Options] = getattr(load(kind, name), "Options", Options) if imported else options_class(kind, name)
    if "name" in options.model_fields and not issubclass(options, Named):
        raise InputError(f"{name}: an option cannot be called `name`, which chooses the {kind}; call it otherwise")
    create: Any = pydantic.create_model
    made: type[Named] = create(f"{name}.Options", __base__=(options,) if issubclass(options, Named) else (options, Named))
    made.part = kind, name, imported
    return made


def _unpickled(kind: str, name: str, imported: bool, values: dict[str, Any]) -> Options:
    return named_class(kind, name, imported=imported).model_validate(values)


def summary(kind: str, name: str) -> str:
    """What a part is, in one paragraph: the docstring of its own ``Options``, else the beginning of its class's."""
    if is_own(kind, name):
        return part_text.summary(*_address(kind, name).split(":"))
    cls = load(kind, name)
    # Not what it inherits: a base says how to derive from it.
    return part_text.one_paragraph(getattr(vars(cls).get("Options"), "__doc__", None) or cls.__doc__)


def name_of(kind: str, cls: type[Any]) -> str:
    """The name by which a class is chosen: that of the table, or ``module:Class``."""
    address = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, own in TABLE[kind].items() if own == address), address)


def name_of_chosen(chosen: Named | Mapping[str, Any] | str) -> str:
    """The name in what a configuration may say of a part."""
    return chosen if isinstance(chosen, str) else chosen.name if isinstance(chosen, Named) else str(chosen["name"])


def build(kind: str, chosen: Named | Mapping[str, Any] | str, **sizes: Any) -> Any:
    """A part, made of its options and what else its kind is given.

    Args:
        kind: of part.
        chosen: what stands in the configuration, or the same as plain values.
        sizes: further keyword arguments of its class.

    Raises:
        InputError: as ``load``, or options that it does not take.
    """
    values = chosen.model_dump() if isinstance(chosen, Named) else {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    name = name_of_chosen(chosen)
    try:
        options = named_class(kind, name, imported=True).model_validate(values)
    except ValidationError as error:
        problems = [describe_problem(kind, name, problem) for problem in error.errors()]
        raise InputError(f"{kind} {name}: {'; '.join(problems)}") from error
    return load(kind, name)(options, **sizes)


def describe_problem(kind: str, name: str, problem: Any, prefix: str = "") -> str:
    """One of pydantic's problems with the options of a part, in words; ``prefix`` stands before its key."""
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return _unknown_option(kind, name, key, prefix)
    if problem["type"] == "missing":
        return f"{prefix}{key}: missing; the {kind} {name} needs it"
    if not key:
        return f"{prefix.rstrip('.')}: {problem['ctx']['error'] if 'error' in problem.get('ctx', {}) else problem['msg']}"
    return f"{prefix}{key}: {problem['msg']} (got {shorten(problem['input'])})"


def _unknown_option(kind: str, name: str, key: str, prefix: str) -> str:
    """What to say of an option that a part does not have: what it may have meant, whose it is, and which ones there are."""
    known = list(options_of(kind, name))
    there = f"{name} has {', '.join(known)}" if known else f"{name} has no options"
    owners = [other for other in TABLE[kind] if other != name and key in options_of(kind, other)]
    if owners:
        return f"{prefix}{key}: belongs to {' and '.join(owners)}, not to {name}; {there}"
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{prefix}{close[0]}'? " if close else ""
    return f"{shorten(prefix + key, 200)[1:-1]}: unknown key; {hint}{there}"


def options_of(kind: str, name: str) -> dict[str, Any]:
    """The options of a part by name, without the name itself: pydantic's FieldInfo."""
    return {key: field for key, field in options_class(kind, name).model_fields.items() if key != "name"}


def described(kind: str, name: str) -> dict[str, Described]:
    """The options of a part, without the name itself, for people."""
    if is_own(kind, name):
        return part_text.described(*_address(kind, name).split(":"))
    return {key: described_field(field, field.description or "") for key, field in options_of(kind, name).items()}


def described_field(field: FieldInfo, meaning: str) -> Described:
    """A field of a class, with its meaning."""
    words = list(get_args(field.annotation)) if get_origin(field.annotation) is Literal else []
    required = field.is_required()
    return Described(required, None if required else field.get_default(call_default_factory=True), words, meaning)
