"""A bench result as people read it: a table for the terminal, report.json, report.md and a self-contained report.html.

The input is one plain dictionary, schema "pmm-bench-1": what report.json holds. Fractions are in 0..1, latencies in ms.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmm.bench.plots import data_uri, plots
from pmm.bench.wording import (
    NONE,
    SAME_RANKING,
    batch_sizes,
    cosine,
    label,
    number,
    one_line,
    percent,
    points,
    size,
    spoken_name,
    timing_at,
    verdict,
)
from pmm.files import write_file
from pmm.kernels import describe_build

if TYPE_CHECKING:
    from PIL import Image

TITLE = "Does the ranking survive export, and how fast is it?"
SYNTHETIC_NOTE = "The people in this data set are synthetic (drawn by a program): no figure here is about real people."


def write_reports(report: dict[str, Any], out: Path, picture: Image.Image | None = None) -> None:
    """Write report.json, report.md and report.html into the folder `out`; `picture` (ranked lists) goes into the HTML,
    and beside it as ranked-lists.png.

    Figures that are not finite become null, as JSON has no word for them. Raises UserError if `out` cannot be written.
    """
    report = _plain_types(report)
    write_file(out / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    # "replace": a path with bytes that are no text must not cost the whole report
    write_file(out / "report.md", markdown(report).encode("utf-8", "replace"))
    write_file(out / "report.html", html(report, picture).encode("utf-8", "replace"))
    if picture is not None:
        write_file(out / "ranked-lists.png", _png(picture))


def html(report: dict[str, Any], picture: Image.Image | None = None) -> str:
    """The report as one HTML page that refers to nothing outside itself."""
    import jinja2

    # autoescape=True, not select_autoescape: that one goes by the file name, and .j2 is not on its list
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        title=TITLE,
        verdict=verdict(report),
        tolerance=SAME_RANKING,
        note=SYNTHETIC_NOTE if _synthetic(report) else "",
        batches=batch_sizes(report),
        ran=[result for result in report["results"] if result["status"] == "ok"],
        not_ran=[result for result in report["results"] if result["status"] != "ok"],
        plots=plots(report),
        picture=None if picture is None else data_uri(_png(picture), "png"),
        measured=_measured(report),
        facts=_facts(report),
        name=spoken_name,
        timing_at=timing_at,
        percent=percent,
        points=points,
        cosine=cosine,
        number=number,
        size=size,
    )


def table(report: dict[str, Any]) -> str:
    """The Markdown table for the terminal: mAP, rank-1 in %, delta in points of mAP against torch fp32, latency in ms.

    Backends that failed or could not run follow as one line each with their reason.
    """
    return _table(report, one_line)


def _table(report: dict[str, Any], text: Callable[[str], str]) -> str:
    batches = batch_sizes(report)
    rows = [["backend", "precision", "mAP", "delta", "rank-1", "min cosine"]]
    for batch in batches:
        rows[0] += [f"p50 / p90 ms @{batch}", f"images/s @{batch}"]
    for result in report["results"]:
        if result["status"] != "ok":
            continue
        row = [text(label(result)), text(result["precision"]), percent(result["mAP"]), points(result["map_delta"])]
        row += [percent(result["rank1"]), cosine(result["min_cosine"])]
        for batch in batches:
            timing = timing_at(result, batch) or {}
            row.append(f"{number(timing.get('p50_ms'))} / {number(timing.get('p90_ms'))}" if timing else NONE)
            row.append(number(timing.get("images_per_s")))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(pad(cell, i, widths[i]) for i, cell in enumerate(row)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) if i < 2 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|")
    if len(rows) == 1:
        lines = ["no backend could be measured"]
    missing = []
    for r in report["results"]:
        if r["status"] != "ok":
            built = f" ({text(r['artifact'])})" if r["artifact"] else ""
            reason = text(r["reason"] or "no reason given")
            missing.append(f"- {text(label(r))}, {text(r['precision'])}: {r['status']}: {reason}{built}")
    return "\n".join([*lines, "", *missing] if missing else lines)


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: all that the HTML page says, without its pictures."""
    said = verdict(report)
    parts = [f"# {TITLE}", f"**{_escape(said.headline)}**"]
    parts += ["\n".join(f"- {_escape(sentence)}" for sentence in said.sentences)] if said.sentences else []
    if _synthetic(report):
        parts.append(SYNTHETIC_NOTE)
    details = []
    for r in report["results"]:
        if r["status"] == "ok":
            artifact = f"artifact {r['artifact']} ({size(r['artifact_bytes'])})" if r["artifact"] else "no artifact"
            details.append(
                f"- {_escape(label(r))}, {_escape(r['precision'])}: {_escape(r['provider'])}; {_escape(artifact)}; "
                f"loaded in {number(r['load_s'])} s; mINP {percent(r['mINP'])}; rank-1 difference "
                f"{points(r['rank1_delta'])} points; median cosine {cosine(r['median_cosine'])}; "
                f"{r['skipped_queries']} queries skipped"
            )
    parts += [_table(report, _escape), *(["## Details per backend", "\n".join(details)] if details else [])]
    parts += ["## How it was measured", "\n".join(f"- {_escape(line)}" for line in _measured(report))]
    parts += ["## Environment", "\n".join(f"- {_escape(key)}: {_escape(value)}" for key, value in _facts(report))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _measured(report: dict[str, Any]) -> list[str]:
    """How the figures came about, a line each."""
    data, method = report["dataset"], report["method"]
    skipped = sorted({r["skipped_queries"] for r in report["results"] if r["skipped_queries"]})
    return [
        f"Data: {data['name']} ({data['root']}), {data['queries']} queries of {data['identities']} identities against "
        f"{data['gallery']} gallery crops, {data['distractors']} of them distractors (people who are no query).",
        "Every backend embeds the same crops; mAP, rank-1 and mINP come from its own embeddings of query and gallery"
        + (f" ({' or '.join(map(str, skipped))} queries without a right answer skipped)." if skipped else "."),
        "delta is the backend's mAP minus that of torch fp32, in percentage points: below zero is a loss.",
        "min cosine compares each crop's embedding with the one torch fp32 gives it; 1 is the same direction, the "
        "lowest is shown (cut, not rounded up).",
        f"A latency sample includes: {method['includes']}. Warm-up {number(method['warmup_s'])} s, then "
        f"at most {method['samples_per_batch']} samples per batch size; p50 is their median, p90 the time that nine of "
        f"ten keep ({NONE} where there are too few samples to say).",
    ]


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Provenance: (what, value)."""
    checkpoint, machine = report["checkpoint"], report["environment"]
    facts = [
        ("measured", report["created"]),
        ("checkpoint", f"{checkpoint['path']} (sha256 {checkpoint['sha256']})"),
        ("model", f"{checkpoint['method']}, epoch {checkpoint['epoch']}, {number(checkpoint['parameters_m'])} M "
         f"parameters, {checkpoint['embedding_dim']} numbers per embedding"),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used"),
        ("GPU", ", ".join(map(str, machine["gpus"])) or "none"),
        ("system", f"{machine['os']}, Python {machine['python']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
        ("kernels of the mix, which runs in training only", describe_build(machine["kernels"])),
        ("commit", machine["commit"] or "unknown"),
    ]  # fmt: skip
    return [(what, str(value)) for what, value in facts]


def _synthetic(report: dict[str, Any]) -> bool:
    return bool(report["dataset"]["name"] == "synthetic")


def pad(cell: str, column: int, width: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _escape(text: str) -> str:
    """As Markdown that shows `text` and nothing else: no markup, no table cell, no HTML."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", one_line(text))


def _plain_types(value: Any) -> Any:
    """What JSON can hold: numpy scalars as numbers, paths as text, NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(key): _plain_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_types(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
