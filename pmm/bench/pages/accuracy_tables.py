"""Tables of a bench report about accuracy: three tiers, cameras, thresholds, and the queries with the largest loss."""

from __future__ import annotations

from collections.abc import Callable

from pmm.bench.pages.format import NONE, between, cosine, count, one_in, one_line, percent, points, small, threshold
from pmm.bench.pages.queries import completed, reference_of
from pmm.bench.pages.tables import Cell, Column, Figures, Table, both, but_reference, lines, loss_tone, table_of
from pmm.bench.result_schema import LostQuery, OperatingPoint, Result
from pmm.bench.schema import BenchReport


def accuracy_table(report: BenchReport) -> Table:
    """Three tiers: the embeddings, the ranking, the identities found."""
    reference = reference_of(report)

    def others(figures: Figures) -> Figures:
        return but_reference(report, figures)

    def worst(result: Result) -> Cell:
        return Cell(cosine(result.min_cosine), lines(cosine(result.p1_cosine), cosine(result.median_cosine)))

    def tau(result: Result) -> str:
        return NONE if result.kendall_tau is None else f"{result.kendall_tau:.4f}"

    def share(name: str) -> Figures:
        """The field `name`, its difference from the reference's, and the interval of that."""

        def cell(result: Result) -> Cell:
            prefix = f"{name.lower()}_delta"
            value, delta, interval = (getattr(result, field) for field in (name, prefix, f"{prefix}_interval"))
            if result is reference or delta is None:
                return Cell(percent(value))
            return Cell(percent(value), lines(points(delta), between(interval, points)), loss_tone(delta, interval))

        return cell

    numbers, order, retrieval = "1. Same embeddings?", "2. Same ranking?", "3. Same identities found?"
    columns: list[tuple[Column, Figures]] = [
        (Column("worst cosine", "1 %, median", numbers), others(worst)),
        (Column("largest difference", "", numbers), others(lambda r: small(r.max_abs))),
        (Column("norm error", "", numbers), others(lambda r: small(r.max_norm_error))),
        (Column("worst cosine across batch sizes", "", numbers), lambda r: cosine(r.batch_min_cosine)),
        (Column("first crop changed", "queries", order), others(lambda r: count(r.top1_changed))),
        (Column("top-10 overlap", "", order), others(lambda r: percent(r.top10_overlap, 2))),
        (Column("Kendall's tau", "", order), others(tau)),
        *(
            (Column(label, "difference, interval", retrieval), share(name))
            for name, label in (("mAP", "mAP"), ("rank1", "rank-1"), ("mINP", "mINP"))
        ),
    ]
    return table_of(report, completed(report), columns)


def camera_table(report: BenchReport) -> Table | None:
    """mAP per camera of the queries; of all but the reference, its change. None without cameras."""
    reference = reference_of(report)
    cameras = {c.camid: c.queries for r in completed(report) for c in r.cameras}
    if not cameras:
        return None

    def of(camid: int) -> Figures:
        def cell(result: Result) -> str | Cell:
            camera = next((c for c in result.cameras if c.camid == camid), None)
            if camera is None or result is reference:
                return NONE if camera is None else percent(camera.mAP)
            return Cell(points(camera.map_delta), percent(camera.mAP), loss_tone(camera.map_delta))

        return cell

    columns = [(Column(f"camera {c}", f"{queries:,} queries"), of(c)) for c, queries in sorted(cameras.items())]
    return table_of(report, [r for r in completed(report) if r.cameras], columns)


def threshold_table(report: BenchReport) -> Table | None:
    """Equal error rate, and the true-positive rate and threshold at every operating point. None without thresholds."""
    results = [r for r in completed(report) if r.thresholds]
    rates = sorted({p.fmr for r in results if r.thresholds for p in r.thresholds.points}, reverse=True)
    if not results:
        return None

    def at(rate: float, figures: Callable[[OperatingPoint], str | Cell]) -> Figures:
        def cell(result: Result) -> str | Cell:
            known = result.thresholds.points if result.thresholds else ()
            point = next((p for p in known if p.fmr == rate), None)
            return NONE if point is None else figures(point)

        return cell

    def flip(point: OperatingPoint) -> Cell:
        parts = both(count(point.newly_accepted), count(point.newly_rejected)) if point.flips else ""
        return Cell(count(point.flips), parts)

    equal = "equal error rate"
    columns: list[tuple[Column, Figures]] = [
        (Column("EER", "", equal), lambda r: percent(r.thresholds.eer if r.thresholds else None, 2)),
        (Column("threshold", "", equal), lambda r: threshold(r.thresholds.eer_threshold if r.thresholds else None)),
    ]
    for rate in rates:
        group = f"FMR {one_in(rate)}"
        columns += [
            (Column("accepted", "TPR", group), at(rate, lambda p: percent(p.tpr, 2))),
            (Column("threshold", "", group), at(rate, lambda p: threshold(p.threshold))),
            (Column("verification flips", "accepted / rejected", group), but_reference(report, at(rate, flip))),
        ]
    return table_of(report, results, columns)


def lost_table(report: BenchReport) -> Table | None:
    """The queries with the largest loss, per result. None if no query has one."""
    rows = [
        tuple(map(Cell, (one_line(result.name), one_line(q.path), str(q.pid), str(q.camid), *_both_ap(q))))
        for result in completed(report)
        for q in result.worst_queries
    ]
    heads = ("result", "query", "identity", "camera", "AP of the reference", "AP")
    return Table(tuple(Column(head, words=head == "query") for head in heads), tuple(rows)) if rows else None


def _both_ap(lost: LostQuery) -> tuple[str, str]:
    return percent(lost.ap_reference), percent(lost.ap)
