"""Evaluate one candidate: make its file, open it in a worker, embed every crop of the test part, measure accuracy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pmm.artifacts.dataset_location import DatasetLocation
from pmm.bench.accuracy import AccuracyEvaluator, Reference
from pmm.bench.candidates import Candidate
from pmm.bench.request import Request
from pmm.bench.result_schema import Result
from pmm.bench.resume_store import ResumeStore
from pmm.bench.workers import WorkerPool, file_name
from pmm.data.samples import Sample, evenly_spaced
from pmm.evaluation.parity.labels import QueryGallery
from pmm.runtime.base import Embeddings
from pmm.utils.errors import BackendUnavailable, UserError
from pmm.utils.files import make_folder, sha256

BUILDER = "builder"
BUILD_TIMEOUT_FACTOR = 12.0
"""Times the timeout that a build may be silent: builders and quantizers do not report their progress."""
CHECKED_CROPS = 64
"""How many crops are embedded in small batches, too."""


class CandidateEvaluator:
    """Evaluates the candidates of one request, the reference first."""

    macs: int | None = None
    """Multiply-accumulates of the exported graph for one image; None as long as nothing was exported."""

    def __init__(
        self,
        request: Request,
        workers: WorkerPool,
        accuracy: AccuracyEvaluator,
        resume_store: ResumeStore,
        data: DatasetLocation,
        on_progress: Callable[[str], None],
    ) -> None:
        """`accuracy` has the crops of `data`; `on_progress` is called with a short text on what is being done."""
        self._request, self._workers, self._accuracy, self._resume_store = request, workers, accuracy, resume_store
        self._data, self._on_progress = data, on_progress
        self._files: dict[str, Path] = {}
        self._opened: dict[str, Any] = {}
        self._references: dict[tuple[bool, bool], Reference] = {}

    def evaluate(self, candidate: Candidate) -> Result:
        """The candidate's result without timings; of one that could not run, with the reason."""
        empty = Result(
            name=candidate.name,
            backend=candidate.backend,
            device=candidate.device,
            precision=candidate.precision,
            cuda_graph=candidate.cuda_graph,
            status="ok",
            reason="",
        )
        try:
            if reason := candidate.unavailable_reason():
                raise BackendUnavailable(reason)
            result = self._with_artifact(candidate, empty)
            earlier = self._resume_store.result(candidate.name)
            if earlier and earlier.artifact_sha256 == result.artifact_sha256:
                return earlier
            if reason := candidate.cannot_run_reason():
                return dataclasses.replace(result, status="unavailable", reason=reason)
            result = self._with_accuracy(candidate, result)
        except UserError as error:
            self._workers.end(candidate.name)
            unavailable = isinstance(error, BackendUnavailable)
            status: Literal["failed", "unavailable"] = "unavailable" if unavailable else "failed"
            return dataclasses.replace(empty, status=status, reason=str(error))
        self._resume_store.store_result(result)
        return result

    def open(self, candidate: Candidate) -> Any:
        """Facts of the candidate's runner, which is opened in its worker unless it is open already."""
        if candidate.name not in self._workers:
            self._opened[candidate.name] = self._workers[candidate.name].call(
                "open",
                artifact=str(self._files[candidate.name]),
                backend=candidate.backend,
                precision=candidate.precision,
                device=candidate.device_name,
                cuda_graph=candidate.cuda_graph,
                threads=self._workers.threads,
            )
        return self._opened[candidate.name]

    @property
    def reference(self) -> Reference:
        """The backend that the others are compared with."""
        return self._reference(normalised=False, flip_tta=False)

    def reference_with(self, mistake: str, rows: Sequence[int]) -> Embeddings:
        """Embeddings [len(rows), D] by the reference of those crops of the data set, prepared with a `mistake` (a name
        of `pmm.data.mistakes`). Raises UserError as the worker does."""
        self.open(self._request.reference)
        out = self._resume_store.path(f"mistake-{mistake}.npy")
        samples = [self._accuracy.samples[row] for row in rows]
        self._embed_to(out, self._request.reference.name, samples, f"wrong preprocessing, {mistake}", mistake=mistake)
        embeddings: Embeddings = np.load(out, allow_pickle=False)
        out.unlink()
        return embeddings

    def chain_embeddings(
        self, candidate: Candidate, train: Sequence[Sample] = ()
    ) -> tuple[QueryGallery, QueryGallery, Embeddings, Embeddings]:
        """Embeddings of the data set by the reference, as the candidate's are, and by the candidate; and the same of
        crops of the `train` part [N, D], if any. What an earlier call made is kept. Raises UserError as the worker."""
        opened = self.open(candidate)
        how = {"normalised": opened["normalised"], "flip_tta": opened["flip_tta"]}
        reference = self._reference(**how).embedded
        own = candidate == self._request.reference
        embedded = reference if own else self._accuracy.split_embeddings(self._embed(candidate.name))
        if not train:
            none = np.empty((0, reference.gallery.shape[1]), np.float32)
            return reference, embedded, none, none
        of_reference = self._reference_rows(train, "-train", **how)
        return reference, embedded, of_reference, of_reference if own else self._embed(candidate.name, train, "-train")

    def _with_artifact(self, candidate: Candidate, result: Result) -> Result:
        """`result` with its artifact, which is exported and built if the user gave none."""
        path, seconds = candidate.artifact or self._request.source, None
        runs_source = candidate.file_kind == "checkpoint" or candidate == self._request.reference
        if candidate.artifact is None and not runs_source:
            built = self._workers[BUILDER].call(
                "make",
                patience=BUILD_TIMEOUT_FACTOR,
                kind=candidate.file_kind,
                precision=candidate.precision,
                file_precision=candidate.file_precision,
                device=candidate.device_name,
                flavor=candidate.flavor if candidate.file_kind == "engine" else "",
                batches=self._request.batches,
                source=str(self._request.source),
                folder=str(make_folder(self._request.out / "artifacts")),
                dataset=self._data.name,
                root=self._data.root,
            )
            path, seconds, self.macs = Path(built["path"]), built["build_s"], built["macs"]
        self._files[candidate.name] = path
        return dataclasses.replace(
            result,
            artifact=str(path),
            artifact_sha256=sha256(path),
            artifact_bytes=path.stat().st_size,
            build_s=seconds,
        )

    def _with_accuracy(self, candidate: Candidate, result: Result) -> Result:
        """`result` with all figures of accuracy, and the facts of its runner."""
        opened = self.open(candidate)
        reference = self._reference(normalised=opened["normalised"], flip_tta=opened["flip_tta"])
        if candidate == self._request.reference:
            embedded = reference.embedded
        else:
            embedded = self._accuracy.split_embeddings(self._embed(candidate.name))
        samples = self._accuracy.samples
        checked = [str(samples[index].path) for index in evenly_spaced(len(samples), CHECKED_CROPS)]
        across_batches = self._workers[candidate.name].call("compare_batch_sizes", paths=checked)
        figures = self._accuracy.figures(embedded, reference)
        name, plain = self._request.reference.name, self.open(self._request.reference)
        notes = [f"compared with the L2-normalised embeddings of {name}"] * (opened["normalised"] > plain["normalised"])
        mirrored = f"compared with the mean of the embeddings of a crop and its mirror image by {name}"
        notes += [mirrored] * opened["flip_tta"]
        return dataclasses.replace(
            result,
            notes=tuple(notes),
            provider=opened["provider"],
            gpu=opened["device"] if candidate.device == "cuda" else "",
            load_s=opened["load_s"],
            first_inference_s=opened["first_inference_s"],
            batch_min_cosine=across_batches["min_cosine"],
            **figures | {"max_norm_error": max(figures["max_norm_error"], across_batches["norm_error"])},
        )

    def _embed(
        self, name: str, samples: Sequence[Sample] = (), part: str = "", *, mirrored: bool = False
    ) -> Embeddings:
        """Embeddings of `samples` (default: query and gallery), called `part`. The reference's are kept for a run that
        is resumed; with --gallery all are, for the chain."""
        digest = sha256(self._files[name])[:12]
        out = self._resume_store.path(f"{file_name(name)}-{digest}{part}{'-mirrored' if mirrored else ''}.npy")
        if not out.exists():
            self.open(next(each for each in self._request.candidates if each.name == name))
            self._embed_to(out, name, samples or self._accuracy.samples, name, mirrored=mirrored)
        embeddings: Embeddings = np.load(out, allow_pickle=False)
        if name != self._request.reference.name and not self._request.chain.gallery:
            out.unlink()
        return embeddings

    def _embed_to(self, out: Path, name: str, samples: Sequence[Sample], what: str, **how: Any) -> None:
        """Have the worker `name` write the embeddings of those crops to `out`; the progress is that of `what`."""
        crops = self._resume_store.path("crops.json")
        crops.write_text(json.dumps([str(sample.path) for sample in samples]))
        self._workers[name].call(
            "embed",
            paths=str(crops),
            out=str(out),
            progress=lambda done: self._on_progress(f"{what}: embedded {done:.0%}"),
            **how,
        )

    def _reference(self, *, normalised: bool, flip_tta: bool) -> Reference:
        """The reference, its embeddings L2-normalised or averaged with the mirror image's, as an artifact's are."""
        if (normalised, flip_tta) not in self._references:
            rows = self._reference_rows(normalised=normalised, flip_tta=flip_tta)
            embedded = self._accuracy.split_embeddings(rows)
            self._references[normalised, flip_tta] = self._accuracy.reference(embedded)
        return self._references[normalised, flip_tta]

    def _reference_rows(
        self, samples: Sequence[Sample] = (), part: str = "", *, normalised: bool, flip_tta: bool
    ) -> Embeddings:
        name = self._request.reference.name
        embeddings = self._embed(name, samples, part).astype(np.float64)
        if flip_tta:
            embeddings = (embeddings + self._embed(name, samples, part, mirrored=True)) / 2
        if normalised:
            embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        return embeddings.astype(np.float32)
