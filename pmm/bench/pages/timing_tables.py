"""Tables of a bench report about time: calls at a batch size, and what it takes until the first answer."""

from __future__ import annotations

from collections.abc import Callable

from pmm.bench.pages.format import NONE, between, count, number, one_line, percent, seconds, size
from pmm.bench.pages.queries import ran, timing_at
from pmm.bench.pages.tables import Cell, Column, Figures, Table, lines, marked, table_of, timed
from pmm.bench.schema import BenchReport, Interval, Result, Timing, Tracker


def timing_table(report: BenchReport, batch: int) -> Table:
    """All that was timed at one batch size."""

    def percentile(value: float | None, interval: Interval | None) -> Cell:
        return Cell(number(value), between(interval, number))

    def used(result: Result) -> str:
        """Share of the GPU's rate of matrix products."""
        timing, peak = timing_at(result, batch), report.method.matrix_tflops.get(result.precision)
        if timing is None or not peak or report.method.gflop_per_image is None or result.device != "cuda":
            return NONE
        return percent(timing.images_per_s * report.method.gflop_per_image / 1000 / peak, 0)

    call, gpu, whole, many = "one call, ms", "on the GPU, ms", "from files, ms", "many calls"
    columns: list[tuple[Column, Figures]] = [
        (
            Column("p50", "range", call),
            timed(batch, lambda t: Cell(marked(t), between(t.p50_interval_ms, number))),
        ),
        (Column("p90", "range", call), timed(batch, lambda t: percentile(t.p90_ms, t.p90_interval_ms))),
        (Column("p95", "range", call), timed(batch, lambda t: percentile(t.p95_ms, t.p95_interval_ms))),
        (Column("p99", "range", call), timed(batch, lambda t: percentile(t.p99_ms, t.p99_interval_ms))),
        (Column("work", "", gpu), timed(batch, lambda t: number(t.device_ms))),
        (
            Column("copies", "in, out", gpu),
            timed(batch, lambda t: Cell(number(t.upload_ms), lines(number(t.download_ms)))),
        ),
        (Column("JPEG to embedding", "", whole), timed(batch, lambda t: number(t.end_to_end_ms))),
        (Column("of it decode", "", whole), timed(batch, _decode_share)),
        (
            Column("images/s", "in flight", many),
            timed(batch, lambda t: Cell(number(t.images_per_s), count(t.in_flight))),
        ),
        (Column("of the GPU's rate", "", many), used),
        (Column("samples", "warm-up"), timed(batch, _effort)),
        (Column("profile", "made for"), timed(batch, lambda t: count(t.profile))),
    ]
    return table_of(report, [r for r in ran(report) if timing_at(r, batch)], columns)


def tracker_table(report: BenchReport) -> Table:
    """Calls of a number of crops that changes from one to the next."""

    def figure(of: Callable[[Tracker], str]) -> Figures:
        return lambda result: NONE if result.tracker is None else of(result.tracker)

    columns: list[tuple[Column, Figures]] = [
        (Column("mean ms"), figure(lambda t: number(t.mean_ms))),
        (Column("p99 ms"), figure(lambda t: number(t.p99_ms))),
        (Column("images/s"), figure(lambda t: number(t.images_per_s))),
        (Column("in order"), figure(lambda t: number(t.in_order_images_per_s))),
        (Column("calls"), figure(lambda t: count(t.calls))),
    ]
    return table_of(report, [result for result in ran(report) if result.tracker], columns)


def costs_table(report: BenchReport) -> Table:
    """What it takes until the first answer, and what it occupies."""
    columns: list[tuple[Column, Figures]] = [
        (Column("build"), lambda r: seconds(r.build_s)),
        (Column("load"), lambda r: seconds(r.load_s)),
        (Column("first call"), lambda r: seconds(r.first_inference_s)),
        (Column("file"), lambda r: size(r.artifact_bytes)),
        (Column("memory", "most"), lambda r: size(r.peak_memory)),
        (Column("GPU memory"), lambda r: size(r.gpu_memory)),
        (Column("what ran", "file, SHA-256", words=True), _what_ran),
    ]
    return table_of(report, ran(report), columns)


def _decode_share(timing: Timing) -> str:
    if timing.decode_ms is None or not timing.end_to_end_ms:
        return NONE
    return percent(timing.decode_ms / timing.end_to_end_ms, 0)


def _effort(timing: Timing) -> Cell:
    return Cell(count(len(timing.samples_ms)), seconds(timing.warmup_s) + ("" if timing.steady else ", not steady"))


def _what_ran(result: Result) -> Cell:
    digest = f" ({result.artifact_sha256[:12]})" if result.artifact_sha256 else ""
    return Cell(one_line(result.provider or NONE), one_line(f"{result.artifact or ''}{digest}"))
