"""The report of `bench.lab.mix_kernels`: names of its options, its common entries and its tables. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pmm.bench.latency import LatencyPlan
from pmm.bench.statistics import Latency, Ratio
from pmm.utils.build_info import build_info
from pmm.utils.environment import report_header
from pmm.utils.errors import InvalidValue

SCHEMA = "pmm-ops-bench-1"
AUTHORS, EAGER, COMPILED, OURS = "authors", "eager", "compiled", "ours"
KERNELS, COPY = "kernels", "copy"
COMPETITORS = (AUTHORS, EAGER, COMPILED, OURS)
DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("nchw", "channels_last")
PHASES = ("forward", "backward", "both")
NONE, NO_MIXING = "-", "no mixing"
MAX_MIXING, MIN_SPEEDUP = 1.03, 3.0
"""Time of our training step over that without mixing at most, and of the authors' over ours at least."""


def check_names(flag: str, names: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """`names`. Raises InvalidValue for an unknown one."""
    if unknown := [name for name in names if name not in known]:
        raise InvalidValue(flag, ", ".join(unknown), choices=known)
    return names


def heading(device: str, threads: int, plan: LatencyPlan) -> dict[str, Any]:
    """The first entries of every report of this bench."""
    return {
        **report_header(SCHEMA, threads),
        "build": build_info(),
        "device": device,
        "plan": asdict(plan),
        # a switch of torch: with it every output of torch has the big pages that our CPU kernels request
        "big_pages_for_all": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
    }


def timing(latency: Latency) -> dict[str, Any]:
    """Median and raw samples, ms."""
    return {"p50_ms": latency.p50, "samples_ms": [round(value, 4) for value in latency.samples_ms]}


def interval(ratio: Ratio) -> dict[str, Any]:
    """A ratio of medians with its 95 % interval, or null with too few rounds for one."""
    return {"ratio": ratio.value, "interval": list(ratio.interval) if ratio.interval else None}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    if "step" in report:
        return "\n".join(_step_table(report))
    size = "x".join(str(report["maps"][key]) for key in ("channels", "height", "width"))
    lines = [
        f"Maps of {size} on {report['device']}, {report['environment']['threads']} CPU threads; medians in ms, "
        "ratios with 95 % intervals (from 6 rounds on).",
        "Share of copy: of the bandwidth of y.copy_(x), counting only what must be moved "
        "(mix: 2 maps each way; mix+pool: 1).",
    ]
    for op in report["settings"][0]["ops"]:
        lines += ["", *_op_table(report["settings"], op)]
    return "\n".join(lines)


def over_limits(report: Mapping[str, Any]) -> list[str]:
    """The limits of a training step that the report of one misses, a line each."""
    ratios = {(ratio["of"], ratio["over"]): ratio["ratio"] for ratio in report["ratios"]}
    mixing, speedup = ratios.get((OURS, NO_MIXING)), ratios.get((AUTHORS, OURS))
    missed = []
    if mixing is None or mixing > MAX_MIXING:
        missed.append(f"our step takes {mixing} times that without mixing; expected {MAX_MIXING} at most")
    if speedup is None or speedup < MIN_SPEEDUP:
        missed.append(f"the authors' step takes {speedup} times ours; expected {MIN_SPEEDUP} at least")
    return missed


def _op_table(settings: Sequence[Mapping[str, Any]], op: str) -> Iterable[str]:
    names = [row["name"] for row in settings[0]["ops"][op]["rows"] if row["name"] not in (KERNELS, COPY)]
    others = [name for name in names if name != OURS]
    heads = [f"{op}: forward / backward / both", *names, *(f"{name} / ours, both" for name in others)]
    yield _line([*heads, "share of copy: ours", "kernels alone"])
    yield "|---|" + "---:|" * (len(heads) + 1)
    for setting in settings:
        result = setting["ops"][op]
        rows = {row["name"]: row for row in result["rows"]}
        both = {ratio["of"]: _ratio(ratio) for ratio in result["ratios"] if ratio["phase"] == "both"}
        shares = {(share["name"], share["phase"]): f"{share['ratio']:.0%}" for share in result["shares"]}
        cells = [f"{setting['batch']} {setting['dtype']} {setting['layout']}"]
        cells += [_times(rows[name]) for name in names]
        cells += [both.get(name, NONE) for name in others]
        cells += [" / ".join(shares.get((name, p), NONE) for p in ("forward", "backward")) for name in (OURS, KERNELS)]
        yield _line(cells)


def _step_table(report: Mapping[str, Any]) -> Iterable[str]:
    step = report["step"]
    ratios = {(ratio["of"], ratio["over"]): _ratio(ratio) for ratio in report["ratios"]}
    bases = list(dict.fromkeys(ratio["over"] for ratio in report["ratios"]))
    yield _line([f"training step of {step['preset']}, batch {step['batch']}", "ms", *(f"times {b}" for b in bases)])
    yield "|---|---:|" + "---:|" * len(bases)
    for row in report["rows"]:
        timed = f"{row['step']['p50_ms']:.0f}" if row["status"] == "timed" else row["status"]
        yield _line([row["name"], timed, *(ratios.get((row["name"], base), NONE) for base in bases)])


def _times(row: Mapping[str, Any]) -> str:
    if row["status"] != "timed":
        return row["status"]
    return " / ".join(f"{row[phase]['p50_ms']:.1f}" for phase in PHASES)


def _ratio(entry: Mapping[str, Any]) -> str:
    value, bounds = entry["ratio"], entry["interval"]
    return f"{value:.2f}x ({bounds[0]:.2f}-{bounds[1]:.2f})" if bounds else f"{value:.2f}x"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
