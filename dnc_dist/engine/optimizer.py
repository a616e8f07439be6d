"""AdamW whose groups *wait* while their learning rate is 0."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class WaitingAdamW(torch.optim.AdamW):
    """AdamW that leaves a group with learning rate 0 alone: parameters, moments and step count stay as they are.

    Parameters without a gradient are given zeros. Plain Adam would let the moments of a frozen group decay towards
    zero with them (the second moment slower than the first), and its first updates afterwards would be several times too large.
    """

    # torch marks these methods for its compiler, and a mark imports the compiler at the first call: seconds, and nothing here is compiled.
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    _load_values = inspect.unwrap(torch.optim.AdamW.load_state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, whatever memory layout its moments were saved in."""
        self._load_values(state_dict)
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state and state[name].stride() != parameter.stride():
                    # One kernel walks through a parameter and its moments together.
                    state[name] = torch.empty_like(parameter, requires_grad=False).copy_(state[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the groups whose learning rate is not 0."""
        groups = self.param_groups
        for group in groups:
            if group["lr"] == 0:
                self._allocate_state(group)
        self.param_groups = [group for group in groups if group["lr"] != 0]
        try:
            return inspect.unwrap(torch.optim.AdamW.step)(self, closure)
        finally:
            self.param_groups = groups

    def largest_square(self) -> Tensor:
        """0-d, on the device: the largest second moment that this rank holds; not finite once a gradient, or its square, was not."""
        return nn.utils.get_total_norm([state["exp_avg_sq"] for state in self.state.values() if state], float("inf"))

    def _allocate_state(self, group: dict[str, Any]) -> None:
        """State of zeros for parameters that have none: DeepSpeed links the state of every group after the first step."""
        for parameter in group["params"]:
            if not self.state[parameter]:
                count = torch.zeros((), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu")
                self.state[parameter].update(step=count, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
