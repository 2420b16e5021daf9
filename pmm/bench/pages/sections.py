"""The chapters of a bench report: headings, what they mean in one line, terms, tables. Page and Markdown share them."""

from __future__ import annotations

from dataclasses import dataclass

from pmm.bench.pages.accuracy_tables import accuracy_table, camera_table, lost_table, threshold_table
from pmm.bench.pages.format import number, one_in, one_line, percent, threshold
from pmm.bench.pages.queries import batch_sizes, flagged, ran, shown_batches
from pmm.bench.pages.tables import UNSTEADY, Table, results_table
from pmm.bench.pages.timing_tables import costs_table, timing_table, tracker_table
from pmm.bench.schema import BenchReport, Result
from pmm.utils.build_info import describe_build

FLAGS = {
    "drifts": "calls became slower or faster while they were measured: the machine grew warm, or changed its clock",
    "noisy": "calls differ so much from each other that the median is vague: something else may have run beside them",
    "not steady": "calls were still changing when warm-up had used up its time: the figures may include start-up work",
    "too short": "a call takes less time than the clock can tell: measure larger batches",
}
"""What the flags of a latency mean, by the words that they begin with."""


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
    note = (
        f"One row per backend and precision, the fastest first, all on the same {report.dataset.queries:,} queries and "
        f"{report.dataset.gallery:,} gallery crops. Small figures below a difference or a speed-up: the range in which "
        "the true value lies, with 95 % confidence."
    )
    alike = (
        "" if report.gates.max_map_drop is not None else ", and ranks as the reference does, since no gate judges mAP"
    )
    terms = [
        ("may ship", f"it ran and fails no gate (the bounds listed above){alike}"),
        ("mAP", "mean average precision: how far up the right crops stand in each query's list; 100 % is perfect"),
        ("difference", f"mAP minus that of {reference}, in percentage points; below zero is a loss"),
        (
            "first answer lost / gained",
            f"queries whose first crop is right with {reference} and wrong here / the reverse",
        ),
        ("worst cosine", f"of the crop whose embedding turned most against that of {reference}; 1 is no turn at all"),
        ("p50, p95", "half of the calls, and 95 of 100 calls, take no longer than this (p95 below, in small figures)"),
        ("times as fast", f"median time of {reference} over that of this result, at the same batch size"),
        ("images/s", "images per second when calls need not wait for each other, at the best batch size"),
    ]
    hidden = set(batch_sizes(report)) - set(shown_batches(report))
    if hidden:
        terms.append(("batch", f"further sizes ({', '.join(map(str, sorted(hidden)))}) stand under timing"))
    if flagged(report):
        terms.append((UNSTEADY, "this latency is not to be trusted; why stands under figures to be careful with"))
    table = results_table(report)
    parts = (Part(table=table),) if table.rows else ()
    return Section(anchor="results", title="Results", note=note, parts=parts, terms=tuple(terms) if parts else ())


def accuracy(report: BenchReport) -> Section | None:
    """Three tiers, and per camera."""
    if not ran(report):
        return None
    cameras = camera_table(report)
    parts = [Part(table=accuracy_table(report))]
    if cameras:
        title = "mAP per camera of the query: difference in points, mAP below"
        parts.append(Part(title=title, table=cameras, collapsed=True))
    terms = (
        ("worst, 1 %, median cosine", "of all crops' embeddings with the reference's: the worst, the worst of 100, the "
         "typical crop"),
        ("largest change, length change", "of any number in an embedding; of an embedding's length, relative"),
        ("alone or in a batch", "worst cosine of a crop embedded alone or in odd batches, with itself in one of 64"),
        ("first item changed", "queries whose first crop is another one now, right or wrong"),
        ("first ten shared", "share of the reference's first ten crops that are among the first ten here"),
        ("order kept (Kendall's tau)", "over the reference's first 50 crops: 1 is the same order, -1 the reverse"),
        ("mAP, rank-1, mINP", "lists as a whole; first crop is right; how far down the last right crop stands"),
        ("range", "where the true difference lies with 95 % confidence (bootstrap over queries, paired)"),
    )  # fmt: skip
    return Section(
        anchor="accuracy",
        title="Accuracy: same numbers, same order, same people?",
        note="Three questions, each milder than the one before: embeddings may differ a little in their numbers and "
        "still rank everyone alike; an order may differ a little and still find the same people.",
        parts=tuple(parts),
        terms=terms,
    )


