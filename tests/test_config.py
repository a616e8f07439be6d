"""The configuration: what is refused and in which words, what is filled in, and that it can be written and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dnc_dist.base import part_text, parts
from dnc_dist.base.errors import InputError
from dnc_dist.config import ConfigError, RunConfig, choices, dump_config, load_config, sections
from dnc_dist.keys import describe_keys
from tests.config_fixtures import message, write


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, "data: {root: images}\n")


def test_one_key_is_enough_and_the_run_is_named_after_the_file(minimal: Path) -> None:
    cfg = load_config(minimal)
    assert cfg.run.path == Path("runs/exp")
    assert cfg.data.root == Path("images")
    assert cfg.loss.name == "margin"


def test_all_problems_at_once_with_their_paths(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {root: images}\nmodel: {embeding_dim: 64}\ndivision: {num_learners: four}\noptim: {lr: -1}\n")
    assert message(path) == "\n".join(
        [
            f"{path}: 3 problem(s)",
            "  model.embeding_dim: unknown key; did you mean 'model.embedding_dim'?",
            "  division.num_learners: Input should be a valid integer, unable to parse string as an integer (got 'four')",
            "  optim.lr: Input should be greater than 0 (got -1)",
        ]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: {backbone: x}", "modle: unknown key; did you mean 'model'?"),
        ("lr: 0.1", "lr: unknown key; did you mean 'optim.lr'?"),
        ("schedule: {batch: 8}", "schedule.batch: unknown key; did you mean 'schedule.batch_size'?"),
        ("loss: {name: proxy_anchor, scal: 9}", "loss.scal: unknown key; did you mean 'loss.scale'? proxy_anchor has margin, scale"),
        ("model: {masks: {name: learned, x: 1}}", "model.masks.x: unknown key; learned has split_scale"),
        ("zzzzzz: 1", "zzzzzz: unknown key; `dnc-dist config --keys` lists all keys"),
        ("run: {name: ..}", "run.name: letters, digits and . _ + - only, as it names a folder in run.dir (got '..')"),
        ("schedule: {batch_size: [8]}", "schedule.batch_size: Input should be a valid integer (got [8])"),
        ("optim: {lr: .nan}", "optim.lr: Input should be a finite number (got nan)"),
    ],
)
def test_the_words_of_one_problem(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, f"data: {{root: images}}\n{text}\n")
    assert message(path) == f"{path}: 1 problem(s)\n  {expected}"


def test_a_missing_key_says_how_to_set_it(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {crop: 1}\n")
    assert message(path) == f"{path}: 1 problem(s)\n  data.root: missing; set it in the file or with --set data.root=VALUE"


def test_set_creates_sections_and_reads_values_as_yaml(minimal: Path) -> None:
    cfg = load_config(
        minimal,
        [
            "optim.lr=1e-3",
            "division.conquer_from=null",
            "evaluation.recall_at=[1, 10]",
            "run.name=other",
            "data.root=/a=b",
            "optim.lr=2e-3",
        ],
    )
    assert cfg.optim.lr == 0.002, "the later --set holds"
    assert cfg.division.conquer_from is None
    assert cfg.evaluation.recall_at == (1, 10)
    assert cfg.run.path == Path("runs/other")
    assert cfg.data.root == Path("/a=b")


def test_the_loss_is_chosen_by_name(minimal: Path) -> None:
    loss = load_config(minimal, ["loss.name=proxy_anchor", "loss.scale=16"]).loss
    assert loss.model_dump() == {"name": "proxy_anchor", "margin": 0.1, "scale": 16}
    assert load_config(minimal, ["loss=proxy_anchor", "loss.scale=16"]).loss == loss
    assert load_config(minimal, ["loss.beta=0.9"]).loss.model_dump(exclude_defaults=True) == {"name": "margin", "beta": 0.9}
    text = message(minimal, "loss.name=proxy_anchor", "loss.beta=0.9")
    assert "  loss.beta: belongs to margin and multi_similarity, not to proxy_anchor; proxy_anchor has margin, scale" in text
    assert "  loss.name: 'marginn' is no loss; did you mean margin? Allowed are margin, proxy_anchor, " in message(
        minimal, "loss.name=marginn"
    )


def test_a_part_is_chosen_by_a_name_or_with_options(minimal: Path) -> None:
    cfg = load_config(minimal, ["model.backbone=resnet18", "model.masks.name=fixed", "data.augment={name: light}"])
    assert (cfg.model.backbone.name, cfg.model.masks.name, cfg.data.augment.name) == ("resnet18", "fixed", "light")
    tree = yaml.safe_load(dump_config(cfg))
    assert (tree["model"]["backbone"], tree["model"]["masks"], tree["data"]["augment"]) == ("resnet18", "fixed", "light")
    assert message(minimal, "model.masks=lerned").endswith(
        "  model.masks: 'lerned' is no mask; did you mean learned? Allowed are learned, fixed, sliced, or module:Class of your own"
    )
    assert message(minimal, "tracker.kind=3").endswith(
        "  tracker.kind: '3' is no tracker; allowed are wandb, tensorboard, jsonl, or module:Class of your own"
    )
    assert message(minimal, "data.protocol=[a]").endswith("  data.protocol: must be a name, or `name` with options")
    assert message(minimal, "data.protocol={name: [a]}").endswith("  data.protocol.name: must be the name of one, or module:Class")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "--set optim.lr: expected key=value, for example --set optim.lr=0.001"),
        ("=3", "--set =3: expected key=value, for example --set optim.lr=0.001"),
        ("data.root.x=3", "--set data.root.x=3: 'root' is a value, not a section"),
    ],
)
def test_an_override_that_cannot_be_applied(minimal: Path, override: str, expected: str) -> None:
    assert message(minimal, override) == expected


def test_an_override_that_is_no_yaml(minimal: Path) -> None:
    assert message(minimal, "optim.lr=[1").startswith("--set optim.lr=[1: the value is not valid YAML (")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert message(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such configuration file; see configs/ for examples"
    assert message(tmp_path) == f"{tmp_path} is no regular file; give a file"
    assert message(write(tmp_path, "a: [1")).startswith(f"{tmp_path}/exp.yaml: cannot be read as YAML (")
    assert message(write(tmp_path, "- 1")) == f"{tmp_path}/exp.yaml: expected sections such as `data:` and `model:`, got list"


@pytest.mark.parametrize(
    "overrides", [[], ["loss.name=proxy_anchor"], ["division.conquer_from=9", "loss.effective_dim=64", "optim.lr=1e-7"]]
)
def test_what_is_written_reads_back_equal(minimal: Path, tmp_path: Path, overrides: list[str]) -> None:
    cfg = load_config(minimal, overrides)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(cfg))
    again = load_config(copy)
    assert again == cfg
    assert again.digest() == cfg.digest()


def test_the_digest_sees_what_decides_the_result(minimal: Path) -> None:
    digest = load_config(minimal).digest()
    assert load_config(minimal, ["run.name=x", "run.dir=/tmp", "tracker.kind=jsonl", "checkpoint.keep=5"]).digest() == digest
    assert load_config(minimal, ["run.seed=1"]).digest() != digest
    assert load_config(minimal, ["loss.margin=0.3"]).digest() != digest


def test_the_tree_is_frozen(minimal: Path) -> None:
    cfg = load_config(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        cfg.run.seed = 3  # type: ignore[misc]


def test_the_reference_has_every_key_with_a_meaning() -> None:
    text = describe_keys()
    assert "None" not in text
    for name, model in sections().items():
        assert model.__doc__ and f"{name}: {model.__doc__}" in text
        meanings = part_text.docstrings(model.__module__, model.__name__)
        for key in model.model_fields:
            assert meanings.get(key), f"{name}.{key} has no docstring"
            assert f"  {name}.{key} = " in text
            assert " ".join(meanings[key].split()) in " ".join(text.split())
    paths = {choice.kind: path for path, choice in choices().items()} | {"reader": "--set "}
    for kind, table in parts.TABLE.items():
        for name in table:
            assert parts.summary(kind, name) and f" {name}: {parts.summary(kind, name)}\n" in f"{text}\n", (kind, name)
            for key, field in parts.options_of(kind, name).items():
                assert field.description and f"\n      {field.description}" in text, (kind, name, key)
                assert f"  {paths[kind]}{'' if kind == 'reader' else '.'}{key} = " in text


def test_a_word_chooses_from_the_reference() -> None:
    assert describe_keys("loss.beta").startswith("loss.name = margin: ") and "proxy_anchor" not in describe_keys("loss.beta")
    assert describe_keys("optim.lr").startswith("optim: ")
    for word, meant in (
        ("margn", "did you mean margin?"),
        ("optim.lrr", "did you mean optim.lr?"),
        ("zzzzzz", "; sections and kinds are run"),
    ):
        with pytest.raises(InputError, match="is no section, key, kind of part or part") as caught:
            describe_keys(word)
        assert meant in str(caught.value)


def test_every_default_is_plain_yaml(minimal: Path) -> None:
    def leaves(tree: Any) -> list[Any]:
        return (
            [leaf for child in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(child)]
            if isinstance(tree, dict | list)
            else [tree]
        )

    tree = yaml.safe_load(dump_config(load_config(minimal)))
    assert list(tree) == list(RunConfig.model_fields)
    assert {type(leaf) for leaf in leaves(tree)} <= {str, int, float, bool, type(None)}


def load(folder: Path, text: str) -> Any:
    """The configuration of a file with this below its only required key."""
    return load_config(write(folder, f"data:\n  root: images\n{text}\n"))


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("run: {name: 2024-02-20}", "run.name", "2024-02-20"),
        ("run: {name: 007}", "run.name", "007"),
        ("run: {name: 1e3}", "run.name", "1e3"),
        ("run: {name: true}", "run.name", "true"),
        ("run: {name: 1_000}", "run.name", "1_000"),
        ("run: {name: ~}", "run.name", "exp"),
        ("run: {dir: 3}", "run.dir", Path("3")),
        ("run: {dir: 12:30}", "run.dir", Path("12:30")),
        ("  cache: 2024", "data.cache", Path("2024")),
        ("  cache: null", "data.cache", None),
        ("model: {weights: none}", "model.weights", "none"),
        ("model: {backbone: 'no'}", "model.backbone.name", "no"),
        ("model: {backbone: 2024-02-20}", "model.backbone.name", "2024-02-20"),
        ("tracker: {project: on}", "tracker.project", "on"),
        ("tracker: {project: !!str 3}", "tracker.project", "3"),
        ("optim: {lr: 1e-5}", "optim.lr", 1e-5),
        ("optim: {lr: .5}", "optim.lr", 0.5),
        ("schedule: {epochs: 1_000}", "schedule.epochs", 1000),
        ("schedule: {epochs: '4'}", "schedule.epochs", 4),
        ("evaluation: {at_start: True}", "evaluation.at_start", True),
        ("base: &a {lr: 0.5}", None, "base: unknown key; `dnc-dist config --keys` lists all keys"),
        ("optim: &a {lr: 0.5}\nschedule: {<<: *a, epochs: 3}", None, "schedule.lr: unknown key"),
        ("optim: {<<: {lr: 0.5}, lr: 0.25}", "optim.lr", 0.25),
        ("optim: {lr: 0.5, <<: [{lr: 0.1, weight_decay: 1}, {weight_decay: 2}]}", "optim.weight_decay", 1),
        ("optim: {lr: 1e400}", None, "optim.lr: Input should be a finite number (got inf)"),
        ("optim: {lr: true}", None, "optim.lr: must not be true or false (got True)"),
        ("run: {seed: false}", None, "run.seed: must not be true or false (got False)"),
        ("evaluation: {recall_at: [true, 2]}", None, "evaluation.recall_at: must not be true or false (got [True, 2])"),
        ("run: {seed: 9223372036854775808}", None, "run.seed: must be 9223372036854775807 at most, the largest integer of 64 bits"),
        ("evaluation: {at_start: 1}", None, "evaluation.at_start: must be true or false (got 1)"),
        ("evaluation: {at_start: yes}", None, "evaluation.at_start: must be true or false (got 'yes')"),
    ],
)  # fmt: skip
def test_what_a_value_means(tmp_path: Path, text: str, key: str | None, expected: Any) -> None:
    if key is None:
        with pytest.raises(ConfigError) as caught:
            load(tmp_path, text)
        assert str(caught.value).count("\n") == 1 and expected in str(caught.value)
    else:
        found = load(tmp_path, text)
        for name in key.split("."):
            found = getattr(found, name)
        assert found == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lr: 0.1}\noptim: {lr: 1}", "line 4: the key 'optim' stands already in line 3; keep one of them"),
        ("optim:\n  lr: 0.1\n  weight_decay: 0\n  lr: 1e-5", "line 6: the key 'lr' stands already in line 4; keep one of them"),
        ("run: {seed: !!int abc}", "line 3, column 13: the tag 'tag:yaml.org,2002:int' is not read; write the value without it"),
        ("run: {name: !!python/name:os.system x}", "the tag 'tag:yaml.org,2002:python/name:os.system' is not read"),
        ("run: !!python/object/apply:os.system ['touch canary']", "is not read; write the value without it"),
        ("run: !mine {a: 1}", "the tag '!mine' is not read"),
        ("run: {name: !!binary aGk=}", "is not read"),
        ("? [1, 2]\n: 3", "line 3, column 3: a key must be text"),
        (f"run: {'[' * 3000}", "nested more than 20 levels deep"),
        (f"run: {'{a: ' * 3000}", "nested more than 20 levels deep"),
        ("run: &a [*a]", "more than 20 levels"),
        ("\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 19))]), "more than 10,000 values"),
        ("\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 19))]), "more than 10,000 values"),
        ("run: &a {<<: *a}", "more than 20 levels"),
        ("run: {<<: 3}", "`<<` takes the keys of a section"),
        ('run: {dir: "a\\0b"}', "line 3, column 12: 'a\\x00b' holds a character that no text has"),
        ('run: {dir: "a\\ud800b"}', "holds a character that no text has"),
        ("run: {name: 'a", "found unexpected end of stream"),
        ("a: b: c", "line 3, column 5: mapping values are not allowed here"),
        ("run: *nobody", "found undefined alias"),
        ("---\nrun: {}", "but found another document"),
        ("\x01", "special characters are not allowed"),
        ("run: {seed: " + "9" * 5000 + "}", "run.seed: Input should be a finite number (got inf)"),
        ("#" * (1 << 18), " bytes, at most 262,144 are read"),
    ],
)  # fmt: skip
def test_what_no_configuration_needs_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert expected in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/exp.yaml") and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"data: {root: caf\xe9}", "is not UTF-8 text"),
        (bytes(range(256)), "is not UTF-8 text"),
        (b"false", "got bool"),
        (b"[]", "got list"),
    ],
)
def test_bytes_that_are_no_configuration(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "exp.yaml"
    path.write_bytes(content)
    assert expected in message(path)


def test_a_configuration_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_bytes(b"\xef\xbb\xbfdata: {root: images}\r\n")
    assert load_config(path).data.root == Path("images")


@pytest.mark.parametrize(
    ("file", "name"), [("my config.yaml", "my-config"), ("a(1).yaml", "a-1-"), ("größe.yaml", "größe"), ("x.y.yaml", "x.y")]
)
def test_a_run_is_named_after_any_file(tmp_path: Path, file: str, name: str) -> None:
    path = tmp_path / file
    path.write_text("data: {root: images}\n")
    assert load_config(path).run.name == name


def test_overrides_are_read_like_the_file(minimal: Path) -> None:
    cfg = load_config(minimal, ["run.name=2024-02-20", "data.root=3", "run={dir: 07}"])
    assert (cfg.run.name, cfg.data.root, cfg.run.dir) == ("exp", Path("3"), Path("07"))
    assert message(minimal, "optim.lr=!!int abc") == (
        "--set optim.lr=!!int abc: the value is not valid YAML (line 1, column 1: the tag 'tag:yaml.org,2002:int' is not read; "
        "write the value without it)"
    )
