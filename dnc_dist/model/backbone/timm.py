"""Backbones of timm: every name that is no other backbone's is one of a model of timm."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

from torch import Tensor, nn

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.model.backbone.base import Backbone, Pooling, pool
from dnc_dist.model.pretrained import hub_address, load_pretrained


class TimmBackbone(Backbone):
    """A timm model without its classifier, with our pooling over positions (patch tokens, for a transformer).

    (B, 3, H, W) -> (B, F)

    Raises:
        InputError: timm knows no model of that name, or its weights cannot be had.
    """

    class Options(parts.Named):
        """The name alone: that of the model."""

    def __init__(self, options: Options, *, pretrained: bool, pooling: Pooling = "avg") -> None:
        super().__init__(options, pretrained=pretrained, pooling=pooling)
        self.network = _network(options.name, pretrained)
        self.feature_dim = getattr(self.network, "head_hidden_size", None) or self.network.num_features
        self.num_prefix_tokens = int(getattr(self.network, "num_prefix_tokens", 0))

    def network_of_weights(self) -> nn.Module:
        return self.network

    def forward(self, images: Tensor) -> Tensor:
        maps = self.network(images)
        if maps.dim() == 2:  # a network that pools whatever it is told
            return maps
        if maps.dim() == 3:
            return pool(maps[:, self.num_prefix_tokens :].transpose(1, 2), self.pooling)
        channels_first = maps if maps.shape[1] == self.feature_dim else maps.permute(0, 3, 1, 2)
        return pool(channels_first.flatten(2), self.pooling)


def _network(name: str, pretrained: bool) -> Any:
    import timm  # 2.4 s: only for those who ask for it

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [*parts.TABLE["backbone"], *timm.list_models()], n=4)
        hint = f"did you mean {' or '.join(close)}?" if close else "`timm.list_models()` lists them"
        own = ", ".join(parts.TABLE["backbone"])
        raise InputError(f"model.backbone={name} is neither {own} nor a model of timm {timm.__version__}; {hint}")
    source = timm.get_pretrained_cfg(name)
    hub, address = (source.hf_hub_id, source.url) if source is not None else (None, None)
    address = hub_address(hub) if hub else str(address) if address else None
    create = partial(timm.create_model, name, pretrained=pretrained, num_classes=0, global_pool="")
    return load_pretrained(name, create, address) if pretrained else create()
