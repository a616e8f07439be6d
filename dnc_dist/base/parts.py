"""Parts: whatever a configuration chooses by name. A part is one class in one file, with its options as a class inside it.

Names stand in ``TABLE`` alone; ``package.module:Class`` takes anybody's class. The options of our own parts are read from the text of
their files, without importing these: most import torch, and ``--help`` and ``config`` have to answer at once.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Base of all options: unknown keys are refused, values cannot change, field docstrings are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)


TABLE: dict[str, dict[str, str]] = {
    "loss": {
        "margin": "dnc_dist.loss.margin:MarginLoss",
        "proxy_anchor": "dnc_dist.loss.proxy_anchor:ProxyAnchorLoss",
    },
}
"""Kind of part -> short name -> ``module:Class``."""
