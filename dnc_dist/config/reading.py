"""How the configuration is read: a YAML file, changed by ``--set a.b=c``, checked as a whole.

Every problem of a file is reported at once, each with the dotted path that ``--set`` takes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dnc_dist.base import part_modules, parts
from dnc_dist.base.choice import Choice
from dnc_dist.base.errors import ConfigError, InputError
from dnc_dist.base.foreign import shorten
from dnc_dist.base.yaml_text import parse_yaml, read_yaml
from dnc_dist.config.tree import RunConfig, choices, conquer_start, sections

_LARGEST = 2**63 - 1


def _all_keys() -> list[str]:
    """Every dotted key; of parts those of all of dnc-dist's own."""
    keys = [f"{name}.{key}" for name, model in sections().items() for key in model.model_fields]
    keys += [f"{path}.{key}" for path, choice in choices().items() for name in parts.TABLE[choice.kind] for key in _options(choice, name)]
    return [*keys, *RunConfig.model_fields]


def _options(choice: Choice, name: str) -> dict[str, Any]:
    return parts.options_class(choice.kind, name).model_fields


class _Texts:
    """The dotted keys whose values are text or paths, and are taken as they are written. Options of parts are read only when asked for."""

    def __contains__(self, key: object) -> bool:
        path, _, last = str(key).rpartition(".")
        if key in choices() or (path in choices() and last == "name"):
            return True
        if path in choices():
            choice = choices()[path]
            return any(_is_text(_options(choice, name).get(last)) for name in parts.TABLE[choice.kind])
        model = sections().get(path)
        return model is not None and _is_text(model.model_fields.get(last))


def _is_text(field: Any) -> bool:
    return field is not None and field.annotation in (str, Path, Path | str, str | None, Path | None)


def _name_at(tree: Any, path: str, choice: Choice) -> str | None:
    """The name that a tree of plain values chooses at a key; None where what stands there is no name."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    name = tree.get("name", choice.default) if isinstance(tree, dict) else choice.default if tree is None else tree
    return name if isinstance(name, str) else None


def _describe(problem: Any, tree: dict[str, Any]) -> list[str]:
    """One pydantic problem as lines for the user."""
    keys = [str(part) for part in problem["loc"]]
    path = ".".join(keys)
    for at, choice in choices().items():
        if path != at and not path.startswith(f"{at}."):
            continue
        name = _name_at(tree, at, choice)
        if problem["type"] in ("part_name", "part_type") or name is None:
            as_text = choice.section or not isinstance(problem["input"], str) or _section_at(tree, at) is not None
            return [f"{path if as_text else at}: {problem['msg']}"]
        option = {**problem, "loc": problem["loc"][at.count(".") + 1 :]}
        return [parts.describe_problem(choice.kind, name, option, f"{at}.")]
    if problem["type"] == "extra_forbidden":
        return [f"{shorten(path, 200)[1:-1]}: unknown key; {_meant(path)}"]
    if problem["type"] == "missing":
        key = "data.root" if path == "data" else path
        return [f"{key}: missing; set it in the file or with --set {key}=VALUE"]
    if path == "run.name" and problem["type"] == "string_pattern_mismatch":
        return [f"{path}: letters, digits and . _ + - only, as it names a folder in run.dir (got {shorten(problem['input'])})"]
    if problem["type"] == "value_error" and not keys:
        return str(problem["ctx"]["error"]).split("\n")
    return [f"{path}: {problem['msg'].removeprefix('Value error, ')} (got {shorten(problem['input'])})"]


def _meant(path: str) -> str:
    """Which key somebody may have meant."""
    every = _all_keys()
    if close := difflib.get_close_matches(path, every, n=1, cutoff=0.6):
        return f"did you mean '{close[0]}'?"
    last = {key.rpartition(".")[2]: key for key in reversed(every) if "." in key}
    if close := difflib.get_close_matches(path.rpartition(".")[2], last, n=1, cutoff=0.75):
        return f"did you mean '{last[close[0]]}'?"
    return "`dnc-dist config --keys` lists all keys"


def _section_at(tree: Any, path: str) -> dict[str, Any] | None:
    """The mapping at a dotted key of a tree, None where there is none."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=c`` -> (["a", "b"], value); the value is read as YAML.

    Raises:
        ConfigError: the text is no ``key=value``.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text}: expected key=value, for example --set optim.lr=0.001")
    keys = key.strip().split(".")
    try:
        return keys, parse_yaml(value, _Texts(), tuple(keys))
    except InputError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML ({error})") from error


