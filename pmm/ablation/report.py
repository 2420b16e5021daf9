"""The report of an ablation: plain values with all that is needed to repeat it, and Markdown tables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pmm.ablation.runs import RunOutcome
from pmm.ablation.statistics import NOT_SIGNIFICANT, difference, spread
from pmm.ablation.study import HOME, Ablation
from pmm.bench.pages.format import between, escape, number, percent, points
from pmm.config import SYNTHETIC, fast_mode
from pmm.models.registry import METHODS
from pmm.utils.environment import describe_environment, report_header, slug
from pmm.utils.facts import how_many
from pmm.utils.hardware import cuda_index
from pmm.utils.task_runner import strip_paths

SCHEMA = "pmm-ablation-1"
RESULTS = Path("bench") / "results"
COMPARED = {"mAP": "mAP", "rank1": "rank-1", "mINP": "mINP"}
"""Key -> name of the compared figures, in order. All are fractions, and higher is better."""
COSTS = ("train_s", "images_per_s")

Report = Mapping[str, Any]


def default_out(ablation: Ablation) -> Path:
    """DATE-MACHINE-ablation.json in bench/results of a clone, or else in the folder of the runs. The name has the data
    set and the presets unless they are synthetic people and tiny alone, --against if given, and a number if a report of
    another ablation has that name, so that it is not replaced. With PMM_FAST=1 it is in the folder of the runs: those
    figures are not to be published."""
    if fast_mode():
        return ablation.options.runs / "ablation.json"
    facts = describe_environment()
    gpus = _gpus(facts, ablation.options.device)
    machine = slug(gpus[0]) if gpus else f"{slug(facts['cpu'])}-{facts['cores']}-cores"
    presets = list(dict.fromkeys(row.preset for row in ablation.rows.values()))
    dataset = next(iter(ablation.configs.values())).data.dataset
    which = "" if dataset == SYNTHETIC else f"-{slug(dataset)}"
    which += "" if presets == ["tiny"] else "".join(f"-{slug(name)}" for name in presets)
    which += f"-against-{slug(ablation.against)}" if ablation.options.against else ""
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{machine}-ablation{which}"
    names = (f"{stem}{f'-{another}' if another > 1 else ''}.json" for another in itertools.count(1))
    folder = RESULTS if RESULTS.is_dir() else ablation.options.runs
    return next(folder / name for name in names if _continues(folder / name, ablation))


def _continues(path: Path, ablation: Ablation) -> bool:
    """Whether `path` is free, or holds a report of which all rows and seeds are among the ablation's."""
    try:
        earlier = json.loads(path.read_text())
        rows, seeds = {row["name"] for row in earlier["rows"]}, set(earlier["seeds"])
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return rows <= set(ablation.rows) and seeds <= set(ablation.seeds)


def progress(outcome: RunOutcome, left: int, seconds: float) -> str:
    """A line about a run that ended: its figures or its error, and the runs and the time that are left."""
    figures = outcome.figures
    if figures is None:
        parts = [f"failed: {outcome.note}"]
    else:
        parts = [f"{name} {percent(getattr(figures, key))}" for key, name in COMPARED.items()]
        parts.append(f"trained {figures.train_s:.0f} s at {number(figures.images_per_s)} images/s")
    minutes, rest = divmod(round(seconds), 60)
    clock = f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
    return "  ".join([outcome.run.name, *parts, f"{left} left, {clock}" if left else "the last"])


def make_report(ablation: Ablation, outcomes: Sequence[RunOutcome], command: str) -> Report:
    """The values of every run and, per row, mean, spread and difference; see `SCHEMA`. Names no folder of this machine.

    `command` is the command line of the ablation.
    """
    values = {
        **report_header(SCHEMA, ablation.threads),
        "command": command,
        "data": ablation.data_facts() | {"crops": outcomes[0].run.facts["crops"]},
        "sources": outcomes[0].run.facts["sources"],
        "seeds": list(ablation.seeds),
        "jobs": ablation.options.jobs,
        "device": ablation.options.device,
        "against": ablation.against,
        "rows": [_row(name, ablation, outcomes) for name in ablation.rows],
        "runs": [run_values(outcome) for outcome in outcomes],
    }
    return json.loads(strip_paths(json.dumps(values, allow_nan=False), HOME))


def _row(name: str, ablation: Ablation, outcomes: Sequence[RunOutcome]) -> dict[str, Any]:
    row = ablation.rows[name]
    compared = {}
    for metric in COMPARED:
        values, base = by_seed(outcomes, name, metric), by_seed(outcomes, ablation.against, metric)
        paired = None if name == ablation.against else asdict(difference(values, base))
        compared[metric] = {"spread": spread_values(values), "difference": paired}
    return {
        "name": name,
        "preset": row.preset,
        "method": row.method,
        "settings": dict(row.settings),
        "config": {key: value for key, value in ablation.configs[name].to_dict().items() if key != "seed"},
        "metrics": compared,
        "costs": {cost: spread_values(by_seed(outcomes, name, cost)) for cost in COSTS},
    }


def by_seed(outcomes: Sequence[RunOutcome], name: str, figure: str) -> dict[int, float]:
    """Seed -> a figure of a row's finished runs."""
    return {o.run.seed: getattr(o.figures, figure) for o in outcomes if o.run.row == name and o.figures}


