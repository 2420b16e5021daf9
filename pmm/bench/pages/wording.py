"""A bench result in words: how figures are written, what backends are called, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
# A backend "ranks as torch does" while mAP and rank-1 differ by no more than this (0.1 points).
SAME_RANKING = 0.001
# Below this cosine an embedding has visibly moved, even where the ranking happens to survive.
SAME_EMBEDDING = 0.999
# Two medians closer than this ratio are called equal: timing on a shared machine is no better.
SAME_SPEED = 1.05
NONE = "-"
SPOKEN = {
    "torch-compile": "torch.compile",
    "aoti": "AOTInductor",
    "ort-cpu": "ONNX Runtime",
    "ort-cuda": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
    "openvino": "OpenVINO",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`headline` is one sentence, `sentences` one per backend where the headline cannot name them all; `tone` is
    "good" (all rank as torch does), "mixed" (some could not run, or rank otherwise at no loss of mAP) or "bad" (mAP
    lost or unknown, or a backend failed)."""

    headline: str
    sentences: tuple[str, ...]
    tone: str


def verdict(report: dict[str, Any]) -> Verdict:
    """What the figures mean, in words: torch fp32 is the truth, every other backend is judged against it."""
    reference = next((r for r in report["results"] if r["backend"] == "torch" and r["precision"] == "fp32"), None)
    others = [r for r in report["results"] if r is not reference]
    ran = [r for r in others if r["status"] == "ok"]
    absent = [_absence(r) for r in others if r["status"] != "ok"]
    if reference is None or reference["status"] != "ok" or reference["mAP"] is None:
        why = "was not measured" if reference is None or reference["status"] == "ok" else _reason(reference)
        headline = f"Whether mAP survived is unknown: torch fp32, which the others are compared with, {why}"
        said = [f"{spoken_name(r)} reaches mAP {percent(r['mAP'])}" for r in ran] + absent
        return _verdict(headline, said, "bad")
    kept = [r for r in ran if _kept(r)]
    lost = [r for r in ran if r["map_delta"] is None or r["map_delta"] < -SAME_RANKING]
    if lost or any(r["status"] == "failed" for r in others):
        tone = "bad"
    else:
        tone = "good" if ran and len(kept) == len(others) else "mixed"
    if not ran:
        headline = f"{spoken_name(reference)} reaches mAP {percent(reference['mAP'])}; "
        nothing = "no other backend was measured, so there is nothing to compare"
        return _verdict(headline + ("; ".join(absent) or nothing), [], tone)
    if len(ran) == 1:
        return _verdict("; ".join([_judgement(ran[0], reference), *absent]), [], tone)
    verb = "rank" if len(kept) > 1 else "ranks"
    headline = f"{len(kept) or 'None'} of {len(ran)} other backends {verb} as torch does"
    timed = [r for r in kept if _shared_batch(r, reference) is not None]
    if timed:
        fastest = max(timed, key=lambda r: _speed_ratio(r, reference))
        headline += f"; the fastest of these, {spoken_name(fastest)}, {_speed(fastest, reference)}"
    if lost:
        headline += f"; mAP is lost or unknown with {', '.join(map(spoken_name, lost))}"
    if absent:
        headline += f"; {len(absent)} more could not be measured"
    return _verdict(headline, [_judgement(r, reference) for r in ran] + absent, tone)


def _verdict(headline: str, said: Sequence[str], tone: str) -> Verdict:
    return Verdict(headline=f"{headline}.", sentences=tuple(f"{sentence}." for sentence in said), tone=tone)


def _kept(result: Result) -> bool:
    deltas = (result["map_delta"], result["rank1_delta"])
    return all(delta is not None and abs(delta) <= SAME_RANKING for delta in deltas)


def _judgement(result: Result, reference: Result) -> str:
    """One backend against torch, without the full stop."""
    name, delta, speed = spoken_name(result), result["map_delta"], _speed(result, reference)
    if delta is None:
        said, good = f"the mAP of {name} could not be compared with torch's", False
    elif _kept(result):
        both = f"mAP {percent(result['mAP'])}, difference {points(delta)} points"
        said, good = f"{name} ranks as torch does ({both})", True
    elif abs(delta) <= SAME_RANKING:
        first = result["rank1_delta"]
        moved = "is unknown" if first is None else f"moved by {points(first)} points"
        said, good = f"{name} keeps mAP (difference {points(delta)} points), but its rank-1 {moved}", False
    else:
        verb = "loses" if delta < 0 else "gains"
        both = f"{percent(result['mAP'])} instead of torch's {percent(reference['mAP'])}"
        said, good = f"{name} {verb} {abs(100 * delta):.2f} points of mAP ({both})", delta > 0
    lowest = result["min_cosine"]
    if lowest is not None and lowest < SAME_EMBEDDING:
        said += f", with a worst-case cosine of {cosine(lowest)} to torch's embeddings,"
    faster = _speed_ratio(result, reference) >= 1 / SAME_SPEED
    return f"{said} {'and' if good == faster else 'but'} {speed}" if speed else said.rstrip(",")


