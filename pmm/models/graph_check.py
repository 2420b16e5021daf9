"""What a graph of operators from a file would make, found without making it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from pmm.models.pure_operators import ON_NUMBERS, check_numbers

IMAGES = 64
"""Enough to notice what grows faster than their number."""
MOST_ELEMENTS = 1 << 33
"""Of one tensor for so many images; more is no image network, or one that no machine runs."""
MOST = 1 << 62
"""Of a number that is computed from sizes."""


def output_of(graph: fx.GraphModule, height: int, width: int) -> Tensor:
    """A tensor without memory, as `graph` returns it for float32 images [`IMAGES`, 3, H, W].

    Raises ValueError if it cannot run on them, or would need endless memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    shape = [IMAGES, 3, height, width]
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            output = _Bounded(graph).run(torch.empty(shape))
    except Exception as error:  # a graph from a file may do anything
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise ValueError(f"it cannot run on images {shape} ({type(error).__name__}: {reason})") from error
    if not isinstance(output, Tensor):
        raise ValueError(f"its output is of type {type(output).__name__}, not a tensor")
    return output


class _Bounded(fx.Interpreter):
    """Runs no node on what is no number, and stops at the first tensor or number that is too large."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and getattr(n.target, "__name__", "") in ON_NUMBERS:
            check_numbers(n, self.fetch_args_kwargs_from_env(n)[0])
        result = super().run_node(n)
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor) and value.numel() > MOST_ELEMENTS:
                raise ValueError(f"{n.name} has {value.numel():,} elements")
            if isinstance(value, int | float) and abs(value) > MOST:
                raise ValueError(f"{n.name} is a number of more than {MOST.bit_length()} bits")
        return result
