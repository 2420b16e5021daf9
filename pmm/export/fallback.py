"""The layers that cost most accuracy stay in fp32, as many as an export needs to pass; for int8 and half precision.

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

ALLOWANCE_WITH_KEPT = 0.5
"""Of the error that the parity check allows: where layers are kept, a few more leave room for other crops and GPUs."""


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
    passes: Callable[[onnx.ModelProto, float], None],
    probes: Sequence[npt.NDArray[Any]],
    *,
    fewest: bool = False,
) -> tuple[onnx.ModelProto, list[str]]:
    """The converted graph and the layers that had to stay in fp32 for it to pass, most costly first.

    If any have to, it is to pass with half of the allowed error, as far as most of the multiplications can be in the
    converter's precision then.

    Args:
        passes: raises ParityFailed for a graph whose embeddings moved by more than a share of the allowed error.
        probes: batches of a few images; what each layer costs is measured on them.
        fewest: keep none that it passes without, at the price of further attempts.

    Raises:
        ParityFailed: it does not pass with most of the multiplications in the converter's precision.
    """
    proto = converter.build()
    try:
        passes(proto, 1.0)
        return proto, []
    except ParityFailed as error:
        failure = error
    ranked = converter.by_cost(probes)
    for allowance in (ALLOWANCE_WITH_KEPT, 1.0):
        try:
            return _with_kept(converter, passes, allowance, ranked, failure, fewest)
        except ParityFailed as error:
            last = error
    raise last


def _with_kept(
    converter: Converter,
    passes: Callable[[onnx.ModelProto, float], None],
    allowance: float,
    ranked: Sequence[str],
    failure: ParityFailed,
    fewest: bool,
) -> tuple[onnx.ModelProto, list[str]]:
    """As `convert_with_fallback`, of a graph that did not pass, by `failure`, without keeping any layer."""
    found: tuple[onnx.ModelProto, int] | None = None
    failed, count = 0, min(1, len(ranked))
    while True:
        proto = converter.build(ranked[:count])
        share = onnx_precision(proto).share.get(converter.precision, 0.0)
        if share < MIN_SHARE_WITH_KEPT or failed == count:
            kept = len(converter.with_dependencies(ranked[:count]))
            failure.problem += f", with {kept} of {len(ranked)} layers kept in fp32"
            raise failure
        try:
            passes(proto, allowance)
            found = proto, count
        except ParityFailed as error:
            failure, failed = error, count
        if found and (found[1] - failed == 1 or not fewest):
            return found[0], converter.with_dependencies(ranked[: found[1]])
        count = (failed + found[1]) // 2 if found else min(count + max(1, count // 2), len(ranked))
