"""Gates: bounds that a backend must keep to be shipped, and the results that fail them.

A gate is a field of `pmm.bench.schema.Gates`, and here its flag, its requirement in words and its check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pmm.artifacts.manifest import PRECISIONS
from pmm.bench.result_schema import Result
from pmm.bench.sample_size import queries_for_drop, queries_for_flips, too_few_queries
from pmm.bench.schema import GateFailure, Gates
from pmm.export.options import MAX_NORM_ERROR, MIN_COSINE
from pmm.utils.arguments import Arg
from pmm.utils.errors import InvalidValue, one_of

OFF = "off"
CHAIN_GATES = ("--max-fmr-factor", "--max-tpr-drop")
"""Of the chain alone."""
WITHOUT_BOUND = {
    "--backends": "every backend that the command line names runs, and no backend fails",
    "--batches": "every batch size and the load of a tracker can be timed",
    "--gallery": "every link of the deployed chain can be measured, and no index shows a fault",
}
"""Flag -> requirement of the gates that have no bound; a report mentions them if they fail."""
MIN_COSINES, MAX_NORM_ERRORS = (
    ",".join(f"{precision}={bound:g}" for precision, bound in bounds.items()) for bounds in (MIN_COSINE, MAX_NORM_ERROR)
)
COSINE_HELP = (
    "Least cosine of an embedding with the reference's, for all precisions, or for some, as fp16=0.999,int8=0.97 "
    f"(default: {MIN_COSINES.replace(',', ', ')})."
)
NORM_HELP = (
    "Largest relative difference of an embedding's norm from the reference's, as thresholds are distances (default: "
    f"{MAX_NORM_ERRORS.replace(',', ', ')})."
)


@dataclass(frozen=True, kw_only=True)
class GateFlags:
    """Bounds for every backend, as typed: a number, or "off"."""

    max_map_drop: Annotated[str, Arg("X")] = "0.005"
    """Most that mAP may fall, as a fraction."""
    max_rank1_flips: Annotated[str, Arg("X")] = "0.02"
    """Largest share of queries whose first gallery crop turns from right to wrong or back."""
    min_cosine: Annotated[str, Arg("X", help=COSINE_HELP)] = MIN_COSINES
    max_norm_error: Annotated[str, Arg("X", help=NORM_HELP)] = MAX_NORM_ERRORS
    max_p95_ms: Annotated[str, Arg("X")] = OFF
    """Largest p95 latency at the smallest batch, in ms."""
    max_fmr_factor: Annotated[str, Arg("X")] = "1.5"
    """With --gallery: most false matches at the deployed threshold, as a multiple of the artifact's."""
    max_tpr_drop: Annotated[str, Arg("X")] = "0.02"
    """With --gallery: most that the true-positive rate at the deployed threshold may fall, as a fraction."""

    def parsed(self) -> Gates:
        """The bounds. Raises InvalidValue for one that is not a number, or out of range."""
        return Gates(
            max_map_drop=_bound(self.max_map_drop, "--max-map-drop", 0, 1),
            max_rank1_flips=_bound(self.max_rank1_flips, "--max-rank1-flips", 0, 1),
            min_cosine=_per_precision(self.min_cosine, "--min-cosine", MIN_COSINE, -1, 1),
            max_norm_error=_per_precision(self.max_norm_error, "--max-norm-error", MAX_NORM_ERROR, 0, math.inf),
            max_p95_ms=_bound(self.max_p95_ms, "--max-p95-ms", 0, math.inf),
            max_fmr_factor=_bound(self.max_fmr_factor, "--max-fmr-factor", 1, math.inf),
            max_tpr_drop=_bound(self.max_tpr_drop, "--max-tpr-drop", 0, 1),
        )


def requirements(gates: Gates, batches: Sequence[int]) -> dict[str, str | None]:
    """Flag -> what the gate requires, in words; None if it is off. `batches`: the timed batch sizes, ascending."""
    drop, flips, slowest = gates.max_map_drop, gates.max_rank1_flips, gates.max_p95_ms
    cosines = ", ".join(f"{precision} {bound:g}" for precision, bound in gates.min_cosine.items())
    norms = ", ".join(f"{precision} {100 * bound:.2f} %" for precision, bound in (gates.max_norm_error or {}).items())
    near = "each embedding's cosine with the reference's is at least"
    as_long = "each embedding's norm differs from the reference's by at most"
    flipped = "the first gallery crop turns from right to wrong, or back, for at most"
    at = f" at batch {batches[0]}" if batches else ""
    factor, fall, at_threshold = gates.max_fmr_factor, gates.max_tpr_drop, "at the deployed threshold, an index has"
    return {
        "--max-map-drop": None if drop is None else f"mAP falls by at most {100 * drop:.2f} points",
        "--max-rank1-flips": None if flips is None else f"{flipped} {100 * flips:.2f} % of the queries",
        "--min-cosine": f"{near}: {cosines}" if cosines else None,
        "--max-norm-error": f"{as_long}: {norms}" if norms else None,
        "--max-p95-ms": None if slowest is None else f"the p95 latency{at} is at most {slowest:g} ms",
        "--max-fmr-factor": None
        if factor is None
        else f"{at_threshold} at most {factor:g} times the artifact's false match rate",
        "--max-tpr-drop": None
        if fall is None
        else f"{at_threshold} a true-positive rate at most {100 * fall:g} points below the artifact's",
    }


