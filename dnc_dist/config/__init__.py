"""The configuration: ``tree`` has every key with its default and meaning, ``reading`` makes one of a file and of ``--set``."""

from dnc_dist.config.reading import ConfigError, dump_config, load_config, parse_tree
from dnc_dist.config.tree import Model, RunConfig, choices, chosen, sections

__all__ = [
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
