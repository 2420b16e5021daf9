"""The model card of a folder that is handed over: what it is, what it does, how to feed it, its limits."""

from __future__ import annotations

from pathlib import Path

from pmm.artifacts.client_contract import client_steps
from pmm.artifacts.manifest import Manifest
from pmm.bench.gates import requirements
from pmm.bench.pages.format import (
    NONE,
    between,
    cosine,
    count,
    display_name,
    number,
    one_line,
    percent,
    points,
    size,
    times,
)
from pmm.bench.pages.queries import batch_sizes, reference_of, speedup, timing_at
from pmm.bench.result_schema import Result
from pmm.bench.schema import BenchReport
from pmm.utils.build_info import __version__

SYNTHETIC = "The people of this data set are drawn by a program: the figures say nothing of a real camera."


def model_card(
    report: BenchReport, result: Result, manifest: Manifest, artifact: Path, *, pictures: bool = True
) -> str:
    """The card as Markdown, of the `result` that the `artifact` with this `manifest` gave in the `report`, whose pages
    beside it have `pictures` of people, or not."""
    sections = {
        "What it is": _identity(report, result, manifest, artifact),
        "How good it is": _accuracy(report, result),
        "What it keeps": _gates(report),
        "How fast it is": _speed(report, result),
        "How to feed it": _feeding(manifest),
        "From which distance on": _thresholds(manifest, result),
        "Check it where it will run": _check(artifact, result),
        "Limits": _limits(report, result, pictures),
    }
    parts = [f"# {one_line(Path(report.checkpoint.path).parent.name or 'model')}: person re-identification"]
    for title, lines in sections.items():
        if lines:
            parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _identity(report: BenchReport, result: Result, manifest: Manifest, artifact: Path) -> list[str]:
    model, shares = report.checkpoint, manifest.precision_share
    found = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
    kept = (manifest.quantization or {}).get("kept_in_fp32") or ()
    lines = [
        f"- `{artifact.name}`: {size(artifact.stat().st_size)}, {manifest.precision_found} ({found} of "
        f"{manifest.macs / 1e6:,.0f} million multiplications), to be run by {display_name(result)}",
        f"- a crop of a person in, an embedding of {manifest.embedding.dim} numbers out",
        f"- method {one_line(model.method)}, {model.parameters_m:.1f} million parameters, made from a file with "
        f"SHA-256 `{model.sha256[:16]}...` by pmm {__version__}",
    ]
    if kept:
        lines.append(f"- kept in fp32, as 8 bits would have cost too much: {one_line(', '.join(kept))}")
    return lines


def _accuracy(report: BenchReport, result: Result) -> list[str]:
    data, reference = report.dataset, reference_of(report)
    lines = [
        f"On {one_line(data.name)}: {count(data.queries)} queries of {count(data.identities)} people against "
        f"{count(data.gallery)} gallery crops. In brackets: 95 % interval.",
        "",
        "| | mAP | rank-1 | mINP |",
        "|---|---:|---:|---:|",
        f"| this file | {percent(result.mAP)} | {percent(result.rank1)} | {percent(result.mINP)} |",
    ]
    if reference and reference is not result:
        lines.append(
            f"| {one_line(reference.name)} | {percent(reference.mAP)} | {percent(reference.rank1)} | "
            f"{percent(reference.mINP)} |"
        )
        deltas = (
            (result.map_delta, result.map_delta_interval),
            (result.rank1_delta, result.rank1_delta_interval),
            (result.minp_delta, result.minp_delta_interval),
        )
        cells = (f"{points(delta)} ({between(interval, points) or NONE})" for delta, interval in deltas)
        lines.append(f"| difference, points | {' | '.join(cells)} |")
        lines += ["", f"Worst cosine of an embedding with the reference's: {cosine(result.min_cosine)}."]
    return lines


def _gates(report: BenchReport) -> list[str]:
    """The bounds by which it was chosen, which may be wider than usual."""
    required = requirements(report.gates, batch_sizes(report)).items()
    lines = [f"- {text} (`{flag}`)" for flag, text in required if text]
    return ["Against the reference, on the data set above:", "", *lines] if lines else []


def _speed(report: BenchReport, result: Result) -> list[str]:
    environment = report.environment
    where = result.gpu or f"{one_line(str(environment['cpu']))}, {environment['threads']} threads"
    lines = [f"On {where}:", "", "| batch | median, ms | 95 % interval | speedup over the reference |"]
    lines.append("|---:|---:|---:|---:|")
    for batch in batch_sizes(report):
        if timing := timing_at(result, batch):
            gain = speedup(report, result, batch)
            lines.append(
                f"| {batch} | {number(timing.p50_ms)} | {between(timing.p50_interval_ms, number) or NONE} | "
                f"{times(gain.value) if gain else NONE} |"
            )
    return lines if len(lines) > 4 else []


def _feeding(manifest: Manifest) -> list[str]:
    steps = client_steps(manifest.preprocessing, manifest.input, manifest.embedding)
    numbered = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    return [*numbered, "", "The JSON file beside the model says each step for programs in any language."]


def _thresholds(manifest: Manifest, result: Result) -> list[str]:
    measured = next((each for each in manifest.thresholds if each.precision == result.precision), None)
    if measured is None or not measured.points:
        return []
    lines = [
        "Two crops show one person if their distance is at most:",
        "",
        "| false match rate | distance | accepted |",
    ]
    lines.append("|---:|---:|---:|")
    lines += [f"| {point.fmr:g} | {point.distance:.4f} | {point.tpr:.1%} |" for point in measured.points]
    genuine, impostor = count(measured.genuine), count(measured.impostor)
    return [
        *lines,
        "",
        f"Measured on {genuine} pairs of one person and {impostor} of two. Other cameras need their own.",
    ]


def _check(artifact: Path, result: Result) -> list[str]:
    return [
        "```",
        f"pmm selftest .                                  # all files as sealed, and {result.backend} gives these",
        f"pmm selftest {artifact.name} --embeddings FILE.csv   # what another program makes of the same crops",
        "```",
    ]


def _limits(report: BenchReport, result: Result, pictures: bool) -> list[str]:
    lines = []
    if report.dataset.name == "synthetic":
        lines.append(f"- {SYNTHETIC}")
    lines.append(
        "- The figures are of the data set named above; measure on crops of your own cameras before you decide."
    )
    if result.map_delta_interval and result.map_delta_interval[0] < 0:
        lost = abs(100 * result.map_delta_interval[0])
        lines.append(f"- A loss of up to {lost:.2f} points of mAP against the reference cannot be ruled out.")
    if wrong := report.wrong_preprocessing:
        costs = [
            f"{one_line(each.mistake)}: {points(each.map_delta)} points"
            for each in wrong.costs
            if each.map_delta is not None and each.map_delta < -0.001
        ]
        if costs:
            lines.append(f"- Crops that are prepared wrongly cost mAP, without a word: {'; '.join(costs)}.")
    if pictures:
        lines.append("- The report shows pictures of people of the data set, and the names of their files.")
    lines += [f"- {one_line(note)}" for note in (*result.notes, *result.untimed)]
    return lines