def failures(
    results: Sequence[Result],
    gates: Gates,
    *,
    reference: str,
    queries: int,
    required: Collection[str],
    any_precision: bool = False,
) -> Iterator[GateFailure]:
    """Every gate that a result fails. A figure that a gate needs and that was not measured fails it.

    Args:
        reference: name of the result that the others are compared with; of the gates only --batches applies to it.
        queries: how many queries have a relevant gallery item.
        required: backends that fail if this machine cannot run them; others are left out then.
        any_precision: of a required backend, one precision that runs is enough.
    """
    running = {result.backend for result in results if result.status == "ok"} if any_precision else set()
    missed = set(required) - running
    for result in results:
        if result.status == "failed" or (result.status == "unavailable" and result.backend in missed):
            message = f"{result.status}: {result.reason}; none of its figures could be measured"
            yield GateFailure(result=result.name, gate="--backends", message=message)
        elif result.status == "ok":
            for message in result.untimed:
                yield GateFailure(result=result.name, gate="--batches", message=message)
            if result.name != reference:
                yield from _failures_of(result, gates, queries)


def map_drop_message(drop: float, most: float, interval: tuple[float, float] | None, queries: int) -> tuple[str, bool]:
    """The message on mAP that fell by `drop`, more than the allowed `most`, and whether it may be by chance.

    `interval` is the difference's, 95 %.
    """
    needed = queries_for_drop(drop, most, interval, queries)
    message = f"mAP fell by {100 * drop:.2f} points; at most {100 * most:g} is allowed"
    return f"{message}{too_few_queries(needed)}", needed is not None


def rank1_flips_message(flips: int, most: float, queries: int) -> tuple[str, bool]:
    """As `map_drop_message`, for queries whose first gallery crop turned from right to wrong or back."""
    needed = queries_for_flips(flips, queries, most)
    share = f"{flips} of {queries} queries ({flips / queries:.2%})"
    return f"rank-1 flipped for {share}; at most {most:.2%} is allowed{too_few_queries(needed)}", needed is not None


def _failures_of(result: Result, gates: Gates, queries: int) -> Iterator[GateFailure]:
    def failure(gate: str, message: str, *, undecided: bool = False) -> GateFailure:
        return GateFailure(result=result.name, gate=gate, message=message, undecided=undecided)

    if (most := gates.max_map_drop) is not None:
        delta = result.map_delta
        if delta is None:
            yield failure("--max-map-drop", "its mAP could not be compared")
        elif -delta > most:
            message, undecided = map_drop_message(-delta, most, result.map_delta_interval, queries)
            yield failure("--max-map-drop", message, undecided=undecided)
    if (most := gates.max_rank1_flips) is not None:
        if result.rank1_lost is None or result.rank1_gained is None:
            yield failure("--max-rank1-flips", "its rank-1 flips were not counted")
        elif (flips := result.rank1_lost + result.rank1_gained) > most * queries:
            message, undecided = rank1_flips_message(flips, most, queries)
            yield failure("--max-rank1-flips", message, undecided=undecided)
    least = gates.min_cosine.get(result.precision)
    if least is not None:
        kinds = {"the reference's": result.min_cosine, "the same crop's in another batch": result.batch_min_cosine}
        for against, cosine in kinds.items():
            if cosine is None:
                yield failure("--min-cosine", f"the cosine of its embeddings with {against} was not measured")
            elif cosine < least:
                worst = f" ({result.worst_crop})" if result.worst_crop and against == "the reference's" else ""
                low = f"the worst embedding{worst} has cosine {cosine:.6f} with {against}"
                yield failure("--min-cosine", f"{low}; at least {least:g} is required for {result.precision}")
    most = (gates.max_norm_error or {}).get(result.precision)
    if most is not None:
        if result.max_norm_error is None:
            yield failure("--max-norm-error", "the norms of its embeddings were not compared")
        elif result.max_norm_error > most:
            differs = (
                f"a norm differs by {result.max_norm_error:.2%} from the reference's or from that in another batch"
            )
            yield failure("--max-norm-error", f"{differs}; at most {most:.2%} is allowed for {result.precision}")
    if (most := gates.max_p95_ms) is not None:
        timing = min(result.batches, key=lambda timing: timing.batch, default=None)
        if timing is None or timing.p95_ms is None:
            yield failure("--max-p95-ms", "p95 was not measured: too few samples; raise --samples or --seconds")
        elif timing.p95_ms > most:
            slow = f"p95 at batch {timing.batch} is {timing.p95_ms:.3g} ms"
            yield failure("--max-p95-ms", f"{slow}; at most {most:g} ms is allowed")


def _per_precision(text: str, flag: str, defaults: Mapping[str, float], least: float, most: float) -> dict[str, float]:
    """`0.99` for all precisions, `int8=0.97,fp16=0.999` for some; the others keep their defaults."""
    if text == OFF:
        return {}
    bounds = dict(defaults)
    for part in text.split(","):
        precision, separator, value = (word.strip() for word in part.rpartition("="))
        if separator and precision not in PRECISIONS:
            raise InvalidValue(flag, text, f"PRECISION=NUMBER with a precision of {one_of(PRECISIONS)}")
        bound = _number(value, flag, least, most)
        bounds |= {precision: bound} if separator else dict.fromkeys(PRECISIONS, bound)
    return bounds


def _bound(text: str, flag: str, least: float, most: float) -> float | None:
    return None if text == OFF else _number(text, flag, least, most)


def _number(text: str, flag: str, least: float, most: float) -> float:
    number = float(text) if re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", text) else math.nan
    if not least <= number <= most or math.isinf(number):
        bounds = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of at least {least:g}"
        raise InvalidValue(flag, text, f"a number {bounds}, or {OFF}")
    return number
