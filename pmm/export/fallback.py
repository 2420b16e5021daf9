"""As many layers stay in fp32, those that cost most, as an export needs to pass: of int8 and of half precision alike.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from pmm.export.options import MIN_SHARE_WITH_KEPT
from pmm.export.parity_check import ParityFailed
from pmm.export.precision import onnx_precision

if TYPE_CHECKING:
    import onnx


class Converter(Protocol):
    """Puts a graph into a precision, with any of its layers kept in fp32."""

    @property
    def precision(self) -> str:
        """As --precision names it."""

    def build(self, keep: Collection[str] = ()) -> onnx.ModelProto:
        """The converted graph; the layers `keep`, and those that go with them, stay in fp32."""

    def with_dependencies(self, layers: Collection[str]) -> list[str]:
        """`layers`, and those that have to stay in fp32 for these to stay."""

    def by_cost(self, probes: Sequence[npt.NDArray[Any]]) -> list[str]:
        """The layers, from the one that harms the embeddings of `probes` most."""


def convert_with_fallback(
    converter: Converter,
    passes: Callable[[onnx.ModelProto], None],
    probes: Sequence[npt.NDArray[Any]],
    *,
    fewest: bool = False,
) -> tuple[onnx.ModelProto, list[str]]:
    """The converted graph and the layers that had to stay in fp32 for it to pass, most costly first.

    Args:
        passes: raises ParityFailed for a graph whose embeddings moved too far.
        probes: batches of a few images; what each layer costs is measured on them.
        fewest: keep none that it passes without, at the price of further attempts.

    Raises:
        ParityFailed: it does not pass with most of the multiplications in the converter's precision.
    """
    ranked: list[str] = []
    found: tuple[onnx.ModelProto, int] | None = None
    failure = ParityFailed(f"too few layers can be in {converter.precision}")
    failed, count = -1, 0
    while True:
        proto = converter.build(ranked[:count])
        share = onnx_precision(proto).share.get(converter.precision, 0.0)
        if share < MIN_SHARE_WITH_KEPT or failed == count:
            kept = len(converter.with_dependencies(ranked[:count]))
            failure.problem += f", with {kept} of {len(ranked)} layers kept in fp32"
            raise failure
        try:
            passes(proto)
            found = proto, count
        except ParityFailed as error:
            failure, failed = error, count
        if found and (found[1] - failed == 1 or not fewest):
            return found[0], converter.with_dependencies(ranked[: found[1]])
        ranked = ranked or converter.by_cost(probes)
        count = (failed + found[1]) // 2 if found else min(count + max(1, count // 2), len(ranked))
