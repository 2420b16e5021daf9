"""An exponential average of a model's weights over the steps of training (EMA)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of a model's weights and batch statistics, which is evaluated and deployed in their place.

    After step n = 1, 2, ... it is d * average + (1 - d) * weights with d = min(decay, (1 + n) / (10 + n)): the first
    weights, which are random, are soon forgotten, also by a run of fewer steps than 1 / (1 - decay).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begins at the weights that `model` has; they may change in place, and `model` may not move."""
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.steps = decay, 0
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self._floats = _transposed(pair for pair in pairs if pair[0].is_floating_point())
        self._counters = _transposed(pair for pair in pairs if not pair[0].is_floating_point())

    def update(self) -> None:
        """Add the weights after a step, without waiting for the device."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(*self._floats, weight)  # a few kernels for all weights, as torch.optim.swa_utils does
        if self._counters[0]:  # which norms of batches have, others not
            torch._foreach_copy_(*self._counters)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the averages by name as "model"."""
        return {"steps": self.steps, "model": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.steps = state["steps"]
        self.module.load_state_dict(state["model"])


def _transposed(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    listed = list(pairs)
    return [average for average, _ in listed], [value for _, value in listed]
