"""The figures of docs/gallery.md, from a report of pmm bench --gallery.

python -m bench.lab.gallery_page REPORT.json [--busy]

Writes the part of the page between its marks. `--check` only says whether it is what the report gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.bench.chain_schema import ChainLink, ChainReport
from pmm.bench.pages.format import NONE, count, number, one_in, points, threshold
from pmm.bench.schema import BenchReport, read_report
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import InvalidFile
from pmm.utils.files import write_file

PAGE = Path(__file__).parents[2] / "docs" / "gallery.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
HEADS = ("link", "bytes", "mAP", "change", "rank-1 lost/gained", "top-10 overlap", "FMR", "TPR %")
TIMES = ("alone", "in batches", "build s")
BUSY = "busy with other programs at the time, so without times"
KEPT = ("--max-map-drop", "--max-rank1-flips", "--max-fmr-factor", "--max-tpr-drop", "--gallery")


@dataclass(frozen=True, kw_only=True)
class GalleryPageCommand:
    """`python -m bench.lab.gallery_page REPORT`"""

    report: Annotated[Path, Arg("REPORT", positional=True)]
    """A report.json with a chain."""
    busy: bool = False
    """Other programs ran at the same time: the times are left out, and the page says so."""
    check: bool = False
    """Write nothing; the exit code is 1 if the page has other figures."""


def main(prog: str) -> int:
    """Entry point."""
    command = command_line.parse(GalleryPageCommand, prog=prog, description=__doc__ or "")
    new = with_figures(PAGE.read_text(), command.report, busy=command.busy)
    if command.check:
        return int(new != PAGE.read_text())
    write_file(PAGE, new)
    return 0


def with_figures(page: str, report: Path, *, busy: bool = False) -> str:
    """The page with the figures of a report. Raises InvalidFile for a report without a chain, and ValueError for a
    page without the marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + figures(read_report(report), report, busy=busy) + END + after


def figures(report: BenchReport, path: Path, *, busy: bool = False) -> str:
    """The table, and what it was measured on. Raises InvalidFile for a report without a chain."""
    chain = report.chain
    if chain is None:
        raise InvalidFile("it has no chain", path=path, hint="measure with pmm bench --gallery")
    heads = (*HEADS, *(() if busy else TIMES), "gates")
    rows = [_row(chain, link, busy) for link in chain.links if link.status == "ok"]
    lines = [_line(heads), "|---|" + "--:|" * (len(heads) - 2) + "---|", *map(_line, rows)]
    made_up = f", {chain.distractors:,} of them made up" if chain.distractors else ""
    loaded = f", {BUSY}" if busy else ""
    machine = f"{report.environment.get('cpu')}, {report.timing.threads} threads, {report.created[:10]}{loaded}"
    about = (
        f"{report.dataset.queries:,} queries against {chain.gallery:,} gallery crops{made_up}; embeddings of "
        f"{chain.artifact}, {report.checkpoint.embedding_dim} dimensions. {machine} "
        f"([raw result](../bench/results/{path.name}))."
    )
    terms = (
        f"Bytes: per crop, on disk. Change of mAP in points, rank-1 and top-10 overlap against {report.reference}. FMR "
        f"and TPR at the threshold that accepts {one_in(chain.target_fmr)} pairs of different people by "
        f"{chain.artifact}, a distance of {threshold(chain.threshold)}. Gates: those that the link fails."
    )
    if not busy:
        terms += " Alone, in batches: queries per second, ten crops each, one at a time and 64 at once."
    return "\n".join(["", about, "", *lines, "", terms, ""])


def _row(chain: ChainReport, link: ChainLink, busy: bool) -> tuple[str, ...]:
    total = link.total
    failed = [gate for gate in KEPT if gate in link.failed_gates]
    return (
        f"{link.name} ({link.settings})" if link.settings else link.name,
        NONE if link.disk_bytes is None else count(round(link.disk_bytes / chain.gallery)),
        NONE if link.mAP is None else f"{100 * link.mAP:.2f}",
        points(total.map_delta) if total else NONE,
        f"{total.rank1_lost}/{total.rank1_gained}" if total else NONE,
        f"{total.top10_overlap:.3f}" if total else NONE,
        NONE if link.fmr is None else f"{link.fmr:.2e}",
        NONE if link.tpr is None else f"{100 * link.tpr:.1f}",
        *(() if busy else map(number, (link.alone_per_s, link.batch_per_s, link.build_s))),
        ", ".join(f"`{gate}`" for gate in failed) or "",
    )


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    command_line.run(main, prog="python -m bench.lab.gallery_page")
