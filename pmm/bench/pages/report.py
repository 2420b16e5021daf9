"""A bench result as people read it: a table for the terminal, report.json, report.md, a self-contained report.html."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.bench.pages import sections
from pmm.bench.pages.format import NONE, cosine, escape, number, one_line, points
from pmm.bench.pages.gate_list import GateLine, counted
from pmm.bench.pages.pictures import ReportPictures
from pmm.bench.pages.plots import data_uri, plots
from pmm.bench.pages.queries import flagged, missing, ran, reference_of, shown_batches, speedup, timing_at
from pmm.bench.pages.sections import Section
from pmm.bench.pages.tables import UNSTEADY, Table, flips
from pmm.bench.pages.verdict import verdict
from pmm.bench.schema import BenchReport, Result
from pmm.utils.files import write_file

if TYPE_CHECKING:
    from PIL import Image

TITLE = "Does the ranking survive export, and how fast is it?"
SYNTHETIC_NOTE = "The people in this data set are synthetic (drawn by a program): no figure here is about real people."
UNTIMED = "No backend gave a latency, so there is nothing to plot."


def write_reports(report: BenchReport, out: Path, pictures: ReportPictures) -> None:
    """Write report.json, report.md, report.html and, if there is such a picture, ranked-lists.png into `out`.

    Raises ValueError, with nothing written, if a figure is not finite; UserError if `out` cannot be written.
    """
    write_file(out / "report.json", report.to_json())  # first: what follows can be made from it again
    # "replace": a path with bytes that are no text must not cost the whole report
    write_file(out / "report.md", markdown(report).encode("utf-8", "replace"))
    write_file(out / "report.html", html(report, pictures).encode("utf-8", "replace"))
    if pictures.ranked is not None:
        write_file(out / "ranked-lists.png", _encoded(pictures.ranked, "PNG"))


def html(report: BenchReport, pictures: ReportPictures) -> str:
    """The report as one HTML page that refers to nothing outside itself."""
    import jinja2

    # autoescape=True, not select_autoescape: that one goes by the file name, and .j2 is not on its list
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # a figure and its percent sign stay in one line
        finalize=lambda value: value.replace(" %", "\u00a0%") if isinstance(value, str) else value,
    )
    said, drawn = verdict(report), plots(report)
    best = report.result(said.ships) if said.ships else None
    found = sections.results(report)
    chapters = [sections.accuracy(report), sections.thresholds(report), sections.lost(report), sections.timing(report)]
    accuracy, thresholds, lost, timing = chapters
    careful = sections.careful(report)
    contents = [(section.anchor, section.title.split(":")[0]) for section in [found, *chapters] if section]
    contents[1:1] = [("plots", "Plots")] if drawn.spread else []
    contents += [("careful", "Figures to be careful with")] if careful.lines or careful.notes else []
    contents += [("measured", "How it was measured"), ("environment", "Environment")]
    return environment.get_template("report.html.j2").render(
        report=report,
        title=TITLE,
        verdict=said,
        gates_in_short=counted(said.gates),
        notes=_notes(report),
        contents=contents,
        untimed=UNTIMED,
        results=found,
        absent=_absent(report),
        plots=drawn,
        accuracy=accuracy,
        thresholds=thresholds,
        deploy=sections.to_deploy(best) if best else "",
        lost=lost,
        worst=[(one_line(name), _embedded(picture)) for name, picture in pictures.worst.items()],
        timing=timing,
        careful=careful,
        ranked=None if pictures.ranked is None else _embedded(pictures.ranked),
        measured=sections.measured(report),
        facts=sections.facts(report),
    )


def table(report: BenchReport) -> str:
    """The table for the terminal, in Markdown, the fastest first: mAP in %, its change in points, latency in ms.

    Then a line per latency that is not to be trusted, per backend that failed or could not run, and per failed gate.
    """
    reference, batches = reference_of(report), shown_batches(report)
    first = batches[0] if batches else 0
    rows = [["result", "mAP %", "change [95 %]", "lost+gained", "cosine", *(f"ms @{b}" for b in batches)]]
    rows[0] += [f"times @{first}", "images/s"]
    for result in ran(report):
        own = result is reference
        found = speedup(report, result, first)
        row = [one_line(result.name), NONE if result.mAP is None else f"{100 * result.mAP:.1f}"]
        row += (
            [NONE, NONE, NONE]
            if own
            else [_change(result), flips(result).replace(" / ", "+"), cosine(result.min_cosine)]
        )
        row += [_latency(result, batch) for batch in batches]
        most = max((t.images_per_s for t in result.batches), default=None)
        row += [NONE if found is None else number(found.value), number(most)]
        rows.append(row)
    lines = _aligned(rows) if len(rows) > 1 else ["no backend could be measured"]
    if batches:
        lines += ["", f"ms: p50/p95 of a call at a batch size; times: as fast as {one_line(report.reference)}"]
    for result, timing in flagged(report):
        lines.append(f"{UNSTEADY} {one_line(result.name)}, batch {timing.batch}: {one_line('; '.join(timing.flags))}")
    lines += [f"note {note}" for note in sections.careful(report).notes]
    lines += [f"- {names}: {status}: {reason}" for names, status, reason in _absent(report)]
    lines += [f"gate {one_line(f.gate)}: {one_line(f.result)}: {one_line(f.said)}" for f in report.gates.failures]
    return "\n".join(lines)


def markdown(report: BenchReport) -> str:
    """The report as Markdown: all that the HTML page says, without its pictures."""
    said = verdict(report)
    best = report.result(said.ships) if said.ships else None
    parts = [f"# {TITLE}", f"**{escape(said.headline)}**", f"**{escape(said.failing)}**" if said.failing else ""]
    parts += [_bullets(said.sentences)]
    parts += [f"## Gates: {counted(said.gates)}", "\n".join(map(_gate, said.gates))]
    parts += map(escape, _notes(report))
    found = sections.results(report)
    parts += _section(found) if found.parts else [f"## {found.title}", "no backend could be measured"]
    parts.append(_bullets([": ".join(each) for each in _absent(report)]))
    parts += _section(sections.accuracy(report))
    parts += _section(sections.thresholds(report))
    parts += [escape(sections.to_deploy(best))] if best else []
    parts += _section(sections.lost(report))
    parts += _section(sections.timing(report))
    careful = sections.careful(report)
    if careful.lines or careful.notes:
        parts += ["## Figures to be careful with", _bullets([*careful.notes, *careful.lines])]
        parts.append(_bullets([f"{word}: {meaning}" for word, meaning in careful.meanings]))
    parts += ["## How it was measured", _bullets(sections.measured(report))]
    parts += ["## Environment", _bullets([f"{key}: {value}" for key, value in sections.facts(report)])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section | None) -> list[str]:
    if section is None:
        return []
    parts = [f"## {section.title}", escape(section.note)]
    for part in section.parts:
        parts += [f"### {escape(part.title)}"] if part.title else []
        parts += _markdown_table(part.table)
    return [*parts, _bullets([f"{term}: {meaning}" for term, meaning in section.terms])]


def _markdown_table(table: Table) -> list[str]:
    """The table; one per group of columns where it has any, since Markdown knows no heads over heads."""
    groups = dict.fromkeys(column.group for column in table.columns[1:])
    found = []
    for group in groups:
        kept = [0, *(i for i, column in enumerate(table.columns) if i and column.group == group)]
        columns = [table.columns[i] for i in kept]
        rows = [[_said(column.head, column.sub) for column in columns]]
        rows += [[_said(row[i].text, row[i].sub) for i in kept] for row in table.rows]
        found += [f"**{escape(group)}**"] if group else []
        found.append("\n".join(_aligned(rows, left={i for i, column in enumerate(columns) if column.words} | {0})))
    return found


def _said(text: str, sub: str) -> str:
    return escape(text + (f" ({sub})" if sub else "").replace("\n", ", "))


def _aligned(rows: list[list[str]], left: Collection[int] = (0,)) -> list[str]:
    """Rows of a Markdown table, the first its head, that line up in a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(
        1, "|" + "|".join("-" * (w + 2) if i in left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    )
    return lines


def _gate(gate: GateLine) -> str:
    asks = f" ({escape(gate.asks)})" if gate.asks else ""
    return "\n".join(
        [f"- {gate.status}: {escape(gate.flag)}{asks}", *(f"  - {escape(line)}" for line in gate.failures)]
    )


def _bullets(lines: list[str] | tuple[str, ...]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _change(result: Result) -> str:
    sure = result.map_delta_interval
    return points(result.map_delta) + (f" [{points(sure[0])}, {points(sure[1])}]" if sure else "")


def _latency(result: Result, batch: int) -> str:
    timing = timing_at(result, batch)
    if timing is None:
        return NONE
    slow = "" if timing.p95_ms is None else f"/{number(timing.p95_ms)}"
    return f"{number(timing.p50_ms)}{slow}{UNSTEADY * bool(timing.flags)}"


def _absent(report: BenchReport) -> list[tuple[str, str, str]]:
    """Who failed or could not run, and why, those with one reason together: (names, status, reason)."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in missing(report):
        found.setdefault((result.status, one_line(result.reason or "no reason given")), []).append(result)
    return [(_together(results), status, reason) for (status, reason), results in found.items()]


def _together(results: Sequence[Result]) -> str:
    """Names, a backend's own only once: ort-cuda fp32, fp16; tensorrt fp32."""
    found: dict[str, list[str]] = {}
    for result in results:
        rest = one_line(result.name.removeprefix(result.backend)).strip()
        found.setdefault(one_line(result.backend), []).append(rest)
    return "; ".join(f"{backend} {', '.join(rest)}" for backend, rest in found.items())


def _notes(report: BenchReport) -> list[str]:
    """What to know before any figure is believed."""
    problems = [f"This machine: {one_line(problem)}" for problem in report.environment.get("problems") or ()]
    return [*([SYNTHETIC_NOTE] if report.dataset.name == "synthetic" else []), *problems]


def _embedded(picture: Image.Image) -> str:
    """As a data URI: JPEG, since crops as PNG would make a page of many megabytes."""
    return data_uri(_encoded(picture, "JPEG"), "jpeg")


def _encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    # subsampling 0: coloured frames keep sharp edges
    picture.save(buffer, kind, optimize=True, **({"quality": 85, "subsampling": 0} if kind == "JPEG" else {}))
    return buffer.getvalue()
