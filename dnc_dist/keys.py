"""The reference of all keys and parts, as ``dnc-dist config --keys`` prints it: all of it follows from the classes themselves."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator

from dnc_dist.base import part_modules, part_text, parts
from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import shorten
from dnc_dist.base.part_text import Described
from dnc_dist.config import RunConfig, choices, chosen, sections


def describe_keys(only: str = "", cfg: RunConfig | None = None) -> str:
    """Default and meaning of every key, and every part with its options.

    Args:
        only: of this section, key or kind of part, or of this part, which may be a ``module:Class``.
        cfg: also the parts of others that this configuration chooses.

    Raises:
        InputError: ``only`` is nothing of the kind.
    """
    if ":" in only:
        return "\n".join(_foreign(only))
    blocks = [block for block in _blocks(cfg) if not only or only in block[0]]
    if not blocks:
        words = dict.fromkeys([*RunConfig.model_fields, *parts.TABLE])
        close = difflib.get_close_matches(only, sorted(set().union(*(names for names, _ in _blocks(cfg)))), n=1)
        there = f"did you mean {close[0]}? Sections and kinds" if close else "sections and kinds"
        raise InputError(f"{shorten(only)} is no section, key, kind of part or part; {there} are {', '.join(words)}")
    return "\n\n".join("\n".join(lines) for _, lines in blocks)


def _blocks(cfg: RunConfig | None) -> Iterator[tuple[set[str], list[str]]]:
    """What belongs together: the words that choose it, and its lines."""
    for name in RunConfig.model_fields:
        if model := sections().get(name):
            lines = [f"{name}: {(model.__doc__ or '').strip()}"]
            meanings = part_text.docstrings(model.__module__, model.__name__)
            for key, field in model.model_fields.items():
                described = parts.described_field(field, meanings[key])
                if choice := choices().get(f"{name}.{key}"):
                    described = described._replace(default=choice.default)
                lines += _key(f"{name}.{key}", described)
            yield {name, *(f"{name}.{key}" for key in model.model_fields)}, lines
        for path, choice in choices().items():
            if path == name or path.startswith(f"{name}."):
                foreign = [] if cfg is None or chosen(cfg, path).name in parts.TABLE[choice.kind] else [chosen(cfg, path).name]
                for part in [*parts.TABLE[choice.kind], *foreign]:
                    where = f"{path}.name" if choice.section else path
                    keys = (f"{path}.{key}" for key in parts.described(choice.kind, part))
                    yield {name, path, choice.kind, part, *keys}, [*_part(choice.kind, part, where, path)]
    for part in parts.TABLE["reader"]:
        yield {"reader", part}, [*_part("reader", part, "data prepare", "--set ")]


def _part(kind: str, name: str, where: str, prefix: str) -> Iterator[str]:
    """The lines of a part and its options."""
    summary = f": {text}" if (text := parts.summary(kind, name)) else ""
    yield f"{where}{' ' if where == 'data prepare' else ' = '}{name}{summary}"
    for key, described in parts.described(kind, name).items():
        yield from _key(f"{prefix}{key}" if prefix.endswith(" ") else f"{prefix}.{key}", described)


def _foreign(name: str) -> Iterator[str]:
    """The lines of a part of somebody else's, whose kind its base tells."""
    kinds = [kind for kind in parts.TABLE if _is(kind, name)]
    if not kinds:
        parts.load("loss", name)
        raise InputError(f"{name} is no part; derive it from {' or '.join(base.replace(':', '.') for base in parts.BASES.values())}")
    paths = {choice.kind: path for path, choice in choices().items()}
    for kind in kinds:
        path = paths.get(kind, "")
        where = f"{path}.name" if path and choices()[path].section else path or "data prepare"
        yield from _part(kind, name, where, path or "--set ")


def _is(kind: str, name: str) -> bool:
    return parts.is_kind(kind, part_modules.find(name))


def _key(path: str, key: Described) -> list[str]:
    """A key with its default, what is allowed if it is one of a few words, and its meaning."""
    shown = "required" if key.required else json.dumps(key.default, default=str)
    words = f" {key.words}" if key.words else ""
    return [f"  {path} = {shown}{words}", *(f"      {line}" for line in key.meaning.splitlines())]
