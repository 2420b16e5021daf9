"""From the checkpoint to the index, in a bench report: a section, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable

from pmm.bench.chain.distractors import MODEL
from pmm.bench.chain_schema import ChainLink, ChainLoss, ChainReport
from pmm.bench.pages.format import (
    NONE,
    between,
    count,
    number,
    one_in,
    one_line,
    percent,
    points,
    seconds,
    size,
    threshold,
)
from pmm.bench.pages.sections import Part, Section
from pmm.bench.pages.tables import Cell, Column, Table, both, loss_tone
from pmm.bench.schema import BenchReport

Figure = Callable[[ChainLink], str | Cell]
KINDS = {
    "checkpoint": "checkpoint",
    "artifact": "artifact",
    "stored": "stored vectors",
    "list": "exact list",
    "index": "index",
}


def section(report: BenchReport) -> Section | None:
    """The chain; None if it was not measured."""
    chain = report.chain
    if chain is None:
        return None
    made_up = f", {chain.distractors:,} of them made up ({MODEL})" if chain.distractors else ""
    parts = [Part(table=_losses(chain)), Part(title="At the deployed threshold", table=_decisions(chain))]
    parts.append(Part(title="Speed and size", table=_costs(chain)))
    if chain.impostor_quantiles:
        parts.append(Part(title="How the made-up crops fit the others", table=_quantiles(chain), collapsed=True))
    troubles = _troubles(chain)
    if troubles.rows:
        parts.append(Part(title="Faults and failures", table=troubles))
    return Section(
        anchor="chain",
        title="From the checkpoint to the index: which link loses what?",
        note=f"Each link ranks {chain.gallery:,} gallery crops{made_up} for the same {report.dataset.queries:,} "
        f"queries; the embeddings are those of {one_line(chain.artifact)}. The losses of the links add up to the "
        f"total. At the deployed threshold, a distance of {threshold(chain.threshold)}, {one_line(chain.artifact)} has "
        f"a false match rate of {one_in(chain.target_fmr)} on the data set.",
        parts=tuple(parts),
        terms=(
            ("loss", "against the link that it takes its vectors from, in points; below zero is a loss"),
            ("total", f"against {one_line(report.reference)}"),
            ("mAP, mINP", f"of the whole ranking; of an index and an exact list, of lists of {chain.depth:,} crops: "
             "what they do not list counts as not found, and a graph is searched with an ef of at least that length"),
            ("rank-1, top-10 overlap", "of lists of ten crops, as a user would request them"),
            ("top-10 overlap", "share of the first ten crops of the link before that are among the first ten here"),
            ("flips", "pairs within the threshold at this link and not at the one before / the reverse"),
            ("FMR, TPR", "share of the pairs of two identities, and of one, that lie within the deployed threshold; of "
             f"an index and an exact list, those among its {chain.depth:,} crops, too few for the FMR of a large "
             "gallery: the gates hold an index against the exact list, which is as long"),
            ("alone, batches", "queries per second, ten crops each: one query at a time, and 64 at once; the indexes "
             "take turns"),
            ("resident", "bytes in memory during a search, without memory-mapped files"),
            ("certified", "our exact search; it is checked here that its rows and distances are those of brute force"),
        ),
    )  # fmt: skip


def chain_rows(report: BenchReport) -> list[list[str]]:
    """Rows of a table for the terminal, the first its head; empty if nothing was measured."""
    chain = report.chain
    if chain is None:
        return []
    head = "link|mAP %|loss|total|rank-1 -/+|top-10|FMR|TPR %|flips +/-|queries/s|batched|bytes/crop|gates"
    rows = [head.split("|")]
    for link in chain.links:
        loss, total = link.loss, link.total
        row = [
            one_line(link.name),
            NONE if link.mAP is None else f"{100 * link.mAP:.2f}",
            points(loss.map_delta) if loss else NONE,
            points(total.map_delta) if total else NONE,
            f"{loss.rank1_lost}/{loss.rank1_gained}" if loss else NONE,
            f"{loss.top10_overlap:.3f}" if loss else NONE,
            _rate(link.fmr),
            NONE if link.tpr is None else f"{100 * link.tpr:.1f}",
            f"{loss.newly_accepted}/{loss.newly_rejected}" if loss else NONE,
            number(link.alone_per_s),
            number(link.batch_per_s),
            NONE if link.disk_bytes is None else f"{link.disk_bytes / chain.gallery:.0f}",
            ", ".join(link.failed_gates) or (link.status if link.status != "ok" else NONE),
        ]
        rows.append([*map(one_line, row)])
    return rows


def chain_notes(report: BenchReport) -> list[str]:
    """A line per fault and per link that could not be measured."""
    if report.chain is None:
        return []
    return [f"- {row[0].text}: {row[1].text}" for row in _troubles(report.chain).rows]


def _losses(chain: ChainReport) -> Table:
    def change(field: str, of: Callable[[ChainLink], ChainLoss | None]) -> Figure:
        def cell(link: ChainLink) -> str | Cell:
            loss = of(link)
            if loss is None:
                return NONE
            value, interval = getattr(loss, f"{field}_delta"), getattr(loss, f"{field}_delta_interval")
            return Cell(points(value), between(interval, points), loss_tone(value, interval))

        return cell

    def flips(link: ChainLink) -> str:
        return both(count(link.loss.rank1_lost), count(link.loss.rank1_gained)) if link.loss else NONE

    loss, total = "loss, points", "total, points"
    columns: list[tuple[Column, Figure]] = [
        (Column("mAP"), lambda link: percent(link.mAP, 2)),
        (Column("rank-1"), lambda link: percent(link.rank1, 2)),
        (Column("mINP"), lambda link: percent(link.mINP, 2)),
        (Column("mAP", "interval", loss), change("map", lambda link: link.loss)),
        (Column("rank-1", "interval", loss), change("rank1", lambda link: link.loss)),
        (Column("mINP", "interval", loss), change("minp", lambda link: link.loss)),
        (Column("rank-1", "lost / gained", loss), flips),
        (
            Column("top-10 overlap", "", loss),
            lambda link: percent(link.loss.top10_overlap, 2) if link.loss else NONE,
        ),
        (Column("mAP", "interval", total), change("map", lambda link: link.total)),
        (Column("rank-1", "interval", total), change("rank1", lambda link: link.total)),
    ]
    return _table(chain, columns)


def _decisions(chain: ChainReport) -> Table:
    columns: list[tuple[Column, Figure]] = [
        (Column("FMR"), lambda link: _rate(link.fmr)),
        (Column("TPR"), lambda link: percent(link.tpr, 2)),
        (Column("flips", "accepted / rejected"),
         lambda link: both(count(link.loss.newly_accepted), count(link.loss.newly_rejected)) if link.loss else NONE),
        (Column("gates"), _gates),
    ]  # fmt: skip
    return _table(chain, columns)


def _costs(chain: ChainReport) -> Table:
    def per_row(value: int | None) -> str | Cell:
        return NONE if value is None else Cell(size(value), f"{value / chain.gallery:.0f} per crop")

    columns: list[tuple[Column, Figure]] = [
        (Column("alone", "ms"), lambda link: number(link.alone_ms)),
        (Column("alone", "queries/s"), lambda link: number(link.alone_per_s)),
        (Column("batches of 64", "queries/s"), lambda link: number(link.batch_per_s)),
        (Column("build"), lambda link: seconds(link.build_s)),
        (Column("resident"), lambda link: per_row(link.resident_bytes)),
        (Column("on disk"), lambda link: per_row(link.disk_bytes)),
        (Column("settings", words=True), lambda link: one_line(link.settings) or NONE),
    ]
    return _table(chain, columns)


def _quantiles(chain: ChainReport) -> Table:
    rows = [
        (Cell(percent(share, 0)), Cell(number(real)), Cell(number(made)))
        for share, real, made in chain.impostor_quantiles
    ]
    heads = (Column("quantile of the distance"), Column("crops of two identities"), Column("made-up crops"))
    return Table(heads, tuple(rows))


def _troubles(chain: ChainReport) -> Table:
    rows = [(Cell(one_line(link.name)), Cell(one_line(finding))) for link in chain.links for finding in link.findings]
    rows += [
        (Cell(one_line(link.name)), Cell(f"{link.status}: {one_line(link.reason)}"))
        for link in chain.links
        if link.status != "ok"
    ]
    return Table((Column("link"), Column("problem", words=True)), tuple(rows))


def _table(chain: ChainReport, columns: list[tuple[Column, Figure]]) -> Table:
    """A row per link that was measured, without columns that are empty."""
    links = [link for link in chain.links if link.status == "ok"]
    heads, filled = [Column("link", "what")], []
    for column, figures in columns:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in map(figures, links)]
        if any(cell.text != NONE for cell in cells):
            heads.append(column)
            filled.append(cells)
    names = [Cell(one_line(link.name), KINDS[link.kind]) for link in links]
    return Table(tuple(heads), tuple(zip(names, *filled, strict=True)))


def _gates(link: ChainLink) -> Cell:
    if link.kind not in ("stored", "index"):
        return Cell(NONE)
    return (
        Cell("fails", ", ".join(map(one_line, link.failed_gates)), "bad")
        if link.failed_gates
        else Cell("kept", "", "good")
    )


def _rate(rate: float | None) -> str:
    return NONE if rate is None else f"{rate:.2e}"
