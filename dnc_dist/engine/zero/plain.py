"""The engine of one process: a training step in plain torch, with the face of DeepSpeed's engine and its checkpoints.

One process has nothing to partition and nobody to add gradients up with. There DeepSpeed only costs time (a fifth of a step, more of a
small network) and seconds to import. The steps are those of its engine: parameters without a gradient get zeros, the gradient is
clipped by the norm of all parts together, then the optimizer takes its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dnc_dist.engine.optimizer import WaitingAdamW
from dnc_dist.engine.zero.layout import BASE_OPTIMIZER_STATE, MODEL, OPTIMIZER_STATE_DICT, PARTITION, SINGLE_PARTITION_OF_FP32_GROUPS
from dnc_dist.processes.transfer import EndToEnd


class PlainEngine:
    """What of DeepSpeed's engine a training uses, for one process.

    Args:
        module: what is trained; a call of the engine is a call of it.
        optimizer: of its parameters.
        clip_gradient: the most that the norm of all gradients together may be; 0: as large as it is.
        zero: the ZeRO stage of the configuration. It only says how checkpoints are laid out, so that several processes can go on.
    """

    def __init__(self, module: nn.Module, optimizer: WaitingAdamW, *, clip_gradient: float, zero: int) -> None:
        self.module, self.optimizer, self.zero = module, optimizer, zero
        self.clip_gradient = clip_gradient
        self.gradient_norm = torch.zeros(())
        """0-d, on the device: norm of all gradients of the last step together, before clipping."""

    def __call__(self, *args: Any) -> Any:
        """What the module returns."""
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss () to those of the parameters."""
        loss.backward()

    def step(self) -> None:
        """One update of the parameters, by the gradients since the last one."""
        groups = self.optimizer.param_groups
        for group in groups:
            if group["lr"] != 0:
                for parameter in group["params"]:
                    # As in DeepSpeed: its moments go on, and so does its weight decay.
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        trained = [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm([parameter.grad for parameter in trained])
        if self.clip_gradient > 0:
            nn.utils.clip_grads_with_norm_(trained, self.clip_gradient, self.gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage whose layout the checkpoints have."""
        return self.zero

    def files(self, client_state: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint's files hold, by name, as DeepSpeed's at this stage: from 1 on the optimizer's state is the partition of one
        process. The tensors are those that are trained, not copies."""
        state = None if self.zero else self.optimizer.state_dict()
        found: dict[str, Any] = {MODEL: {"module": self.module.state_dict(), "optimizer": state, **client_state}}
        if self.zero:
            found[PARTITION.format(0)] = {OPTIMIZER_STATE_DICT: self._partition()}
        return found

    def load_moments(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take over the state of each group, its parameters end to end as ``files`` lays them; before the first step there is none."""
        parameters: dict[int, dict[str, Tensor]] = {}
        for number, group in enumerate(self.optimizer.param_groups):
            sizes = [parameter.numel() for parameter in group["params"]]
            pieces = {name: value.split(sizes) if value.dim() else [value] * len(sizes) for name, value in states[number].items()}
            for place, parameter in enumerate(group["params"]):
                # A copy for each: the step count is one tensor for all, and vectors would stay together in memory.
                state = {name: piece[place].clone() for name, piece in pieces.items()}
                parameters[len(parameters)] = {name: value.view_as(parameter) if value.dim() else value for name, value in state.items()}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": {n: state for n, state in parameters.items() if state}})

    def _partition(self) -> dict[str, Any]:
        """Weights and optimizer state of every group, its parameters end to end."""
        weights, states, options = [], {}, []
        for number, group in enumerate(self.optimizer.param_groups):
            weights.append(EndToEnd(group["params"]))
            own = [self.optimizer.state.get(parameter, {}) for parameter in group["params"]]
            if own[0]:  # all of a group take their first step together
                states[number] = {
                    name: EndToEnd([state[name] for state in own]) if value.dim() else value for name, value in own[0].items()
                }
            options.append(group | {"params": [number]})
        return {BASE_OPTIMIZER_STATE: {"state": states, "param_groups": options}, SINGLE_PARTITION_OF_FP32_GROUPS: weights}