def thresholds(report: BenchReport) -> Section | None:
    """Verification; None where no result has it."""
    table = threshold_table(report)
    known = next((r.thresholds for r in ran(report) if r.thresholds), None)
    if table is None or known is None:
        return None
    return Section(
        anchor="thresholds",
        title="Thresholds: are these two crops one person?",
        note="Accept a pair as one person where the Euclidean distance of its embeddings is at most the threshold. "
        f"Counted on {known.genuine:,} pairs of one person and {known.impostor:,} pairs of two people.",
        parts=(Part(table=table),),
        terms=(
            ("both errors equal (EER)", "the threshold at which as large a share of strangers is accepted as of one "
             "person's pairs is refused, and that share; lower is better"),
            ("false matches: 1 in 1,000", "the threshold to deploy if so many pairs of strangers may be accepted"),
            ("found (TPR)", "share of one person's pairs that are accepted then; higher is better"),
            ("flips", f"pairs decided otherwise than by {report.reference} if its threshold is kept: newly accepted / "
             "newly rejected"),
        ),
    )  # fmt: skip


def lost(report: BenchReport) -> Section | None:
    """The queries that lost most; None if none did."""
    table = lost_table(report)
    if table is None:
        return None
    return Section(
        anchor="lost",
        title="Queries that lost most",
        note="AP, average precision: how far up the right crops stand in the list of one query. Pictures, for losses "
        f"of a point or more: on the left what {report.reference} ranks first, on the right what this backend does.",
        parts=(Part(title="These queries as a table", table=table, collapsed=True),),
    )


def timing(report: BenchReport) -> Section | None:
    """Per batch size, and what it takes until the first answer."""
    sizes = batch_sizes(report)
    parts = [
        Part(title=f"Batch {batch}: {'one image' if batch == 1 else f'{batch} images'} per call",
             table=timing_table(report, batch), collapsed=index > 0)
        for index, batch in enumerate(sizes)
    ]  # fmt: skip
    if any(result.tracker for result in ran(report)):
        parts.append(Part(title="A tracker's calls", table=tracker_table(report)))
    if ran(report):
        parts.append(Part(title="Until the first answer", table=costs_table(report)))
    if not parts:
        return None
    gpu = any(r.device == "cuda" for r in ran(report))
    one = next((result.tracker for result in ran(report) if result.tracker), None)
    terms = [
        ("p50, p90, p95, p99", "so many of 100 calls take no longer; - where there are too few samples to say"),
        *([("work, copies", "by the GPU's own clock; copying images in and embeddings out is not in p50")] * gpu),
        ("JPEG to embedding", "read, decode, resize, copy, infer, copy back: what a service waits for; of it decode: "
         "the share before inference"),
        ("in flight", "calls submitted before the first must be done, for images/s"),
        *([("of the GPU's rate", "share of the matrix products per second that this GPU was seen to do")] * gpu),
        *([("a tracker's calls", f"of {one.least} to {one.most} crops at random, from and to host memory; in order: "
            "images/s of the same calls in order of their size: few differ from the one before")] if one else []),
        ("build, load, first call", "export or compile ahead of time (- where an earlier file served); open the file; "
         "the first call with all that starts up then"),
        ("memory", "of the whole worker process, at its highest"),
    ]  # fmt: skip
    return Section(
        anchor="timing",
        title="Timing in detail",
        note="Times in ms by the host's clock unless said otherwise, images already in place; small figures: the range "
        "with 95 % confidence.",
        parts=tuple(parts),
        terms=tuple(terms),
    )


@dataclass(frozen=True, kw_only=True)
class Careful:
    """Latencies that are not to be trusted, what their flags mean, and what else went wrong."""

    lines: tuple[str, ...]
    meanings: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def careful(report: BenchReport) -> Careful:
    """Every flag and note of every result."""
    lines, seen = [], set()
    for result, found in flagged(report):
        lines.append(f"{one_line(result.name)}, batch {found.batch}: {one_line('; '.join(found.flags))}")
        seen |= {words for words in FLAGS for flag in found.flags if flag.startswith(words)}
    notes = tuple(f"{one_line(r.name)}: {one_line(note)}" for r in report.results for note in r.notes)
    return Careful(lines=tuple(lines), meanings=tuple((w, m) for w, m in FLAGS.items() if w in seen), notes=notes)


