"""Exponential moving average of the trainable weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """a <- m a + (1 - m) w after each step, m = min(decay, (1 + t) / (10 + t)) so that early weights do not linger.

    Only parameters that train are averaged; buffers are as the last step left them.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self._updates = 0
        self._values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's present weights."""
        self._updates += 1
        share = 1 - min(self._decay, (1 + self._updates) / (10 + self._updates))
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(list(self._values.values()), [parameters[n] for n in self._values], share)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the averages into the model."""
        parameters = dict(model.named_parameters())
        for name, value in self._values.items():
            parameters[name].copy_(value)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """For the resume file."""
        return {"updates": self._updates, "values": dict(self._values)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over a saved average."""
        updates, values = state["updates"], state["values"]
        if not isinstance(updates, int) or not isinstance(values, dict):
            raise TypeError("not the state of a weight average")
        self._updates = updates
        for name, value in self._values.items():
            value.copy_(values[name])