def spread_values(values: Mapping[int, float]) -> dict[str, Any] | None:
    """The spread over seeds as plain values; None if there is no value."""
    result = spread(list(values.values()))
    return asdict(result) if result else None


def run_values(outcome: RunOutcome) -> dict[str, Any]:
    """A run and its figures as plain values."""
    run = outcome.run
    status = {"status": "finished" if outcome.figures else "failed", "note": outcome.note}
    figures = asdict(outcome.figures) if outcome.figures else {}
    return {"row": run.row, "seed": run.seed, **status, **figures, "commands": run.lines()}


def markdown(report: Report) -> str:
    """A table per metric, the cost of training, and what the figures do and do not mean."""
    lines = [_heading(report), ""]
    for metric, name in COMPARED.items():
        lines += [*_table(report, metric, name), ""]
    lines += [*_costs(report), "", *_notes(report)]
    return "\n".join(lines)


def describe_data(report: Report) -> str:
    """The recipe and the data set, in a line."""
    data, epochs = report["data"], sorted({row["config"]["recipe"]["epochs"] for row in report["rows"]})
    presets = list(dict.fromkeys(row["preset"] for row in report["rows"]))
    kind = f"synthetic identities drawn with seed {data['drawn']['seed']}" if data["drawn"] else data["dataset"]
    recipe = f"Preset{'s' * bool(presets[1:])} {', '.join(presets)}, {' or '.join(map(str, epochs))} epochs"
    return f"{recipe}; test part of {kind}: {data['queries']:,} queries, {how_many(data['gallery'], 'gallery crop')}"


def _gpus(environment: Mapping[str, Any], device: str) -> list[str]:
    """Names of the GPUs, or of the one that `device` names by its number."""
    at, gpus = cuda_index(device), environment["gpus"]
    return gpus if at is None else gpus[at : at + 1]


def _heading(report: Report) -> str:
    data, environment, seeds = report["data"], report["environment"], report["seeds"]
    where = (
        ", ".join(_gpus(environment, report["device"]))
        or f"{environment['cpu']}, {how_many(environment['cores'], 'core')}"
    )
    return (
        f"{escape(describe_data(report))} of {data['test_identities']} identities; trained on "
        f"{data['train_identities']} other identities. Seed{'s' * bool(seeds[1:])} {seeds[0]}"
        f"{f' to {seeds[-1]}' * bool(seeds[1:])}. {where}, {how_many(report['jobs'], 'run')} at once with "
        f"{how_many(environment['threads'], 'thread')} each; {report['created'][:10]}, commit {environment['commit']}."
    )


def _table(report: Report, metric: str, name: str) -> Iterator[str]:
    against = escape(report["against"])
    yield f"| {name}, % | runs | mean | sd | min to max | minus {against}, points (95 % interval) | verdict |"
    yield "|---|---:|---:|---:|---:|---:|---|"
    for row in report["rows"]:
        value = row["metrics"][metric]
        cells = [escape(row["name"]), *_spread_cells(value["spread"])]
        yield f"| {' | '.join([*cells, *_difference_cells(value['difference'], len(report['seeds']))])} |"


def _spread_cells(value: Mapping[str, Any] | None) -> list[str]:
    if value is None:
        return ["0", "", "", ""]
    mean, low, high = (f"{100 * value[key]:.1f}" for key in ("mean", "min", "max"))
    return [str(value["n"]), mean, "" if value["sd"] is None else f"{100 * value['sd']:.2f}", f"{low} to {high}"]


def _difference_cells(value: Mapping[str, Any] | None, seeds: int) -> list[str]:
    if value is None:
        return ["", "the reference"]
    pairs = len(value["seeds"])
    bounds = between(value["interval"], points)
    verdict = value["reading"] + (f" ({pairs} of {seeds} pairs)" if 0 < pairs < seeds else "")
    return ["" if value["mean"] is None else points(value["mean"]) + (f" ({bounds})" if bounds else ""), verdict]


def _costs(report: Report) -> Iterator[str]:
    yield "| training | seconds, mean | sd | images/s, mean | sd |"
    yield "|---|---:|---:|---:|---:|"
    for row in report["rows"]:
        cells = [escape(row["name"])]
        for cost in COSTS:
            value = row["costs"][cost]
            cells += ["" if value is None or value[key] is None else number(value[key]) for key in ("mean", "sd")]
        yield f"| {' | '.join(cells)} |"


def _notes(report: Report) -> Iterator[str]:
    others = len(report["rows"]) - 1
    if others and len(report["seeds"]) > 1:
        yield (
            "- The differences are paired: with one seed, all rows have the same order of the data, the same held-out "
            "identities and the same initial backbone. An interval is for the mean difference over all seeds, with "
            "this data and this recipe; other data may give another difference. If it contains 0, there is "
            f'"{NOT_SIGNIFICANT}", which does not mean that the rows are equal.'
        )
        count = others * len(COMPARED)
        yield f"- One in 20 such intervals misses the true difference: of these {count}, {count / 20:.1f} on average."
    methods = (METHODS[row["method"]] for row in report["rows"] if row["method"] in METHODS)
    for note in dict.fromkeys(method.note for method in methods if method.note):
        yield f"- Note: {escape(note)}."
    for run in report["runs"]:
        if run["status"] == "failed":
            yield f"- Failed: {escape(run['row'])}, seed {run['seed']}: {escape(run['note'])}"