def measured(report: BenchReport) -> list[str]:
    """How the figures came about, a line each."""
    data, method = report.dataset, report.method
    skipped = sorted({r.skipped_queries for r in report.results if r.skipped_queries})
    left_out = f" ({' or '.join(map(str, skipped))} queries without a right answer left out)" if skipped else ""
    lines = [
        f"Data: {data.name} ({data.root}), {data.queries:,} queries of {data.identities:,} identities by "
        f"{data.cameras} cameras against {data.gallery:,} gallery crops, {data.distractors:,} of them "
        "distractors (people who are no query).",
        f"Every result embeds the same crops itself; mAP, rank-1 and mINP come from its own embeddings{left_out}, and "
        f"are compared query by query with those of {report.reference}.",
        "Ranges of accuracy draw the queries again and again with repetition (bootstrap) and keep the middle 95 %; "
        "those of latency rest on the samples and their order.",
        f"A latency sample is one whole call on images in place, until its result is complete. At most "
        f"{method.samples:,} samples or {number(method.seconds)} s per backend and batch size, in turns of "
        f"{method.block} in random order, so that a machine that slows down slows all of them.",
        "Percentiles are samples (nearest rank). Each backend has a process and "
        f"{method.threads} CPU thread{'s' * (method.threads != 1)} of its own.",
    ]
    if method.matrix_tflops:
        rates = ", ".join(f"{name} {number(rate)}" for name, rate in method.matrix_tflops.items())
        lines.append(f"Matrix products of the GPU, measured, in TFLOP/s: {rates}.")
    if method.gflop_per_image is not None:
        lines.append(f"One image takes {number(method.gflop_per_image)} GFLOP (multiplications and additions).")
    lines.append(f"The whole run took {number(report.seconds)} s, exports included.")
    return lines


def facts(report: BenchReport) -> list[tuple[str, str]]:
    """Provenance: (what, value)."""
    checkpoint, data, machine = report.checkpoint, report.dataset, report.environment
    versions = machine.get("versions") or {}
    driver = [machine.get("driver"), machine.get("driver_cuda") and f"CUDA {machine['driver_cuda']}"]
    kernels = machine.get("kernels")
    found = [
        ("measured", f"{report.created}, in {number(report.seconds)} s"),
        ("checkpoint", f"{checkpoint.path} (SHA-256 {checkpoint.sha256})"),
        ("model", f"{checkpoint.method}, epoch {checkpoint.epoch}, {number(checkpoint.parameters_m)} M parameters, "
         f"{checkpoint.embedding_dim} numbers per embedding, crops of {checkpoint.height}x{checkpoint.width}"),
        ("data", f"{data.name}, digest {data.digest}"),
        ("CPU", f"{machine.get('cpu')}, {machine.get('cores')} cores, {report.method.threads} threads used"),
        ("GPU", ", ".join(dict.fromkeys(r.gpu for r in report.results if r.gpu) or map(str, machine.get("gpus") or ()))
         or "none"),
        ("driver", ", ".join(str(part) for part in driver if part)),
        ("system", f"{machine.get('os')}, Python {machine.get('python')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("kernels of the mix, which runs in training only", describe_build(kernels) if kernels else ""),
        ("pmm", f"{machine.get('pmm') or ''} commit {machine.get('commit') or 'unknown'}"),
    ]  # fmt: skip
    return [(what, one_line(value)) for what, value in found if value]


def to_deploy(result: Result) -> str:
    """The threshold to deploy with `result`, as a sentence; empty without one."""
    usable = [p for p in (result.thresholds.points if result.thresholds else ()) if p.threshold is not None]
    if not usable:
        return ""
    strict = min(usable, key=lambda p: abs(p.fpr - 1e-3))
    return (
        f"The threshold to deploy with {result.name}, if {one_in(strict.fpr)} pairs of strangers may be accepted: a "
        f"distance of {threshold(strict.threshold)}. It accepts {percent(strict.tpr)} of one person's pairs."
    )
