"""The report of a reproduction: plain values, and tables beside the paper's figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pmm.ablation.report import by_seed, run_values, spread_values
from pmm.ablation.runs import RunOutcome
from pmm.ablation.statistics import difference
from pmm.ablation.study import HOME
from pmm.bench.pages.format import between, escape, points
from pmm.presets import preset
from pmm.reproduction.figures import PAPER_AP, PAPER_ROWS, Reported
from pmm.reproduction.study import NOT_YET, Reproduction
from pmm.utils.environment import report_header
from pmm.utils.facts import how_many
from pmm.utils.task_runner import strip_paths

SCHEMA = "pmm-reproduction-1"
COMPARED = {
    "rank1": "rank-1",
    "mAP": "mAP by the standard AP",
    PAPER_AP: "mAP by the AP of the paper's code",
}
"""Key -> name of the compared figures, in order. All are fractions, and higher is better."""
NO_ROW = "not in the paper's tables"
NO_FIGURE = "no figure in the paper"

Values = Mapping[str, Any]


def make_report(reproduction: Reproduction, outcomes: Sequence[RunOutcome], command: str) -> Values:
    """The values of every run and, per row, mean, spread and difference from the paper's figures; see `SCHEMA`. Names
    no folder of this machine.

    `command` is the command line of the reproduction.
    """
    values = {
        **report_header(SCHEMA, reproduction.threads),
        "command": command,
        "data": reproduction.data_facts(),
        "sources": outcomes[0].run.facts["sources"],
        "seeds": list(reproduction.seeds),
        "devices": reproduction.devices,
        "rows": [_row(name, reproduction, outcomes) for name in reproduction.rows],
        "runs": [_run(outcome) for outcome in outcomes],
    }
    return json.loads(strip_paths(json.dumps(values, allow_nan=False), HOME))


def _row(name: str, reproduction: Reproduction, outcomes: Sequence[RunOutcome]) -> dict[str, Any]:
    row, config, dataset = reproduction.rows[name], reproduction.configs[name], reproduction.dataset
    paper = PAPER_ROWS[row.method]
    figures, elsewhere = paper.figures.get(dataset), paper.elsewhere.get(dataset)
    reported = Reported(rank1=figures[0], mAP=figures[1], source=paper.source) if figures else None
    return {
        "name": row.method,
        "title": paper.title,
        "table": paper.table,
        "note": paper.note,
        "preset": row.preset,
        "settings": dict(row.settings),
        "config": {key: value for key, value in config.to_dict().items() if key != "seed"},
        "paper": asdict(reported) if reported else None,
        "elsewhere": asdict(elsewhere) if elsewhere else None,
        "metrics": {metric: _compared(_values(outcomes, name, metric), reported, metric) for metric in COMPARED},
        "metrics_elsewhere": {
            metric: _compared(_values(outcomes, name, metric), elsewhere, metric) for metric in COMPARED
        },
    }


def _values(outcomes: Sequence[RunOutcome], name: str, metric: str) -> dict[int, float]:
    """Seed -> figure."""
    if metric != PAPER_AP:
        return by_seed(outcomes, name, metric)
    return {o.run.seed: o.figures.other_mAP[PAPER_AP] for o in outcomes if o.run.row == name and o.figures}


def _compared(values: Mapping[int, float], reported: Reported | None, metric: str) -> dict[str, Any]:
    """Spread over the seeds, and difference from a published figure, which is taken as exact."""
    found: dict[str, Any] = {"spread": spread_values(values), "reported": None, "difference": None}
    if reported is None:
        return found
    figure = (reported.rank1 if metric == "rank1" else reported.mAP) / 100
    paired = difference(values, dict.fromkeys(values, figure))
    return {**found, "reported": figure, "difference": asdict(paired) if values else None}


def _run(outcome: RunOutcome) -> dict[str, Any]:
    values = run_values(outcome)
    return {**values, "status": "waiting"} if outcome.note == NOT_YET else values


def markdown(report: Values) -> str:
    """A table per metric, and what the figures do and do not mean."""
    lines = [_heading(report), ""]
    for metric, name in COMPARED.items():
        lines += [*_table(report, metric, name), ""]
    return "\n".join([*lines, *_notes(report)])


def _heading(report: Values) -> str:
    data, environment, seeds = report["data"], report["environment"], report["seeds"]
    where = ", ".join(environment["gpus"]) or f"{environment['cpu']}, {how_many(environment['cores'], 'core')}"
    presets = ", ".join(dict.fromkeys(row["preset"] for row in report["rows"]))
    return (
        f"{data['dataset']}, preset {presets}: {data['queries']:,} queries, {data['gallery']:,} gallery crops; trained "
        f"on {data['train_crops']:,} crops of {data['train_identities']:,} identities. Seed{'s' * bool(seeds[1:])} "
        f"{seeds[0]}{f' to {seeds[-1]}' * bool(seeds[1:])}. {escape(where)}; {report['created'][:10]}, commit "
        f"{environment['commit']}."
    )


def _table(report: Values, metric: str, name: str) -> Iterator[str]:
    yield f"| {name}, % | in the paper | runs | mean | sd | paper | difference, points (95 % interval) | verdict |"
    yield "|---|---|---:|---:|---:|---:|---:|---|"
    for row in report["rows"]:
        value = row["metrics"][metric]
        title = f"{row['title']}, {row['table']}" if row["title"] else "-"
        cells = [escape(row["name"]), escape(title), *_own(value), *_against(value, row)]
        yield f"| {' | '.join(cells)} |"


def _own(value: Values) -> list[str]:
    spread = value["spread"]
    if spread is None:
        return ["0", "", ""]
    return [
        str(spread["n"]),
        f"{100 * spread['mean']:.1f}",
        "" if spread["sd"] is None else f"{100 * spread['sd']:.2f}",
    ]


def _against(value: Values, row: Values) -> list[str]:
    if value["reported"] is None:
        return ["-", "", NO_FIGURE if row["title"] else NO_ROW]
    found = value["difference"]
    return [f"{100 * value['reported']:.1f}", *([_points(found), found["reading"]] if found else ["", NOT_YET])]


def _points(found: Values) -> str:
    bounds = between(found["interval"], points)
    return points(found["mean"]) + (f" ({bounds})" if bounds else "")


def _notes(report: Values) -> Iterator[str]:
    data, rows = report["data"], report["rows"]
    if data["drawn"]:
        yield (
            f"- **No reproduction: these people are synthetic**, drawn with seed {data['drawn']['seed']}. The "
            "differences from the paper's figures mean nothing; that there are some shows that the command works."
        )
    if presets := sorted({row["preset"] for row in rows} - {"paper"}):
        yield f"- **No reproduction: preset {', '.join(presets)}** is not the paper's recipe, nor any other method's."
    for row in rows:
        epochs, own = row["config"]["recipe"]["epochs"], preset("paper", row["name"]).recipe.epochs
        if row["preset"] == "paper" and epochs != own:
            yield f"- **No reproduction: {row['name']} had {epochs} epochs**, and its recipe has {own}."
    yield (
        "- The paper's figure is one run of which no spread is known. A difference is our mean minus that figure, and "
        "its interval is for our mean over all seeds."
    )
    if len(report["seeds"]) == 1:
        yield "- **One seed: no interval.** Whether a difference is more than chance, several would say (--seeds 5)."
    yield (
        f"- The paper's own runs were evaluated by its code, which counts no hit after rank 50 (--ap {PAPER_AP}); "
        "what it quotes from other papers was evaluated by theirs, whose AP is not always said. The standard AP, over "
        "the whole ranking, is higher."
    )
    if without := [row["name"] for row in rows if row["paper"] is None]:
        yield f"- Without a figure of the paper on {data['dataset']}: {', '.join(without)}."
    for row in rows:
        yield from _row_notes(row)
    for run in report["runs"]:
        if run["status"] != "finished":
            what = NOT_YET if run["status"] == "waiting" else f"failed: {run['note']}"
            yield f"- {escape(run['row'])}, seed {run['seed']}: {escape(what)}"


def _row_notes(row: Values) -> Iterator[str]:
    if row["note"]:
        yield f"- {row['name']}: {escape(row['note'])}."
    if other := row["elsewhere"]:
        found = {key: row["metrics_elsewhere"][key]["difference"] for key in ("rank1", "mAP")}
        ours = f"; ours minus these: {' / '.join(map(_points, found.values()))}" if all(found.values()) else ""
        yield f"- {row['name']}: {other['rank1']} / {other['mAP']} elsewhere ({escape(other['source'])}){ours}."
    if parts := row["settings"].get("accumulate"):
        batch = row["config"]["recipe"]["batch_size"]
        yield (
            f"- {row['name']}: each batch of {batch} in {parts} parts of {batch // int(parts)}, to save memory; batch "
            "statistics, triplets and partners stay within a part, which is not the paper's recipe."
        )
