"""The configuration: ``keys`` has every key with its default and meaning, ``tree`` all of them and what has to fit together, ``reading``
makes one of a file and of ``--set``."""

from dnc_dist.config.keys import Model
from dnc_dist.config.reading import ConfigError, dump_config, load_config, parse_tree
from dnc_dist.config.tree import MACHINE_KEYS, RunConfig, choices, chosen, sections

__all__ = [
    "MACHINE_KEYS",
    "ConfigError",
    "Model",
    "RunConfig",
    "choices",
    "chosen",
    "dump_config",
    "load_config",
    "parse_tree",
    "sections",
]
