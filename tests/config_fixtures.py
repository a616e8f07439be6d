"""Configurations for tests: a file, the smallest one, and the message of one that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dnc_dist.config import ConfigError, load_config


def write(folder: Path, text: str) -> Path:
    path = folder / "exp.yaml"
    path.write_text(text)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)