def load_config(path: str | Path, overrides: Sequence[str] = (), *, code_beside: bool = True) -> RunConfig:
    """Read a YAML file, apply ``key=value`` overrides, validate.

    Args:
        path: of the file.
        overrides: each ``key=value``.
        code_beside: whether a ``module:Class`` in it may be in a file beside it. Not for files that may be of somebody else.

    Raises:
        ConfigError: the file cannot be read, or values are wrong; all problems are listed.
    """
    path = Path(path)
    try:
        tree = read_yaml(path, _Texts())
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ConfigError(f"{path}: no such configuration file; see configs/ for examples") from None
        raise ConfigError(str(error)) from error
    if code_beside:
        part_modules.search_in(path.parent)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `data:` and `model:`, got {type(tree).__name__}")
    for text in overrides:
        keys, value = parse_override(text)
        node: Any = tree
        for number, key in enumerate(keys[:-1], start=1):
            child = node.get(key)
            if child is None:
                child = node[key] = {}
            if isinstance(child, str) and ".".join(keys[:number]) in choices():  # a name, which now gets options
                child = node[key] = {"name": child}
            if not isinstance(child, dict):
                raise ConfigError(f"--set {text}: '{key}' is a value, not a section")
            node = child
        node[keys[-1]] = value
    # `model:` without anything below it is an empty section.
    tree = {name: {} if section is None else section for name, section in tree.items()}
    if isinstance(tree.get("run"), dict) or "run" not in tree:
        run = tree.setdefault("run", {})
        # Not every name of a file is one of a run.
        run["name"] = run.get("name") or re.sub(r"[^\w.+-]+", "-", path.stem)
    return parse_tree(tree, str(path))


def parse_tree(tree: dict[str, Any], source: str) -> RunConfig:
    """Validate a tree of plain values, and say what ``division.conquer_from`` and ``data.access`` are where they are `auto`.

    Raises:
        ConfigError: lists every problem, with the source's name.
    """
    problems = _misplaced_values(tree)
    try:
        cfg = RunConfig.model_validate(tree)
    except ValidationError as error:
        found = [line for problem in error.errors() for line in _describe(problem, tree)]
        problems = {line.split(": ")[0]: line for line in found} | problems if problems else dict(enumerate(found))
    if problems:
        raise ConfigError(f"{source}: {len(problems)} problem(s)\n" + "\n".join(f"  {line}" for line in problems.values()))
    if cfg.division.conquer_from == "auto":
        cfg = cfg.model_copy(update={"division": cfg.division.model_copy(update={"conquer_from": conquer_start(cfg)})})
    if cfg.data.access == "auto":
        cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"access": "stream" if cfg.data.streams else "indexed"})})
    return cfg


def _misplaced_values(tree: dict[str, Any]) -> dict[Any, str]:
    """Dotted key -> what is wrong with it: `true` is no 1, 1 or `yes` is no `true`, and integers have 64 bits."""
    fields = [(name, model.model_fields) for name, model in sections().items()]
    for path, choice in choices().items():
        name = _name_at(tree, path, choice)
        # What is wrong with a name is told where it is looked up.
        if name is not None and _section_at(tree, path) is not None and (name in parts.TABLE[choice.kind]):
            fields.append((path, _options(choice, name)))
    problems = {}
    for path, keys in fields:
        section = _section_at(tree, path) or {}
        for key, field in keys.items():
            value, is_bool = section.get(key), field.annotation is bool
            items = value if isinstance(value, list | tuple) else [value]
            if key in section and any(isinstance(item, bool) != is_bool for item in items):
                problems[f"{path}.{key}"] = f"{path}.{key}: must {'' if is_bool else 'not '}be true or false (got {shorten(value)})"
            elif any(isinstance(item, int) and abs(item) > _LARGEST for item in items):
                problems[f"{path}.{key}"] = (
                    f"{path}.{key}: must be {_LARGEST} at most, the largest integer of 64 bits (got {shorten(value)})"
                )
    return problems


def dump_config(cfg: RunConfig) -> str:
    """The resolved tree as YAML that ``load_config`` reads back to an equal configuration."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)
