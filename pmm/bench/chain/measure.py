"""The chain from the checkpoint to the index, measured link by link on one set of queries."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pmm.bench.chain.examine import examine
from pmm.bench.chain.index_builder import INDEXES, IndexBuilder, IndexSpec
from pmm.bench.chain.index_inputs import IndexInputs
from pmm.bench.chain.indexes import SearchIndex
from pmm.bench.chain.outcomes import FIRST, Listing, Outcome, OutcomeEvaluator, loss
from pmm.bench.chain.stored import stored_as, stored_bytes
from pmm.bench.chain_schema import INDEX_NAMES, REQUIRED, ChainLink, ChainReport, LinkKind
from pmm.bench.latency import LatencyPlan, measure
from pmm.bench.statistics import percentile
from pmm.evaluation.distance_blocks import MEMORY_LIMIT, Blocks
from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.evaluation.nearest import nearest
from pmm.evaluation.parity.labels import Labels, QueryGallery
from pmm.utils.arrays import Singles
from pmm.utils.errors import BackendUnavailable, UserError, reason_of
from pmm.utils.extras import check_installed, import_library

DEPTH = 1000
"""Rows of a list in which average precision is measured; the whole gallery if that is not much larger."""
WHOLE = 4 * DEPTH
"""Rows of a gallery that is listed whole."""
BATCH = 64
"""Queries at once, where an index is timed with many."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ChainTask:
    """What is measured."""

    reference: str
    artifact: str
    """Names of the results."""
    of_reference: QueryGallery
    of_artifact: QueryGallery
    """float32 embeddings; the same object where the reference is the artifact."""
    labels: Labels
    normalised: bool
    """Whether the artifact's embeddings are at norm 1, and so compared by cosine."""
    threshold: float
    """Deployed, of the Euclidean distance."""
    target_fmr: float
    distractors: int = 0
    """How many of the last gallery rows are made up."""
    impostor_quantiles: tuple[tuple[float, float, float], ...] = ()


def measure_chain(
    task: ChainTask,
    folder: Path,
    *,
    indexes: Sequence[str] = INDEX_NAMES,
    required: Sequence[str] = REQUIRED,
    plan: LatencyPlan,
    threads: int = 0,
    on_progress: Callable[[str], None] = lambda text: None,
) -> ChainReport:
    """All links; an index that cannot be built is one with its reason.

    Args:
        folder: new, for galleries and their files.
        indexes: names of `INDEXES`.
        required: names of links; a gate that one of them fails fails the run.
        plan: of the timings.
        threads: of faiss (0: its own choice).
    """
    return _Chain(task, folder, required, plan, threads, on_progress).report(indexes)


