"""Parts: their options read from text are those of their classes, and a part of somebody else works wherever a short name does."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dnc_dist.base import part_modules, parts
from dnc_dist.base.errors import InputError
from dnc_dist.config import ConfigError, dump_config, load_config
from dnc_dist.keys import describe_keys
from dnc_dist.rundir.folder import load_run_config
from tests.run_fixtures import dnc

ROWS = [(kind, name) for kind, table in parts.TABLE.items() for name in table]
# Each test has modules of its own names: Python imports a name once.
LOSS = '''
import torch
from pydantic import Field

from dnc_dist.loss.pairwise import PairMatrix, PairwiseLoss


class Dummy(PairwiseLoss):
    """A loss of somebody else."""

    class Options(PairwiseLoss.Options):
        power: float = Field(2.0, gt=0)
        """Of the distance between a positive pair."""
        label: str = "a"
        """A name, not a number."""

    def anchor_values(self, pairs: PairMatrix) -> tuple[torch.Tensor, torch.Tensor]:
        terms = (1 - pairs.cosine).clamp(min=1e-6) ** self.options.power
        return torch.where(pairs.positive, terms, 0).sum(1), pairs.positive.sum(1)


class Double(Dummy):
    pass


class Bare(Dummy):
    class Options(Dummy.Options):
        sizes: list[int] = Field(default_factory=lambda: [1, 2])


class Nothing:
    pass


class Unfinished(PairwiseLoss):
    pass
'''


def write(folder: Path, module: str, **sections: Any) -> Path:
    """The module with the loss, and a configuration beside it."""
    (folder / f"{module}.py").write_text(LOSS)
    (folder / "exp.yaml").write_text(yaml.safe_dump({"data": {"root": "images"}, "loss": {"name": f"{module}:Dummy"}} | sections))
    return folder / "exp.yaml"


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "name"), ROWS)
def test_options_read_from_text_are_those_of_the_class(kind: str, name: str) -> None:
    imported = parts.load(kind, name)
    assert parts.options_class(kind, name).model_json_schema() == imported.Options.model_json_schema()
    assert parts.summary(kind, name)
    assert parts.name_of(kind, imported) == name


@pytest.mark.parametrize(("kind", "name"), ROWS)
def test_what_is_told_of_options_is_what_the_class_has(kind: str, name: str) -> None:
    fields = parts.load(kind, name).Options.model_fields
    expected = {key: parts.described_field(field, " ".join(field.description.split())) for key, field in fields.items() if key != "name"}
    assert parts.described(kind, name) == expected


@pytest.mark.parametrize("kind", parts.TABLE)
def test_a_name_that_nobody_has(kind: str) -> None:
    if kind in parts.OTHER_NAMES:
        assert parts.load(kind, "resnet18") is part_modules.find(parts.OTHER_NAMES[kind])
    else:
        first = next(iter(parts.TABLE[kind]))
        with pytest.raises(InputError, match=rf"'{first}x' is no {kind}; did you mean {first}\?.* Allowed are {first}.* module:Class"):
            parts.load(kind, f"{first}x")
        with pytest.raises(InputError, match=rf"'zzzzzz' is no {kind}; allowed are {first}"):
            parts.load(kind, "zzzzzz")


def test_a_part_beside_the_configuration(tmp_path: Path) -> None:
    path = write(tmp_path, "beside_it")
    cfg = load_config(path, ["loss.power=3", "loss.label='07'"])
    assert cfg.loss.model_dump() == {"name": "beside_it:Dummy", "memory": 0, "memory_from": 0, "power": 3.0, "label": "07"}
    loss = parts.build("loss", cfg.loss, num_classes=4, embedding_dim=8)
    assert type(loss).__name__ == "Dummy" and loss.options.power == 3 and isinstance(loss.options, type(loss).Options)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(cfg))
    again = load_config(copy, [f"run.name={cfg.run.name}"])
    assert again == cfg and again.digest() == cfg.digest()
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    for only, config in (("beside_it:Dummy", None), ("loss", cfg)):
        text = describe_keys(only, config)
        assert "loss.name = beside_it:Dummy: A loss of somebody else." in text
        assert "  loss.power = 2.0\n      Of the distance between a positive pair." in text
    assert "beside_it:Dummy" not in describe_keys()
    # Without docstrings: neither what it inherits nor None.
    lines = describe_keys("beside_it:Bare").split("\n")
    assert lines[0] == "loss.name = beside_it:Bare" and lines[-1] == "  loss.sizes = [1, 2]"


def test_what_is_wrong_with_a_part_of_somebody_else(tmp_path: Path) -> None:
    path = write(tmp_path, "wrong_one")
    assert message(path, "loss.pover=1").endswith(
        "  loss.pover: unknown key; did you mean 'loss.power'? wrong_one:Dummy has memory, memory_from, power, label"
    )
    assert "loss.power: Input should be greater than 0 (got -1)" in message(path, "loss.power=-1")
    assert "loss.margin: belongs to margin and " in message(path, "loss.margin=1")
    assert "has no class Dumy; did you mean Dummy?" in message(path, "loss.name=wrong_one:Dumy")
    assert "wrong_one:Nothing is no loss; derive the class from dnc_dist.loss.base.Loss" in message(path, "loss.name=wrong_one:Nothing")
    assert "wrong_one:Unfinished lacks anchor_values, which every class of its kind has to" in message(
        path, "loss.name=wrong_one:Unfinished"
    )
    assert "wrong_one:Dummy is no mask; derive the class from dnc_dist.model.masks.base.SubspaceMasks" in message(
        path, "model.masks=wrong_one:Dummy"
    )
    assert f"loss.name: there is no module nowhere_at_all in {tmp_path} or in " in message(path, "loss.name=nowhere_at_all:X")
    assert "'a:b:c' is no module:Class; write for example" in message(path, "loss.name=a:b:c")
    (tmp_path / "broken_one.py").write_text("1 / 0")
    assert "broken_one cannot be imported (ZeroDivisionError: division by zero)" in message(path, "loss.name=broken_one:X")
    (tmp_path / "needs_more.py").write_text("import a_package_that_nobody_has")
    (tmp_path / "ends_itself.py").write_text("import sys; sys.exit('usage')")
    assert "ends_itself cannot be imported (SystemExit: usage)" in message(path, "loss.name=ends_itself:X")
    for hidden, said in (("types", "types is a module of Python's standard library"), ("yaml", f"it hides {tmp_path / 'yaml.py'}; rename")):
        (tmp_path / f"{hidden}.py").write_text(LOSS)
        assert said in message(path, f"loss.name={hidden}:Dummy")
    assert "dnc-dist has no module dnc_dist.loss.nothing" in message(path, "loss.name=dnc_dist.loss.nothing:X")
    assert "has no class Margin; did you mean MarginLoss?" in message(path, "loss.name=dnc_dist.loss.margin:Margin")
    assert "PairwiseLoss lacks anchor_values" in message(path, "loss.name=dnc_dist.loss.pairwise:PairwiseLoss")
    assert "'a..b:X' is no module:Class" in message(path, "loss.name=a..b:X")
    assert "needs_more needs the package a_package_that_nobody_has, which is not" in message(path, "loss.name=needs_more:X")
    with pytest.raises(InputError, match=r"wrong_one:Nothing is no loss"):
        describe_keys("wrong_one:Nothing")


def test_a_part_inherits_options_and_takes_them_by_mapping(tmp_path: Path) -> None:
    (tmp_path / "other_net.py").write_text(
        "from dnc_dist.base import parts\n"
        "from dnc_dist.model.backbone import Backbone\n"
        "class Net(Backbone):\n"
        "    class Options(parts.Options):\n"
        "        width: int = 3\n"
        "    def forward(self, images):\n"
        "        return images.mean((2, 3))\n"
        "class Same(Net):\n"
        "    pass\n"
    )
    path = tmp_path / "exp.yaml"
    path.write_text("data: {root: images}\nmodel: {backbone: 'other_net:Same'}\n")
    plain, wide = load_config(path), load_config(path, ["model.backbone.width=5"])
    assert yaml.safe_load(dump_config(plain))["model"]["backbone"] == "other_net:Same"
    assert yaml.safe_load(dump_config(wide))["model"]["backbone"] == {"name": "other_net:Same", "width": 5}
    assert plain.digest() != wide.digest()


@pytest.mark.parametrize(
    ("start", "name", "said"),
    [
        ("elsewhere", "stranger:X", "there is no module stranger in"),
        ("runs/run", "stranger:X", "there is no module stranger among the installed packages"),
        (".", "runs.run.stranger:X", r"the module runs.run.stranger lies in a run directory"),
        ("runs", "run.stranger:X", "the module run.stranger lies in a run directory"),
        ("linked", "stranger:X", "the module stranger lies in a run directory"),
        (".", "dnc_dist./proc/self/cwd/runs/run/stranger:X", "is no module:Class"),
        (".", "antigravity:X", "antigravity is a module of Python's standard library"),
    ],
)
def test_a_run_directory_brings_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, name: str, said: str) -> None:
    """Not from inside of it, not by the names of its folders, not by a link, not by a name that is a path."""
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    canary = f"open({str(tmp_path / 'canary')!r}, 'w')"
    (run / "stranger.py").write_text(f"class X:\n    class Options:\n        y = {canary}\n")
    (run / "__init__.py").write_text(canary)
    (run / "config.yaml").write_text(f"data: {{root: images}}\nloss: {{name: '{name}'}}\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "stranger.py").symlink_to(run / "stranger.py")
    monkeypatch.chdir(tmp_path / start)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(part_modules, "_folders", [])
    monkeypatch.setattr(part_modules, "_refused", [])
    with pytest.raises(InputError, match=said):
        load_run_config(run)
    assert not (tmp_path / "canary").exists()
    assert str(run) not in sys.path


def test_doctor_parity_of_a_configuration(tmp_path: Path) -> None:
    """Of a loss that the table does not know, with masks and learners of the configuration."""
    write(tmp_path, "for_doctor", division={"learners_per_step": 2})
    done = dnc("doctor", "parity", "exp.yaml", "--nproc", "2", "--json", "--set", "loss.power=1.5", folder=tmp_path)
    assert done.code == 0, done
    values = json.loads(done.out)
    names = [check["name"] for check in values["checks"]]
    # 2 of BatchNorm, 1 or 2 learners, 3 layouts of the rows; and the DeepSpeed engine.
    assert len(values["cases"]) == 2 * 2 * 3 + 1 and 0 < values["max_relative_error_gradient"] < values["limit"]
    assert names[0] == "for_doctor:Dummy power=1.5, learned masks" and len(names) == 2
