"""A declared matrix: its question and prediction, arms, axes and seeds, and every run that follows from them."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from yaml import YAMLError, safe_load

from benchmarks.record import ROOT
from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import read_text
from dnc_dist.config import load_config
from dnc_dist.config.tree import RunConfig

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=20)]
Value = str | int | float | bool | None | list[Any]
# What makes two arms comparable is not theirs to change.
_COMMON = ("schedule.epochs", "schedule.epoch_length", "data.root", "data.validation_classes", "evaluation.", "run.")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Axis(_Strict):
    """A key that several arms vary."""

    key: str
    values: list[Value] = Field(min_length=1)


class Arm(_Strict):
    """What one arm sets, and the axes along which it is run; the first arm is the one that the others are compared with."""

    set: dict[str, Value] = {}
    axes: list[str]
    note: str = ""


class Matrix(_Strict):
    """The whole declaration; see ``load_matrix``."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    question: Words
    prediction: Words
    config: Path
    set: dict[str, Value] = {}
    data: dict[str, dict[str, Value]] = Field(min_length=1)
    axes: dict[str, Axis] = {}
    arms: dict[str, Arm] = Field(min_length=2)
    seeds: list[int] = Field(min_length=1)
    final: list[str] = []
    final_seeds: list[int] = []


@dataclass(frozen=True)
class Planned:
    """One run: where it stands in the matrix, its overrides, and the digest of the configuration that they make."""

    matrix: str
    arm: str
    data: str
    point: dict[str, Value]
    seed: int
    final: bool
    overrides: list[str]
    digest: str
    cfg: RunConfig = field(repr=False)

    @property
    def name(self) -> str:
        """The name of its folder."""
        told = json.dumps([self.matrix, self.arm, self.data, self.point, self.seed, self.final])
        return f"{self.matrix}-{hashlib.sha256(told.encode()).hexdigest()[:10]}"

    @property
    def where(self) -> dict[str, Any]:
        """Its place in the matrix, as results and tables name it."""
        values = {"matrix": self.matrix, "arm": self.arm, "data": self.data, "point": self.point, "seed": self.seed, "final": self.final}
        return values


def load_matrix(path: Path) -> Matrix:
    """The matrix that a YAML file declares.

    Raises:
        InputError: it is no such file; it states no prediction; an arm names an unknown axis, or sets what has to be equal for all.
    """
    try:
        matrix = Matrix.model_validate(safe_load(read_text(path)))
    except YAMLError as error:
        raise InputError(f"{path} is no YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        tail = "; write what you expect, and why, before anything is run" if where == "prediction" else ""
        raise InputError(f"{path}: {where}: {first['msg']}{tail}") from None
    for name, arm in matrix.arms.items():
        if unknown := set(arm.axes) - set(matrix.axes):
            raise InputError(f"{path}: arm {name!r} has the axes {sorted(unknown)}; there are {sorted(matrix.axes)}")
        keys = [*arm.set, *(matrix.axes[axis].key for axis in arm.axes)]
        if common := [key for key in keys if key.startswith(_COMMON)]:
            raise InputError(f"{path}: arm {name!r} changes {common[0]}, which has to be equal for all arms; set it for the whole matrix")
    if unknown := set(matrix.final) - set(matrix.arms):
        raise InputError(f"{path}: final names {sorted(unknown)}; there are the arms {sorted(matrix.arms)}")
    return matrix


def plan_runs(matrix: Matrix, *, final: bool = False, arms: list[str] | None = None) -> list[Planned]:
    """Every run of the matrix, seed by seed, so that whatever is finished is balanced.

    To choose, a run holds validation classes out and leaves the test split alone. A final run trains on all training classes, and is
    measured on the test split.

    Args:
        final: the final runs, instead of those that choose.
        arms: only these; None: all, or those that are declared final.

    Raises:
        InputError: a configuration is refused, an arm is unknown or not declared final, or nothing is held out to choose on.
    """
    wanted = arms or (matrix.final if final else list(matrix.arms))
    if unknown := [arm for arm in wanted if arm not in matrix.arms]:
        raise InputError(f"matrix {matrix.name} has no arm {unknown[0]!r}; it has {', '.join(matrix.arms)}")
    if final and (not wanted or not set(wanted) <= set(matrix.final)):
        raise InputError(
            f"matrix {matrix.name} declares {matrix.final or 'no arm'} as final; choose on the validation classes, then name the arm that "
            "won, and the one it is compared with, in `final`"
        )
    runs = []
    for seed in (matrix.final_seeds or matrix.seeds) if final else matrix.seeds:
        for data, name in itertools.product(matrix.data, wanted):
            arm = matrix.arms[name]
            for values in itertools.product(*(matrix.axes[axis].values for axis in arm.axes)):
                point = dict(zip(arm.axes, values, strict=True))
                runs.append(_planned(matrix, name, data, point, seed, final))
    return runs


def _check_baseline(matrix: Matrix, run: Planned) -> None:
    """Raise InputError if an arm lacks an axis of the first one and is not at its first value: it could not be compared."""
    for axis in next(iter(matrix.arms.values())).axes:
        key, value = matrix.axes[axis].key, matrix.axes[axis].values[0]
        if axis not in run.point and (own := reduce(getattr, key.split("."), run.cfg)) != value:
            raise InputError(
                f"matrix {matrix.name}, arm {run.arm!r}: it is not run along {axis!r}, so it is compared with the first arm at "
                f"{key}={value}, and has {own}; begin the values of {axis!r} with {own}"
            )


def _planned(matrix: Matrix, name: str, data: str, point: dict[str, Value], seed: int, final: bool) -> Planned:
    arm = matrix.arms[name]
    stage: dict[str, Value] = {"evaluation.test": final, "evaluation.select_on": "last", "run.seed": seed}
    if final:
        stage |= {"data.validation_classes": 0.0}
    values = matrix.set | matrix.data[data] | arm.set | {matrix.axes[axis].key: value for axis, value in point.items()} | stage
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
    config = ROOT / matrix.config
    try:
        cfg = load_config(config, overrides)
    except InputError as error:
        raise InputError(f"matrix {matrix.name}, arm {name!r}, {data}, {point}: {error}") from None
    if not final and cfg.data.validation_classes == 0:
        raise InputError(f"matrix {matrix.name} holds nothing out to choose on; set data.validation_classes, for example to 0.2")
    run = Planned(matrix.name, name, data, point, seed, final, overrides, cfg.digest(), cfg)
    _check_baseline(matrix, run)
    return run
