"""The files of a bench report: report.json, report.md, a self-contained report.html; and a table for the terminal."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.bench.pages import chain, sections, wrong_preprocessing
from pmm.bench.pages.format import NONE, cosine, escape, number, one_line, points
from pmm.bench.pages.pictures import ReportPictures
from pmm.bench.pages.plots import data_uri, plots
from pmm.bench.pages.queries import completed, flagged, incomplete, reference_of, shown_batches, speedup, timing_at
from pmm.bench.pages.sections import Section
from pmm.bench.pages.tables import UNSTEADY, Table, rank1_flips
from pmm.bench.pages.verdict import GateLine, count_by_status, verdict
from pmm.bench.result_schema import Result
from pmm.bench.schema import BenchReport
from pmm.utils.files import write_file

if TYPE_CHECKING:
    from PIL import Image

TITLE = "Which backends keep the accuracy, and how fast are they?"
SYNTHETIC_NOTE = "The crops of this data set are synthetic (drawn by a program): no figure here is about real people."
METHOD = "How it was measured"
UNRELIABLE = (
    f"These latencies are unreliable, and marked with {UNSTEADY} in the tables; the comparison may come out "
    "differently on an idle machine."
)
UNTIMED = "No backend was timed, so there is nothing to plot."


def write_reports(report: BenchReport, out: Path, pictures: ReportPictures) -> None:
    """Write report.json, report.md, report.html and, if there is such a picture, ranked-lists.png into `out`.

    Raises ValueError, with nothing written, if a figure is not finite; UserError if `out` cannot be written.
    """
    write_file(out / "report.json", report.to_json())  # first: the other files can be made from it
    # "replace": a path with bytes that are no text must not prevent the whole report
    write_file(out / "report.md", markdown(report).encode("utf-8", "replace"))
    write_file(out / "report.html", html(report, pictures).encode("utf-8", "replace"))
    if pictures.ranked is not None:
        write_file(out / "ranked-lists.png", _encoded(pictures.ranked, "PNG"))


def html(report: BenchReport, pictures: ReportPictures) -> str:
    """The report as one HTML page without links to other files."""
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
    summary, drawn = verdict(report), plots(report)
    best = report.result(summary.ships) if summary.ships else None
    results = sections.results(report)
    accuracy, thresholds, lost = sections.accuracy(report), sections.thresholds(report), sections.lost(report)
    preprocessing, timing = wrong_preprocessing.section(report), sections.timing(report)
    links = chain.section(report)
    chapters = [accuracy, thresholds, lost, links, preprocessing, timing]
    caveats = sections.caveats(report)
    contents = [(section.anchor, section.title.split(":")[0]) for section in [results, *chapters] if section]
    contents[1:1] = [("plots", "Plots")] if drawn.spread else []
    contents += [("caveats", sections.CAVEATS)] if caveats.lines or caveats.notes else []
    contents += [("method", METHOD), ("environment", "Environment")]
    return environment.get_template("report.html.j2").render(
        report=report,
        title=TITLE,
        verdict=summary,
        gates_summary=count_by_status(summary.gates),
        epoch=sections.epoch(report),
        notes=_notes(report),
        contents=contents,
        untimed=UNTIMED,
        results=results,
        absent=_absent(report),
        plots=drawn,
        accuracy=accuracy,
        thresholds=thresholds,
        deploy=sections.to_deploy(best) if best else "",
        lost=lost,
        worst=[(one_line(name), _embedded(picture)) for name, picture in pictures.worst.items()],
        chain=links,
        preprocessing=preprocessing,
        timing=timing,
        caveats=caveats,
        caveats_title=sections.CAVEATS,
        unreliable=UNRELIABLE,
        ranked=None if pictures.ranked is None else _embedded(pictures.ranked),
        method_title=METHOD,
        method=sections.method(report),
        facts=sections.facts(report),
    )


def table(report: BenchReport) -> str:
    """The table for the terminal, in Markdown, the fastest first: mAP in %, its change in points, latency in ms.

    Then a line on wrong preprocessing, and one per unreliable latency, per backend that failed or is unavailable, and
    per failed gate.
    """
    reference, batches = reference_of(report), shown_batches(report)
    first = batches[0] if batches else 0
    rows = [["result", "mAP %", "change [95 %]", "rank-1 -/+", "cosine", *(f"ms @{b}" for b in batches)]]
    rows[0] += [f"speedup @{first}", "images/s"]
    for result in completed(report):
        estimate = speedup(report, result, first)
        row = [one_line(result.name), NONE if result.mAP is None else f"{100 * result.mAP:.1f}"]
        if result is reference:
            row += [NONE, NONE, NONE]
        else:
            row += [_change(result), rank1_flips(result).replace(" ", ""), cosine(result.min_cosine)]
        row += [_latency(result, batch) for batch in batches]
        most = max((t.images_per_s for t in result.batches), default=None)
        row += [NONE if estimate is None else number(estimate.value), number(most)]
        rows.append(row)
    lines = _aligned(rows) if len(rows) > 1 else ["no backend could be measured"]
    if batches:
        lines += [
            "",
            f"rank-1 -/+: queries lost/gained; ms: p50/p95 of a call; speedup: over {one_line(report.reference)}",
        ]
    if rows := chain.chain_rows(report):
        lines += ["", *_aligned(rows), *chain.chain_notes(report)]
    lines += [line] if (line := wrong_preprocessing.mistakes_line(report)) else []
    for result, timing in flagged(report):
        lines.append(f"{UNSTEADY} {one_line(result.name)}, batch {timing.batch}: {one_line('; '.join(timing.flags))}")
    lines += [f"note {note}" for note in sections.caveats(report).notes]
    lines += [f"- {names}: {status}: {reason}" for names, status, reason in _absent(report)]
    lines += [f"gate {one_line(f.gate)}: {one_line(f.result)}: {one_line(f.message)}" for f in report.gates.failures]
    return "\n".join(lines)


def markdown(report: BenchReport) -> str:
    """The report as Markdown: the text and tables of the HTML page, without its pictures."""
    summary = verdict(report)
    best = report.result(summary.ships) if summary.ships else None
    parts = [f"# {TITLE}", f"**{escape(summary.headline)}**"]
    parts += [f"**{escape(summary.failing)}**" if summary.failing else "", _bullets(summary.details)]
    parts += [f"## Gates: {count_by_status(summary.gates)}", "\n".join(map(_gate, summary.gates))]
    parts += map(escape, _notes(report))
    results = sections.results(report)
    parts += _section(results) if results.parts else [f"## {results.title}", "no backend could be measured"]
    parts.append(_bullets([": ".join(each) for each in _absent(report)]))
    parts += _section(sections.accuracy(report))
    parts += _section(sections.thresholds(report))
    parts += [escape(sections.to_deploy(best))] if best else []
    parts += _section(sections.lost(report))
    parts += _section(chain.section(report))
    parts += _section(wrong_preprocessing.section(report))
    parts += _section(sections.timing(report))
    caveats = sections.caveats(report)
    if caveats.lines or caveats.notes:
        parts += [f"## {sections.CAVEATS}", _bullets(caveats.notes), UNRELIABLE if caveats.lines else ""]
        parts += [_bullets(caveats.lines), _bullets([f"{word}: {meaning}" for word, meaning in caveats.meanings])]
    parts += [f"## {METHOD}", _bullets(sections.method(report))]
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
    """The table; one per group of columns if it has groups, as Markdown has a single row of heads."""
    groups = dict.fromkeys(column.group for column in table.columns[1:])
    parts = []
    for group in groups:
        indices = [0, *(i for i, column in enumerate(table.columns) if i and column.group == group)]
        columns = [table.columns[i] for i in indices]
        rows = [[_cell(column.head, column.sub) for column in columns]]
        rows += [[_cell(row[i].text, row[i].sub) for i in indices] for row in table.rows]
        parts += [f"**{escape(group)}**"] if group else []
        parts.append("\n".join(_aligned(rows, left={i for i, column in enumerate(columns) if column.words} | {0})))
    return parts


def _cell(text: str, sub: str) -> str:
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
    requirement = f" ({escape(gate.requirement)})" if gate.requirement else ""
    return "\n".join(
        [f"- {gate.status}: {escape(gate.flag)}{requirement}", *(f"  - {escape(line)}" for line in gate.failures)]
    )


def _bullets(lines: list[str] | tuple[str, ...]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _change(result: Result) -> str:
    interval = result.map_delta_interval
    return points(result.map_delta) + (f" [{points(interval[0])}, {points(interval[1])}]" if interval else "")


def _latency(result: Result, batch: int) -> str:
    timing = timing_at(result, batch)
    if timing is None:
        return NONE
    slow = "" if timing.p95_ms is None else f"/{number(timing.p95_ms)}"
    return f"{number(timing.p50_ms)}{slow}{UNSTEADY * bool(timing.flags)}"


def _absent(report: BenchReport) -> list[tuple[str, str, str]]:
    """Results that failed or are unavailable, grouped by reason: (names, status, reason)."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in incomplete(report):
        groups.setdefault((result.status, one_line(result.reason or "no reason given")), []).append(result)
    return [(_names(results), status, reason) for (status, reason), results in groups.items()]


def _names(results: Sequence[Result]) -> str:
    """Names of results, with each backend once: ort-cuda fp32, fp16; tensorrt fp32."""
    backends: dict[str, list[str]] = {}
    for result in results:
        rest = one_line(result.name.removeprefix(result.backend)).strip()
        backends.setdefault(one_line(result.backend), []).append(rest)
    return "; ".join(f"{backend} {', '.join(rest)}" for backend, rest in backends.items())


def _notes(report: BenchReport) -> list[str]:
    """What limits all figures: synthetic data, known problems of the machine."""
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
