"""Tables of a bench report about time: calls at a batch size, the load of a tracker, start-up and memory."""

from __future__ import annotations

from collections.abc import Callable

from pmm.bench.pages.format import NONE, between, count, number, one_line, percent, seconds, size
from pmm.bench.pages.queries import completed, timing_at
from pmm.bench.pages.tables import Cell, Column, Figures, Table, lines, marked, table_of, timed
from pmm.bench.result_schema import Interval, Result, Timing, Tracker
from pmm.bench.schema import BenchReport


def timing_table(report: BenchReport, batch: int) -> Table:
    """All timings at one batch size."""

    def percentile(value: float | None, interval: Interval | None) -> Cell:
        return Cell(number(value), between(interval, number))

    def used(result: Result) -> str:
        """Throughput as a share of the GPU's rate of matrix products."""
        timing, peak = timing_at(result, batch), report.timing.matrix_tflops.get(result.precision)
        if timing is None or not peak or report.timing.gflop_per_image is None or result.device != "cuda":
            return NONE
        return percent(timing.images_per_s * report.timing.gflop_per_image / 1000 / peak, 0)

    call, gpu, whole, many = "one call, ms", "on the GPU, ms", "from files, ms", "throughput"
    columns: list[tuple[Column, Figures]] = [
        (
            Column("p50", "interval", call),
            timed(batch, lambda t: Cell(marked(t), between(t.p50_interval_ms, number))),
        ),
        (Column("p90", "interval", call), timed(batch, lambda t: percentile(t.p90_ms, t.p90_interval_ms))),
        (Column("p95", "interval", call), timed(batch, lambda t: percentile(t.p95_ms, t.p95_interval_ms))),
        (Column("p99", "interval", call), timed(batch, lambda t: percentile(t.p99_ms, t.p99_interval_ms))),
        (Column("compute", "", gpu), timed(batch, lambda t: number(t.device_ms))),
        (
            Column("copies", "in, out", gpu),
            timed(batch, lambda t: Cell(number(t.upload_ms), lines(number(t.download_ms)))),
        ),
        (Column("JPEG to embedding", "", whole), timed(batch, lambda t: number(t.end_to_end_ms))),
        (Column("decode share", "", whole), timed(batch, _decode_share)),
        (
            Column("images/s", "in flight", many),
            timed(batch, lambda t: Cell(number(t.images_per_s), count(t.in_flight))),
        ),
        (Column("share of matrix rate", "", many), used),
        (Column("samples", "warm-up"), timed(batch, _effort)),
        (Column("engine profile", "for batch"), timed(batch, lambda t: count(t.profile))),
    ]
    return table_of(report, [r for r in completed(report) if timing_at(r, batch)], columns)


def tracker_table(report: BenchReport) -> Table:
    """Calls of a number of crops that changes from call to call."""

    def figure(of: Callable[[Tracker], str]) -> Figures:
        return lambda result: NONE if result.tracker is None else of(result.tracker)

    columns: list[tuple[Column, Figures]] = [
        (Column("mean ms"), figure(lambda t: number(t.mean_ms))),
        (Column("p99 ms"), figure(lambda t: number(t.p99_ms))),
        (Column("images/s"), figure(lambda t: number(t.images_per_s))),
        (Column("images/s in order of size"), figure(lambda t: number(t.in_order_images_per_s))),
        (Column("calls"), figure(lambda t: count(t.calls))),
    ]
    return table_of(report, [result for result in completed(report) if result.tracker], columns)


def costs_table(report: BenchReport) -> Table:
    """Times until the first result, file sizes and memory."""
    columns: list[tuple[Column, Figures]] = [
        (Column("build"), lambda r: seconds(r.build_s)),
        (Column("load"), lambda r: seconds(r.load_s)),
        (Column("first call"), lambda r: seconds(r.first_inference_s)),
        (Column("file"), lambda r: size(r.artifact_bytes)),
        (Column("peak memory"), lambda r: size(r.peak_memory)),
        (Column("GPU memory"), lambda r: size(r.gpu_memory)),
        (Column("library", "file, SHA-256", words=True), _library),
    ]
    return table_of(report, completed(report), columns)


def _decode_share(timing: Timing) -> str:
    if timing.decode_ms is None or not timing.end_to_end_ms:
        return NONE
    return percent(timing.decode_ms / timing.end_to_end_ms, 0)


def _effort(timing: Timing) -> Cell:
    return Cell(count(len(timing.samples_ms)), seconds(timing.warmup_s) + ("" if timing.steady else ", not steady"))


def _library(result: Result) -> Cell:
    digest = f" ({result.artifact_sha256[:12]})" if result.artifact_sha256 else ""
    return Cell(one_line(result.provider or NONE), one_line(f"{result.artifact or ''}{digest}"))
