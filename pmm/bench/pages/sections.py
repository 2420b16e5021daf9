"""The sections of a bench report: title, a note, tables and terms. The page and the Markdown share them."""

from __future__ import annotations

from dataclasses import dataclass

from pmm.bench.pages.accuracy_tables import accuracy_table, camera_table, lost_table, threshold_table
from pmm.bench.pages.format import number, one_in, one_line, percent, threshold
from pmm.bench.pages.queries import batch_sizes, completed, flagged, shown_batches
from pmm.bench.pages.tables import UNSTEADY, Table, results_table
from pmm.bench.pages.timing_tables import costs_table, timing_table, tracker_table
from pmm.bench.result_schema import Result
from pmm.bench.schema import BenchReport
from pmm.utils.build_info import describe_build

TIMING, CAVEATS = "Timing in detail", "Notes and unreliable figures"
FLAGS = {
    "drifts": "calls became slower or faster during the measurement: the machine got warm, or changed its clock rate",
    "noisy": "calls differ so much that the median is imprecise: another program may have run at the same time",
    "not steady": "calls were still changing at the end of the warm-up: the figures may include start-up work",
    "too short": "a call takes less time than the clock can resolve: measure larger batches",
}
"""What the flags of a latency mean, by their first words."""
OWN_RUN = (
    "There is no checkpoint to compare with: the reference is the adopted ONNX file itself, as ONNX Runtime runs it in "
    "fp32 on the CPU."
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One table of a section."""

    title: str = ""
    table: Table
    collapsed: bool = False
    """On the page, behind its title."""


@dataclass(frozen=True, kw_only=True)
class Section:
    anchor: str
    title: str
    note: str
    parts: tuple[Part, ...]
    terms: tuple[tuple[str, str], ...] = ()


def results(report: BenchReport) -> Section:
    reference = report.reference
    unreadable = report.dataset.unreadable
    note = (
        f"One row per backend and precision, the fastest first, measured on the same {report.dataset.queries:,} "
        f"queries and {report.dataset.gallery:,} gallery crops"
        f"{f', without {unreadable:,} that cannot be read' * bool(unreadable)}. Ranges such as -0.18 to "
        "+0.02 are 95 % confidence intervals."
    )
    alike = "" if report.gates.max_map_drop is not None else ", and ranks like the reference, as no gate is on mAP"
    terms = [
        ("may ship", f"it ran and fails no gate (the bounds listed above){alike}"),
        ("mAP", "mean average precision: how high the right crops are in each query's list; 100 % is perfect"),
        ("difference", f"mAP minus that of {reference}, in percentage points; below zero is a loss"),
        ("rank-1 lost / gained", f"queries whose first crop is right with {reference} and wrong here / the reverse"),
        ("worst cosine", f"the lowest cosine of an embedding with that of {reference} of the same crop; 1 is the same"),
        ("p50, p95", "half of the calls, and 95 of 100 calls, take no longer than this"),
        ("speedup", f"the median time of {reference} divided by that of this result, at the same batch size"),
        ("images/s", "the highest throughput of all batch sizes, with calls that need not wait for each other"),
    ]
    hidden = set(batch_sizes(report)) - set(shown_batches(report))
    if hidden:
        terms.append(("batch", f"more sizes ({', '.join(map(str, sorted(hidden)))}) are under {TIMING}"))
    if flagged(report):
        terms.append((UNSTEADY, f"this latency is unreliable; the reason is under {CAVEATS}"))
    table = results_table(report)
    parts = (Part(table=table),) if table.rows else ()
    return Section(anchor="results", title="Results", note=note, parts=parts, terms=tuple(terms) if parts else ())


def accuracy(report: BenchReport) -> Section | None:
    """Three tiers, and per camera."""
    if not completed(report):
        return None
    cameras = camera_table(report)
    parts = [Part(table=accuracy_table(report))]
    if cameras:
        title = "Per camera of the query: the difference of mAP in points, and mAP"
        parts.append(Part(title=title, table=cameras, collapsed=True))
    terms = (
        ("worst, 1 %, median cosine", "of an embedding with the reference's of the same crop: the lowest, the 1st "
         "percentile and the median over all crops"),
        ("largest difference", "of any number in an embedding from the reference's"),
        ("norm error", "largest relative difference of an embedding's norm from the reference's"),
        ("worst cosine across batch sizes", "of a crop's embedding in a small batch with that in a batch of 64"),
        ("first crop changed", "queries whose first crop is not the reference's, right or wrong"),
        ("top-10 overlap", "share of the reference's first ten crops that are among the first ten here"),
        ("Kendall's tau", "rank correlation over the reference's first 50 crops: 1 is the same order, -1 the reverse"),
        ("mAP, rank-1, mINP", "quality of the whole list; share of queries whose first crop is right; how high the "
         "last right crop is"),
        ("difference, interval", "from the reference, in points, and its 95 % interval (bootstrap over queries)"),
    )  # fmt: skip
    return Section(
        anchor="accuracy",
        title="Accuracy: same embeddings, same ranking, same identities?",
        note="Three questions, each less strict than the one before: embeddings that differ slightly can still give "
        "the same ranking, and rankings that differ slightly can still find the same identities.",
        parts=tuple(parts),
        terms=terms,
    )


def thresholds(report: BenchReport) -> Section | None:
    """Verification; None where no result has it."""
    table = threshold_table(report)
    known = next((r.thresholds for r in completed(report) if r.thresholds), None)
    if table is None or known is None:
        return None
    return Section(
        anchor="thresholds",
        title="Verification: do two crops show the same identity?",
        note="A pair of crops is accepted as the same identity if the Euclidean distance of its embeddings is at most "
        f"the threshold. Counted on {known.genuine:,} pairs of the same identity and {known.impostor:,} pairs of "
        "different identities.",
        parts=(Part(table=table),),
        terms=(
            ("equal error rate (EER)", "the share of wrong decisions at the threshold where false matches and false "
             "non-matches are equally frequent; lower is better"),
            ("FMR 1 in 1,000", "false match rate: the threshold accepts this share of pairs of different identities"),
            ("accepted (TPR)", "true-positive rate: the share of the pairs of the same identity that the threshold "
             "accepts; higher is better"),
            ("verification flips", f"pairs that this backend decides differently from {report.reference} at the "
             f"threshold of {report.reference}: newly accepted / newly rejected"),
        ),
    )  # fmt: skip


def lost(report: BenchReport) -> Section | None:
    """The queries with the largest loss; None if no query has one."""
    table = lost_table(report)
    if table is None:
        return None
    return Section(
        anchor="lost",
        title="Queries with the largest loss",
        note="AP (average precision) says how high the right crops are in the list of one query. Queries that lose a "
        f"point or more have a picture: the first crops of {report.reference} on the left, the backend's on the right.",
        parts=(Part(title="Table of these queries", table=table, collapsed=True),),
    )


def timing(report: BenchReport) -> Section | None:
    """Per batch size, the load of a tracker, and start-up."""
    sizes = batch_sizes(report)
    parts = [
        Part(title=f"Batch {batch}: {'one image' if batch == 1 else f'{batch} images'} per call",
             table=timing_table(report, batch), collapsed=index > 0)
        for index, batch in enumerate(sizes)
    ]  # fmt: skip
    if any(result.tracker for result in completed(report)):
        parts.append(Part(title="Load of a tracker", table=tracker_table(report)))
    if completed(report):
        parts.append(Part(title="Start-up and memory", table=costs_table(report)))
    if not parts:
        return None
    gpu = any(r.device == "cuda" for r in completed(report))
    one = next((result.tracker for result in completed(report) if result.tracker), None)
    terms = [
        ("p50, p90, p95, p99", "50, 90, 95 or 99 of 100 calls take no longer; - with too few samples"),
        *([("compute, copies", "by the GPU's clock; p50 does not include the copies of images and embeddings")] * gpu),
        ("JPEG to embedding", "read, decode, resize, copy, infer, copy back: the latency of a service; decode share: "
         "the part before inference"),
        ("in flight", "calls that are submitted before the first has to be complete, for the throughput"),
        *([("share of matrix rate", "throughput as a share of this GPU's measured rate of matrix products")] * gpu),
        *([("load of a tracker", f"calls of {one.least} to {one.most} crops at random, from and to host memory; in "
            "order of size: the same calls sorted by size, so that it seldom changes")] if one else []),
        ("build, load, first call", "export or compilation ahead of time (- if an earlier file was used again); "
         "opening the file; the first call, with its initialisation"),
        ("peak memory", "of the whole worker process, on the host"),
    ]  # fmt: skip
    return Section(
        anchor="timing",
        title=TIMING,
        note="Times are in ms by the host's clock, unless a column names another, with the images in place. Ranges are "
        "95 % confidence intervals.",
        parts=tuple(parts),
        terms=tuple(terms),
    )


@dataclass(frozen=True, kw_only=True)
class Caveats:
    """Unreliable latencies, what their flags mean, the notes of results, and what could not be timed."""

    lines: tuple[str, ...]
    meanings: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def caveats(report: BenchReport) -> Caveats:
    """Every flag and note of every result."""
    lines, seen = [], set()
    for result, timed in flagged(report):
        lines.append(f"{one_line(result.name)}, batch {timed.batch}: {one_line('; '.join(timed.flags))}")
        seen |= {words for words in FLAGS for flag in timed.flags if flag.startswith(words)}
    notes = tuple(f"{one_line(r.name)}: {one_line(note)}" for r in report.results for note in (*r.notes, *r.untimed))
    return Caveats(lines=tuple(lines), meanings=tuple((w, m) for w, m in FLAGS.items() if w in seen), notes=notes)


def method(report: BenchReport) -> list[str]:
    """How the figures were measured, a line each."""
    data, plan = report.dataset, report.timing
    skipped = sorted({r.skipped_queries for r in report.results if r.skipped_queries})
    left_out = f" (without {' or '.join(map(str, skipped))} queries that have no right gallery crop)" if skipped else ""
    lines = [
        f"Data: {data.name} ({data.root}), {data.queries:,} queries of {data.identities:,} identities by "
        f"{data.cameras} cameras against {data.gallery:,} gallery crops, {data.distractors:,} of them "
        "distractors (of identities that no query has).",
        f"Every backend embeds the same crops; mAP, rank-1 and mINP are computed from its embeddings{left_out} and "
        f"compared with those of {report.reference} query by query.",
        *([OWN_RUN] * (report.checkpoint.kind == "onnx")),
        "Intervals of accuracy are a paired bootstrap over queries; those of latency depend on the samples and their "
        "order. All are at 95 %.",
        f"A latency sample is one whole call on images in place, until its result is complete: up to {plan.samples:,} "
        f"samples or {number(plan.seconds)} s per backend and batch size, in blocks of {plan.block} samples. Backends "
        "take turns in random order, so that a machine that slows down slows all of them.",
        f"Percentiles are samples (nearest rank). Each backend runs in its own process with {plan.threads} CPU "
        f"thread{'s' * (plan.threads != 1)}.",
    ]
    if plan.matrix_tflops:
        rates = ", ".join(f"{name} {number(rate)}" for name, rate in plan.matrix_tflops.items())
        lines.append(f"Measured rate of matrix products of the GPU, TFLOP/s: {rates}.")
    if plan.gflop_per_image is not None:
        lines.append(f"One image takes {number(plan.gflop_per_image)} GFLOP (multiplications and additions).")
    lines.append(f"The whole run took {number(report.seconds)} s, including exports.")
    return lines


def epoch(report: BenchReport) -> str:
    """When the model was taken from its training, in words."""
    epochs = report.checkpoint.epoch
    return "epoch unknown" if epochs is None else f"epoch {epochs}"


def facts(report: BenchReport) -> list[tuple[str, str]]:
    """Provenance: (what, value)."""
    checkpoint, data, machine = report.checkpoint, report.dataset, report.environment
    versions = machine.get("versions") or {}
    driver = [machine.get("driver"), machine.get("driver_cuda") and f"CUDA {machine['driver_cuda']}"]
    kernels = machine.get("kernels") if checkpoint.method != "adopted" else None
    rows = [
        ("measured", f"{report.created}, in {number(report.seconds)} s"),
        ("adopted ONNX file" if checkpoint.kind == "onnx" else "checkpoint",
         f"{checkpoint.path} (SHA-256 {checkpoint.sha256})"),
        ("model", f"{checkpoint.method}, {epoch(report)}, {number(checkpoint.parameters_m)} M parameters, "
         f"embeddings of {checkpoint.embedding_dim} dimensions, crops of {checkpoint.height}x{checkpoint.width}"),
        ("adopted from", "; ".join(f"{what}: {value}" for what, value in checkpoint.source.items())),
        ("crops", checkpoint.preprocessing),
        ("data", f"{data.name}, digest {data.digest}"),
        ("CPU", f"{machine.get('cpu')}, {machine.get('cores')} cores, {report.timing.threads} threads used"),
        ("GPU", ", ".join(dict.fromkeys(r.gpu for r in report.results if r.gpu) or map(str, machine.get("gpus") or ()))
         or "none"),
        ("driver", ", ".join(str(part) for part in driver if part)),
        ("system", f"{machine.get('os')}, Python {machine.get('python')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("kernels of the mix (training only)", describe_build(kernels) if kernels else ""),
        ("pmm", f"{machine.get('pmm') or ''} commit {machine.get('commit') or 'unknown'}"),
    ]  # fmt: skip
    return [(what, one_line(value)) for what, value in rows if value]


def to_deploy(result: Result) -> str:
    """The threshold to deploy with `result`, as a sentence; empty without one."""
    usable = [p for p in (result.thresholds.points if result.thresholds else ()) if p.threshold is not None]
    if not usable:
        return ""
    strict = min(usable, key=lambda p: abs(p.fmr - 1e-3))
    return (
        f"Threshold to deploy with {result.name}: a distance of {threshold(strict.threshold)} accepts "
        f"{one_in(strict.fmr)} pairs of different identities and {percent(strict.tpr)} of the pairs of the same "
        "identity."
    )