class _Chain:
    """Links so far, and the outcomes that the next ones are held against."""

    def __init__(
        self,
        task: ChainTask,
        folder: Path,
        required: Sequence[str],
        plan: LatencyPlan,
        threads: int,
        on_progress: Callable[[str], None],
    ) -> None:
        self._task, self._folder, self._required = task, folder, required
        self._plan, self._threads, self._on_progress = plan, threads, on_progress
        self._metric: Literal["euclidean", "cosine"] = "cosine" if task.normalised else "euclidean"
        self._evaluator = OutcomeEvaluator(task.labels, task.threshold, self._metric)
        rows = len(task.labels.gallery_pids)
        self._depth = rows if rows <= WHOLE else DEPTH
        self._links: dict[str, ChainLink] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._begin = time.perf_counter()

    def report(self, indexes: Sequence[str]) -> ChainReport:
        task, evaluator = self._task, self._evaluator
        self._add(task.reference, "checkpoint", None, lambda: evaluator.exact(task.of_reference))
        last = task.reference
        if task.of_artifact is not task.of_reference:
            self._add(task.artifact, "artifact", last, lambda: evaluator.exact(task.of_artifact))
            last = task.artifact
        vectors = np.asarray(task.of_artifact.gallery, np.float32)
        specs = [INDEXES[name] for name in indexes]
        for precision in ("fp32", "fp16", "int8"):
            self._store(precision, vectors, last, specs)
        self._measure_indexes(specs, vectors)
        return ChainReport(
            artifact=task.artifact,
            gallery=len(vectors),
            distractors=task.distractors,
            impostor_quantiles=task.impostor_quantiles,
            depth=self._depth,
            genuine=evaluator.genuine,
            impostor=evaluator.impostor,
            target_fmr=task.target_fmr,
            threshold=task.threshold,
            links=tuple(self._links.values()),
            seconds=time.perf_counter() - self._begin,
        )

    def _add(
        self, name: str, kind: LinkKind, parent: str | None, measured: Callable[[], Outcome], **facts: Any
    ) -> None:
        """A link with the figures of its outcome; of one that fails, with the reason."""
        self._on_progress(name)
        link = ChainLink(name=name, kind=kind, parent=parent, required=name in self._required, **facts)
        try:
            outcome = measured()
        except UserError as error:
            if kind in ("checkpoint", "artifact"):
                raise
            self._links[name] = dataclasses.replace(link, status="failed", reason=str(error))
            return
        before, first = self._outcomes.get(parent or ""), next(iter(self._outcomes.values()), None)
        evaluated, (fmr, tpr) = outcome.evaluated, self._evaluator.rates(outcome)
        self._outcomes[name] = outcome
        self._links[name] = dataclasses.replace(
            link,
            mAP=float(outcome.ap[evaluated].mean()),
            rank1=float(outcome.right[evaluated].mean()),
            mINP=float(outcome.inp[evaluated].mean()),
            fmr=fmr,
            tpr=tpr,
            loss=None if before is None else loss(before, outcome),
            total=None if first is None else loss(first, outcome),
        )

    def _store(self, precision: str, vectors: Singles, parent: str, specs: Sequence[IndexSpec]) -> None:
        """A stored precision; and the first rows of its exact ranking, if an index lists no more."""
        name, query = f"stored {precision}", self._task.of_artifact.query
        kept: list[Singles] = []

        def measured() -> Outcome:
            kept.append(stored_as(vectors, precision))
            if precision == "fp32":
                return self._outcomes[parent]
            return self._evaluator.exact(QueryGallery(query, kept[0]))

        size = stored_bytes(len(vectors), vectors.shape[1], precision)
        self._add(name, "stored", parent, measured, disk_bytes=size, exact=precision == "fp32")
        if name in self._outcomes and self._depth < len(vectors) and name in {spec.parent for spec in specs}:
            deep = partial(self._exact_list, kept[0], name)
            self._add(f"first {self._depth:,} of {name}", "list", name, deep)

    def _exact_list(self, vectors: Singles, name: str) -> Outcome:
        k = self._list_length(self._depth)
        sides = self._task.of_artifact.query, vectors
        between = EmbeddingDistances(*(EmbeddingMatrix(each, metric=self._metric) for each in sides))
        rows, halves, _ = nearest(between, k, Blocks.within(MEMORY_LIMIT, between.shape, between.dim, 1))
        listing = Listing(rows, np.sqrt(2 * halves * between.factor))
        return self._evaluator.listed(listing, listing, self._depth)

    def _list_length(self, count: int) -> int:
        """How many rows to ask for, so that `count` are left without junk."""
        return min(self._evaluator.shape[1], count + int(self._evaluator.junk.max()))

    def _measure_indexes(self, specs: Sequence[IndexSpec], vectors: Singles) -> None:
        builder = IndexBuilder(
            vectors, self._task.labels.gallery_camids, self._folder, self._metric, made_up=self._task.distractors
        )
        built: dict[str, SearchIndex] = {}
        for spec in specs:
            cut = f"first {self._depth:,} of {spec.parent}"
            parent = cut if cut in self._links else spec.parent
            try:
                if spec.library:
                    check_installed(spec.library)
                    self._set_threads()
                if parent not in self._outcomes:
                    raise UserError(f"{parent} could not be measured")
                self._on_progress(f"{spec.name}: building")
                index, seconds = builder.build(spec)
                self._add_index(spec, parent, index, builder, seconds)
                built[spec.name] = index
            except Exception as error:  # of whatever kind: faiss has its own, and the other indexes go on
                missing = isinstance(error, BackendUnavailable)
                reason = str(error) if isinstance(error, UserError) else reason_of(error)
                self._links[spec.name] = ChainLink(
                    name=spec.name,
                    kind="index",
                    parent=parent,
                    status="unavailable" if missing else "failed",
                    reason=reason,
                    required=spec.name in self._required,
                )
        self._time(built)

    def _set_threads(self) -> None:
        if self._threads:
            import_library("faiss").omp_set_num_threads(self._threads)

    def _add_index(
        self, spec: IndexSpec, parent: str, index: SearchIndex, builder: IndexBuilder, seconds: float
    ) -> None:
        queries = np.asarray(self._task.of_artifact.query, np.float32)
        self._on_progress(f"{spec.name}: checking")
        stored = "fp16" if spec.parent.endswith("fp16") else "fp32"
        labels = self._task.labels
        inputs = IndexInputs(
            vectors=stored_as(np.asarray(self._task.of_artifact.gallery, np.float32), stored),
            camids=labels.gallery_camids,
            queries=queries,
            query_camids=labels.query_camids,
            removed=builder.removed if spec.own else np.empty(0, np.int64),
            metric=self._metric,
        )
        findings = examine(index, inputs)

        def measured() -> Outcome:
            short = index.search(queries, self._list_length(FIRST))
            deep = index.search(queries, self._list_length(self._depth))
            return self._evaluator.listed(short, deep, self._depth)

        self._add(
            spec.name,
            "index",
            parent,
            measured,
            settings=index.settings,
            knob=index.knob,
            exact=index.exact,
            build_s=seconds,
            resident_bytes=index.resident_bytes,
            disk_bytes=index.disk_bytes,
            findings=tuple(map(str, findings)),
        )

    def _time(self, built: dict[str, SearchIndex]) -> None:
        """All indexes side by side, each with one query at a time and with 64."""
        queries = np.asarray(self._task.of_artifact.query, np.float32)
        batch = np.resize(queries, (BATCH, queries.shape[1]))
        steps: dict[str, Callable[[], object]] = {}
        for name, index in built.items():
            steps[f"{name} alone"] = partial(_next_query, index, cycle(range(len(queries))), queries)
            steps[f"{name} batch"] = partial(index.search, batch, FIRST)
        self._on_progress("timing all indexes")
        medians = {name: percentile(timed.samples_ms, 50) for name, timed in measure(steps, self._plan).items()}
        for name in built:
            alone, batched = (medians[f"{name} {kind}"] for kind in ("alone", "batch"))
            self._links[name] = dataclasses.replace(
                self._links[name], alone_ms=alone, alone_per_s=1000 / alone, batch_per_s=1000 * BATCH / batched
            )


def _next_query(index: SearchIndex, rows: Iterator[int], queries: Singles) -> None:
    row = next(rows)
    index.search(queries[row : row + 1], FIRST)
