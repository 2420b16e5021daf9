"""The part of report.json about one backend: accuracy, latency, memory; units as in `pmm.bench.schema`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pmm.artifacts.measured_thresholds import MeasuredPoint, as_metric

EMBED_BATCH = 64
"""Crops per call where accuracy is measured."""

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    interval: Interval | None
    """None: too few samples for one."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One backend at one batch size."""

    batch: int
    """Images per call."""
    samples_ms: tuple[float, ...]
    """By the host's clock, in the order taken: a whole call on images in place, until its result is complete."""
    block: int
    """Samples in a row, before another backend's turn."""
    turns_s: tuple[float, ...]
    """When each turn began, seconds after the first of all."""
    warmup_s: float
    steady: bool
    """Warm-up ended because the samples no longer changed, not because its time was up."""
    p50_ms: float
    p50_interval_ms: Interval | None
    p90_ms: float | None
    """Percentiles are samples (nearest rank), None where there are too few for an interval: 36, 72 and 368."""
    p90_interval_ms: Interval | None
    p95_ms: float | None
    p95_interval_ms: Interval | None
    p99_ms: float | None
    p99_interval_ms: Interval | None
    speedup: Estimate | None
    """Speedup over the reference at this batch: the ratio of the medians, paired over rounds."""
    images_per_s: float
    """Throughput, measured: calls submitted without waiting for the one before, where the backend can."""
    in_flight: int
    """Calls submitted before the first must be complete, for the throughput."""
    device_ms: float | None
    """Median by the GPU's own clock, of work on the GPU alone."""
    upload_ms: float | None
    """Median of copying the images to the GPU; not in `samples_ms`."""
    download_ms: float | None
    """Median of copying the embeddings back; not in `samples_ms`."""
    end_to_end_ms: float | None
    """Median from JPEG files to embeddings in host memory: read, decode, resize, copy, infer, copy."""
    decode_ms: float | None
    """Median of the part of it before inference: read, decode, resize."""
    flags: tuple[str, ...]
    """Why these figures are not to be trusted: drift, noise, no steady state."""
    profile: int | None = None
    """Of an engine: the batch that the optimisation profile of these calls is made for; None elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """The load of a tracker: calls of a number of crops that changes from one to the next, from and to host memory."""

    least: int
    most: int
    """The crops of a call are drawn evenly from `least` to `most`."""
    calls: int
    mean_ms: float
    p99_ms: float | None
    """Nearest rank; None for fewer than 100 calls."""
    images_per_s: float
    in_order_images_per_s: float
    """Of the same calls in order of their size; `images_per_s` is lower by the cost of changing sizes."""


@dataclass(frozen=True, kw_only=True)
class CameraResult:
    """mAP over the queries of one camera."""

    camid: int
    queries: int
    """Those with a relevant gallery item."""
    mAP: float  # noqa: N815
    map_delta: float


@dataclass(frozen=True, kw_only=True)
class LostQuery:
    """A query that this backend ranks worse than the reference does."""

    path: str
    pid: int
    camid: int
    ap_reference: float
    ap: float
    first_reference: tuple[str, ...]
    """Paths of the gallery crops that the reference ranks first."""
    first: tuple[str, ...]
    """The same of this backend."""
    right_reference: tuple[bool, ...]
    """Which of `first_reference` show the query's identity."""
    right: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Accept a pair of crops as one identity where their distance is at most the threshold."""

    fmr: float
    """False match rate: the target share of pairs of different identities that are accepted."""
    threshold: float | None
    """Of the Euclidean distance; None: too few pairs of different identities to set it."""
    tpr: float | None
    """True-positive rate: the share of pairs of the same identity that are accepted."""
    flips: int | None
    """Verification flips: pairs that the reference decides differently, both at the reference's threshold."""
    newly_accepted: int | None
    newly_rejected: int | None


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Verification: do two crops show the same identity? Of every query with every gallery crop that counts for it."""

    genuine: int
    """Pairs of the same identity."""
    impostor: int
    """Pairs of different identities."""
    eer: float
    """Equal error rate: the false match rate at the threshold where it equals the false non-match rate."""
    eer_threshold: float
    points: tuple[OperatingPoint, ...]

    def measured(self, metric: Literal["euclidean", "cosine"]) -> tuple[MeasuredPoint, ...]:
        """The points that can be used, with distances by `metric`. Left out are rates without a threshold, and those
        that no distance keeps, as too many pairs are at 0."""
        return tuple(
            MeasuredPoint(fmr=point.fmr, distance=as_metric(point.threshold, metric), tpr=point.tpr)
            for point in self.points
            if point.threshold is not None and point.threshold >= 0 and point.tpr is not None
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """One backend in one precision. Every figure of accuracy is None where the backend could not run."""

    name: str
    """Unique in the report: backend, precision and, where needed, "graph" or the file."""
    backend: str
    device: str
    """cpu or cuda."""
    gpu: str = ""
    """Name of the GPU that it ran on."""
    precision: str
    cuda_graph: bool | None
    """Calls are replayed CUDA graphs; None without a GPU."""
    status: Literal["ok", "failed", "unavailable"]
    """unavailable: this machine cannot run it. failed: it ended with an error."""
    reason: str
    """Why it failed or is unavailable, one line."""
    notes: tuple[str, ...] = ()
    """What to know about the figures: that embeddings are compared L2-normalised, for example."""
    untimed: tuple[str, ...] = ()
    """What could not be timed, and why, a line each: a batch size, the load of a tracker. Fails the run."""
    provider: str = ""
    """Library, version and device of the calls."""
    artifact: str | None = None
    """Path of the file."""
    artifact_sha256: str | None = None
    artifact_bytes: int | None = None
    build_s: float | None = None
    """Export, quantisation, engine build or compilation ahead of time; None where an earlier run's file was used."""
    load_s: float | None = None
    """Opening the file."""
    first_inference_s: float | None = None
    """The first call, batch 1; what compiles or tunes itself already on opening is in `load_s`."""
    peak_memory: int | None = None
    """Peak host memory of the worker process."""
    gpu_memory: int | None = None
    """GPU memory of the worker process at the end."""

    mAP: float | None = None  # noqa: N815
    rank1: float | None = None
    mINP: float | None = None  # noqa: N815
    skipped_queries: int | None = None
    """Queries without a relevant gallery item."""
    map_delta: float | None = None
    """Minus the reference's; below 0 is a loss."""
    map_delta_interval: Interval | None = None
    """Paired bootstrap over queries."""
    rank1_delta: float | None = None
    rank1_delta_interval: Interval | None = None
    minp_delta: float | None = None
    minp_delta_interval: Interval | None = None

    min_cosine: float | None = None
    """Of each crop's embedding with the reference's: the worst crop, the 1st percentile, the median."""
    p1_cosine: float | None = None
    median_cosine: float | None = None
    worst_crop: str | None = None
    """The crop with `min_cosine`."""
    max_abs: float | None = None
    """Largest absolute difference of an element."""
    max_norm_error: float | None = None
    """Largest relative difference of an embedding's norm from the reference's, or from that in another batch."""
    batch_min_cosine: float | None = None
    """Of crops embedded alone and in batches of 1, odd and ragged sizes, with the same crops in batches of 64."""

    rank1_lost: int | None = None
    """Queries whose first gallery crop is right with the reference, and wrong here."""
    rank1_gained: int | None = None
    top1_changed: int | None = None
    """Queries whose first gallery crop is another one than the reference's, right or wrong."""
    top10_overlap: float | None = None
    """Mean share of the reference's first ten crops among this backend's first ten."""
    kendall_tau: float | None = None
    """Mean rank correlation over the reference's first 50 crops: 1 is the same order, -1 the reverse."""

    per_query_ap: tuple[float | None, ...] = ()
    """Average precision of each query, in the data set's order; None for a skipped one."""
    cameras: tuple[CameraResult, ...] = ()
    worst_queries: tuple[LostQuery, ...] = ()
    """Those that lost most AP, the worst first."""
    thresholds: Thresholds | None = None
    batches: tuple[Timing, ...] = ()
    tracker: Tracker | None = None