def _speed(result: Result, reference: Result) -> str:
    """Such as "is 1.8x faster at batch 1": medians at the smallest batch both were timed at; empty if there is none."""
    batch, ratio = _shared_batch(result, reference), _speed_ratio(result, reference)
    if batch is None:
        return ""
    other = "" if result["device"] == reference["device"] else spoken_name(reference)
    if 1 / SAME_SPEED < ratio < SAME_SPEED:
        return f"is about as fast{f' as {other}' if other else ''} at batch {batch}"
    times = max(ratio, 1 / ratio)
    than = f"{'faster' if ratio > 1 else 'slower'}{f' than {other}' if other else ''}"
    return f"is {times:.{1 if times < 10 else 0}f}x {than} at batch {batch}"


def _speed_ratio(result: Result, reference: Result) -> float:
    """Median latency of torch over that of `result`: above 1 is faster; NaN where they share no batch."""
    batch = _shared_batch(result, reference)
    if batch is None:
        return math.nan
    return float(timing_at(reference, batch)["p50_ms"] / timing_at(result, batch)["p50_ms"])


def _shared_batch(result: Result, reference: Result) -> int | None:
    mine, theirs = ({b["batch"] for b in r["batches"] if b["p50_ms"]} for r in (result, reference))
    return min(mine & theirs, default=None)


def _absence(result: Result) -> str:
    return f"{spoken_name(result)} {_reason(result)}"


def _reason(result: Result) -> str:
    said = "failed" if result["status"] == "failed" else "could not run here"
    return f"{said} ({one_line(result['reason'] or 'no reason given').rstrip('.')})"


def batch_sizes(report: dict[str, Any]) -> list[int]:
    """All that some backend was timed at, ascending."""
    return sorted({b["batch"] for r in report["results"] for b in r["batches"] if b["p50_ms"]})


def timing_at(result: Result, batch: int) -> Any:
    """The entry of `batches` for one batch size; None if there is none with a latency."""
    return next((b for b in result["batches"] if b["batch"] == batch and b["p50_ms"]), None)


def device_of(result: Result) -> str:
    device = str(result["device"] or "")
    return "CPU" if device == "cpu" else "GPU" if device in ("cuda", "cuda:0", "gpu") else device


def spoken_name(result: Result) -> str:
    """As a sentence says it: "ONNX Runtime fp16 on CPU"; fp32 goes without saying."""
    precision = "" if result["precision"] == "fp32" else f" {result['precision']}"
    where = f" on {device_of(result)}" if result["device"] else ""
    return f"{SPOKEN.get(result['backend'], result['backend'])}{precision}{where}"


def label(result: Result, precision: bool = False, lines: bool = False) -> str:
    """As a table says it: the name one types, with the device where the name does not tell it."""
    device = device_of(result)
    inside = [] if not device or device.lower() in result["backend"] else [device]
    inside += [result["precision"]] if precision else []
    return result["backend"] + (f"{chr(10) if lines else ' '}({', '.join(inside)})" if inside else "")


def percent(fraction: float | None) -> str:
    return NONE if fraction is None else f"{100 * fraction:.1f} %"


def points(fraction: float | None) -> str:
    """A difference in percentage points with its sign; one that rounds to zero has none."""
    if fraction is None:
        return NONE
    return "0.00" if abs(100 * fraction) < 0.005 else f"{100 * fraction:+.2f}"


def cosine(value: float | None) -> str:
    """Cut after six decimals: 0.9999999 must not read as 1."""
    return NONE if value is None else f"{math.floor(value * 1e6) / 1e6:.6f}"


def number(value: float | None) -> str:
    """Three significant digits, never in scientific notation."""
    if value is None:
        return NONE
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if 0 < abs(value) < 1000 else f"{value:.0f}"


def size(count: int | None) -> str:
    return NONE if count is None else f"{number(count / 1e6)} MB"


def one_line(text: str) -> str:
    """Without line breaks and control characters, which a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
