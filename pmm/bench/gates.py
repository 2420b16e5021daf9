"""Bounds that a backend must keep to be shipped, and what broke them.

A gate is a field of `pmm.bench.schema.Gates`, its flag and its check here, and a line of `pmm.bench.pages.gate_list`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pmm.artifacts.manifest import PRECISIONS
from pmm.bench.schema import GateFailure, Gates, Result
from pmm.export.options import MAX_LENGTH_ERROR, MIN_COSINE
from pmm.utils.errors import UserError

OFF = "off"
NOT_TIMED = "could not be timed"
"""Part of a note that fails."""


@dataclass(frozen=True, kw_only=True)
class GateFlags:
    """What a backend must keep, as typed: a number, or "off"."""

    max_map_drop: str = "0.005"
    """Gate: most that mAP may fall, as a fraction; or off."""
    max_rank1_flips: str = "0.02"
    """Gate: largest share of queries whose first item may turn from right to wrong or back; or off."""
    min_cosine: str = ",".join(f"{precision}={least:g}" for precision, least in MIN_COSINE.items())
    """Gate: least cosine of an embedding with torch's, for all precisions or for some; or off."""
    max_length_error: str = ",".join(f"{precision}={most:g}" for precision, most in MAX_LENGTH_ERROR.items())
    """Gate: largest relative difference of an embedding's length from torch's, as thresholds are distances; or off."""
    max_p95_ms: str = OFF
    """Gate: largest p95 latency at the smallest batch, ms; or off."""

    def parsed(self) -> Gates:
        """The bounds. Raises UserError for what is no number, or out of range."""
        return Gates(
            max_map_drop=_bound(self.max_map_drop, "--max-map-drop", 0, 1),
            max_rank1_flips=_bound(self.max_rank1_flips, "--max-rank1-flips", 0, 1),
            min_cosine=_per_precision(self.min_cosine, "--min-cosine", MIN_COSINE, -1, 1),
            max_length_error=_per_precision(self.max_length_error, "--max-length-error", MAX_LENGTH_ERROR, 0, math.inf),
            max_p95_ms=_bound(self.max_p95_ms, "--max-p95-ms", 0, math.inf),
        )


def failures(
    results: Sequence[Result],
    gates: Gates,
    *,
    reference: str,
    queries: int,
    asked: Collection[str],
    any_precision: bool = False,
) -> Iterator[GateFailure]:
    """What does not keep `gates`, a line each. A figure that a gate needs and that was not measured fails it.

    Args:
        reference: name of the result that the others are compared with.
        queries: evaluable ones.
        asked: backends that were asked for by name; one that cannot run here fails, while among "all" it is left out.
        any_precision: of those, one precision that runs is enough.
    """
    running = {result.backend for result in results if result.status == "ok"} if any_precision else set()
    missed = set(asked) - running
    for result in results:
        if result.status == "failed" or (result.status == "unavailable" and result.backend in missed):
            said = f"{result.status}: {result.reason}; none of its gates could be measured"
            yield GateFailure(result=result.name, gate="--backends", said=said)
        elif result.status == "ok" and result.name != reference:
            yield from _broken(result, gates, queries)
        elif result.status == "ok":
            yield from _untimed(result)


def _untimed(result: Result) -> Iterator[GateFailure]:
    for note in result.notes:
        if NOT_TIMED in note:
            yield GateFailure(result=result.name, gate="--batches", said=note)


def _broken(result: Result, gates: Gates, queries: int) -> Iterator[GateFailure]:
    def failure(gate: str, said: str) -> GateFailure:
        return GateFailure(result=result.name, gate=gate, said=said)

    yield from _untimed(result)
    if (most := gates.max_map_drop) is not None:
        delta = result.map_delta
        if delta is None:
            yield failure("--max-map-drop", "its mAP could not be compared")
        elif -delta > most:
            yield failure(
                "--max-map-drop", f"mAP fell by {-100 * delta:.2f} points, at most {100 * most:g} are allowed"
            )
    if (most := gates.max_rank1_flips) is not None:
        if result.rank1_lost is None or result.rank1_gained is None:
            yield failure("--max-rank1-flips", "its rank-1 flips were not counted")
        elif (flips := result.rank1_lost + result.rank1_gained) > most * queries:
            share = f"{flips} of {queries} queries ({flips / queries:.2%})"
            yield failure("--max-rank1-flips", f"rank-1 flipped for {share}, at most {most:.2%} are allowed")
    least = gates.min_cosine.get(result.precision)
    if least is not None:
        kinds = {"the reference's": result.min_cosine, "the same crop's in another batch": result.batch_min_cosine}
        for against, found in kinds.items():
            if found is None:
                yield failure("--min-cosine", f"its cosine with {against} was not measured")
            elif found < least:
                worst = f" ({result.worst_crop})" if result.worst_crop and against == "the reference's" else ""
                yield failure(
                    "--min-cosine",
                    f"the worst embedding has cosine {found:.6f} with {against}{worst}, at least {least:g} is asked "
                    f"for {result.precision}",
                )
    longest = (gates.max_length_error or {}).get(result.precision)
    if longest is not None:
        if result.max_length_error is None:
            yield failure("--max-length-error", "its embeddings' lengths were not compared")
        elif result.max_length_error > longest:
            found_length = f"a length differs by {result.max_length_error:.2%} from the reference's or in another batch"
            yield failure(
                "--max-length-error", f"{found_length}, at most {longest:.2%} is allowed for {result.precision}"
            )
    if (most := gates.max_p95_ms) is not None:
        timing = min(result.batches, key=lambda timing: timing.batch, default=None)
        if timing is None or timing.p95_ms is None:
            yield failure("--max-p95-ms", "p95 was not measured (too few samples: give more --samples or --seconds)")
        elif timing.p95_ms > most:
            slow = f"p95 at batch {timing.batch} is {timing.p95_ms:.3g} ms"
            yield failure("--max-p95-ms", f"{slow}, at most {most:g} ms are allowed")


def _per_precision(text: str, flag: str, defaults: Mapping[str, float], least: float, most: float) -> dict[str, float]:
    """`0.99` for all precisions, `int8=0.97,fp16=0.999` for some; the others keep their defaults."""
    if text == OFF:
        return {}
    found = dict(defaults)
    for part in text.split(","):
        precision, separator, value = (word.strip() for word in part.rpartition("="))
        if separator and precision not in PRECISIONS:
            raise UserError(f"{flag}: unknown precision '{precision}'; known: {', '.join(PRECISIONS)}")
        bound = _number(value, flag, least, most)
        found |= {precision: bound} if separator else dict.fromkeys(PRECISIONS, bound)
    return found


def _bound(text: str, flag: str, least: float, most: float) -> float | None:
    return None if text == OFF else _number(text, flag, least, most)


def _number(text: str, flag: str, least: float, most: float) -> float:
    found = float(text) if re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", text) else math.nan
    if not least <= found <= most or math.isinf(found):
        bounds = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of at least {least:g}"
        raise UserError(f"{flag} is '{text}'; expected a number {bounds}, or {OFF}")
    return found
