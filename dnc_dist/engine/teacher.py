"""The network as it was when conquering began, for learners that teach what they knew then."""

from __future__ import annotations

import copy

from torch import nn

from dnc_dist.model.embedding import EmbeddingHead


class FrozenTeacher(nn.Module):
    """A copy of backbone and embedding layer that is never trained: always in evaluation mode, without gradients.

    It is there from the start of a run, so that all checkpoints of the run hold the same names, and takes its weights when conquering
    begins. A batch shows it the same augmented images as the network that it teaches.
    """

    def __init__(self, backbone: nn.Module, head: EmbeddingHead) -> None:
        super().__init__()
        self.backbone, self.head = copy.deepcopy(backbone), copy.deepcopy(head)
        self.requires_grad_(False).eval()

    def take(self, backbone: nn.Module, head: EmbeddingHead) -> None:
        """Become what these are now."""
        self.backbone.load_state_dict(backbone.state_dict())
        self.head.load_state_dict(head.state_dict())

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in evaluation mode, whatever the training does."""
        super().train(False)
        return self
