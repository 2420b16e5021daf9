"""The figures of a task of `make gpu`, short enough for a table: what was measured, and its value.

Loads the standard library only.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

Rows = Iterator[tuple[str, str]]
Values = dict[str, Any]


def figures(values: Any) -> list[tuple[str, str]]:
    """The figures in the content of a JSON file of a task; empty if it has none."""
    if isinstance(values, list):
        return list(_epochs(values))
    kind = str(values.get("schema", "")).rpartition("-")[0] if isinstance(values, dict) else ""
    return list(KINDS[kind](values)) if kind in KINDS else []


def format_value(value: Any) -> str:
    """A figure in few digits; nested ones as name value, name value."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}" if 0.9 < abs(value) < 1 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_value(each)}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(format_value, value)) or "nothing"
    return str(value)


def _bench(report: Values) -> Rows:
    for result in report["results"]:
        if result["status"] != "ok":
            yield result["name"], f"{result['status']}: {result['reason']}"
            continue
        parts = ["p50 ms " + ", ".join(f"{format_value(t['p50_ms'])} @{t['batch']}" for t in result["batches"])]
        parts += [f"{max(t['images_per_s'] for t in result['batches']):,.0f} images/s"] if result["batches"] else []
        if load := result.get("tracker"):
            parts.append(
                f"{load['least']} to {load['most']} crops at random: mean {format_value(load['mean_ms'])} ms, p99 "
                f"{format_value(load['p99_ms'])} ms, {format_value(load['images_per_s'])} images/s (in order of size "
                f"{format_value(load['in_order_images_per_s'])})"
            )
        if result["name"] != report["reference"]:
            parts += [f"worst cosine {result['min_cosine']:.6f}", f"mAP {100 * result['map_delta']:+.2f} points"]
        yield result["name"], "; ".join([*parts, *result["notes"], *result["untimed"]])
    for failure in report["gates"]["failures"]:
        yield f"gate {failure['gate']}", f"{failure['result']}: {failure['message']}"


def _check(values: Values) -> Rows:
    yield from ((name, format_value(figure)) for name, figure in values["found"].items())


def _ops(report: Values) -> Rows:
    for setting in report.get("settings", ()):
        place = f"{setting['batch']} {setting['dtype']} {setting['layout']}"
        for name, op in setting["ops"].items():
            times = [f"{row['name']} {format_value(row['both']['p50_ms'])}" for row in op["rows"] if "both" in row]
            yield f"{name}, {place}", "forward and backward, p50 ms: " + ", ".join(times)
    steps = [f"{row['name']} {format_value(row['step']['p50_ms'])}" for row in report.get("rows", ()) if "step" in row]
    if steps:
        place = f"step of {report['step']['batch']}, amp {report['step'].get('amp', 'off')}"
        ratios = [f"{each['of']} / {each['over']} {format_value(each['ratio'])}" for each in report["ratios"]]
        yield place, "p50 ms: " + ", ".join(steps) + "; " + ", ".join(ratios)


def _loading(report: Values) -> Rows:
    for setting in report["settings"]:
        rates = [f"{row['name']} {1e6 / row['us_per_crop']:,.0f}" for row in setting["rows"]]
        yield f"{setting['preset']}, {setting['files']}", f"{report['workers']} workers, crops/s: " + ", ".join(rates)


def _ablation(report: Values) -> Rows:
    for row in report["rows"]:
        spread = row["metrics"]["mAP"]["spread"]
        rate = row["costs"]["images_per_s"]
        parts = [f"mAP {100 * spread['mean']:.1f} %" if spread else "", f"{rate['mean']:,.0f} images/s" if rate else ""]
        yield row["name"], f"{len(report['seeds'])} seeds: " + ", ".join(filter(None, parts))


def _epochs(records: list[Values]) -> Rows:
    rates = [record["images_per_s"] for record in records if "images_per_s" in record]
    if rates:
        yield f"{len(records)} epochs", f"median {statistics.median(rates):,.0f} images/s"


KINDS: dict[str, Callable[[Values], Rows]] = {
    "pmm-bench": _bench,
    "pmm-gpu-check": _check,
    "pmm-ops-bench": _ops,
    "pmm-loading-bench": _loading,
    "pmm-ablation": _ablation,
}
"""By the schema's name, without its number."""
