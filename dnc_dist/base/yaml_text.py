"""YAML as people mean it, from any hand: no key twice, names as they are written, and never more work than the text is long.

Plain values are null, true, false and decimal numbers. Everything else is text, also ``yes``,
``2024-02-20`` and ``1:30``. Tags that stand for other types are refused, so nothing is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import read_text, shorten

MOST_BYTES = 1 << 18
"""A configuration is a few thousand bytes."""
_MOST_VALUES = 10_000
_DEEPEST = 20
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NAMED_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"


def read_yaml(path: Path, texts: Container[str] = ()) -> Any:
    """The value of a YAML file; see ``parse_yaml``.

    Raises:
        InputError: it cannot be read, or is no YAML.
    """
    try:
        return parse_yaml(read_text(path, MOST_BYTES), texts)
    except _Unreadable as error:
        raise InputError(f"{path}: cannot be read as YAML ({error})") from error


def parse_yaml(text: str, texts: Container[str] = (), under: tuple[str, ...] = ()) -> Any:
    """YAML as dicts with text keys, lists and plain values.

    Args:
        text: the YAML.
        texts: dotted keys whose values are taken as they are written, whatever they look like; null stays null.
        under: the keys above the value.

    Raises:
        InputError: no YAML, a key twice, a tag, or more values than a configuration has; says where.
    """
    try:
        node = yaml.compose(text, Loader=_Composer)
    except _Unreadable:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _Unreadable(f"{_at(mark)}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: "\U" with a number that no character has
        raise _Unreadable(" ".join(str(error).split())) from error
    return None if node is None else _Builder(texts).value(node, under)


class _Unreadable(InputError):
    """Why a text is no YAML of ours."""


def _at(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""


class _Composer(yaml.SafeLoader):
    """PyYAML's nodes, without its idea of what plain text means, and not deeper than a configuration is."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    _depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _Unreadable(f"{_at(self.peek_event().start_mark)}nested more than {_DEEPEST} levels deep")
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> ScalarNode:
        tag = self.peek_event().tag
        node: ScalarNode = super().compose_scalar_node(anchor)
        if tag == f"{_TAG}str":  # `!!str 3` is text, as "3" is
            node.style = '"'
        return node


class _Builder:
    """Values from nodes. An alias is built anew wherever it stands, and counted every time, so that few lines cannot mean billions."""

    def __init__(self, texts: Container[str]) -> None:
        self._texts, self._count, self._depth = texts, 0, 0

    def value(self, node: Node, path: tuple[str, ...]) -> Any:
        self._count += 1
        self._depth += 1  # not the length of the path, which `<<` leaves as it is
        if self._count > _MOST_VALUES or self._depth > _DEEPEST:
            raise _Unreadable(f"{_at(node.start_mark)}more than {_MOST_VALUES:,} values, or more than {_DEEPEST} levels of them")
        found = self._of_kind(node, path)
        self._depth -= 1
        return found

    def _of_kind(self, node: Node, path: tuple[str, ...]) -> Any:
        kind = {MappingNode: "map", SequenceNode: "seq", ScalarNode: "str"}[type(node)]
        if node.tag != _TAG + kind:
            raise _Unreadable(f"{_at(node.start_mark)}the tag {shorten(node.tag)} is not read; write the value without it")
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self.value(item, (*path, str(number))) for number, item in enumerate(node.value)]
        return _scalar(node, ".".join(path) in self._texts)

    def _mapping(self, node: MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, item in node.value:
            if not isinstance(key_node, ScalarNode):
                raise _Unreadable(f"{_at(key_node.start_mark)}a key must be text")
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                raise _Unreadable(f"line {line}: the key {shorten(key)} stands already in line {lines[key]}; keep one of them")
            lines[key] = line
            if key == "<<" and key_node.style is None:
                for base in item.value if isinstance(item, SequenceNode) else [item]:
                    merged = _section(self.value(base, path), base) | merged
            else:
                own[key] = self.value(item, (*path, key))
        return merged | own


def _scalar(node: Any, as_text: bool) -> Any:
    text: str = node.value
    if not text.isprintable() and ("\0" in text or not _is_unicode(text)):
        raise _Unreadable(f"{_at(node.start_mark)}{shorten(text)} holds a character that no text has")
    if node.style is not None:  # in quotes, or a block
        return text
    if _NULL.fullmatch(text):
        return None
    if as_text:
        return text
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if _NAMED_FLOAT.fullmatch(text) else text


def _section(value: Any, node: Node) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Unreadable(f"{_at(node.start_mark)}`<<` takes the keys of a section, and this is none")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
