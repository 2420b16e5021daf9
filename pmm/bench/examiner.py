"""One candidate examined: its file made, opened in a worker, run on every crop of the test part, and judged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pmm.bench.accuracy import AccuracyEvaluator, Reference
from pmm.bench.candidates import REFERENCE, Candidate
from pmm.bench.request import Request
from pmm.bench.resume_store import Unfinished
from pmm.bench.schema import Result
from pmm.bench.workers import WorkerPool, file_name
from pmm.data.samples import evenly
from pmm.runtime.base import Embeddings
from pmm.utils.errors import BackendUnavailable, UserError
from pmm.utils.files import make_folder, sha256

BUILDER = "builder"
BUILDING = 12.0
"""Times the timeout that a build may be silent: builders and quantizers do not tell how far they are."""
CHECKED_CROPS = 64
"""How many crops are embedded in small batches, too."""


class CandidateEvaluator:
    """Examines the candidates of one request, the reference first."""

    macs: int | None = None
    """Multiply-accumulates of the exported graph for one image; None as long as nothing was exported."""

    def __init__(
        self,
        request: Request,
        crew: WorkerPool,
        judge: AccuracyEvaluator,
        kept: Unfinished,
        dataset: str,
        root: str,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            dataset, root: what the judge's crops are of.
            say: told what is being done.
        """
        self._request, self._crew, self._judge, self._kept = request, crew, judge, kept
        self._dataset, self._root, self._say = dataset, root, say
        self._files: dict[str, Path] = {}
        self._opened: dict[str, Any] = {}
        self._references: dict[tuple[bool, bool], Reference] = {}
        self._crops = kept.path("crops.json")
        self._crops.write_text(json.dumps([str(sample.path) for sample in judge.samples]))

    def examine(self, candidate: Candidate) -> Result:
        """Its result, but for the timings; of one that could not run, with the reason."""
        plain = Result(
            name=candidate.name,
            backend=candidate.backend,
            device=candidate.device,
            precision=candidate.precision,
            cuda_graph=candidate.cuda_graph,
            status="ok",
            reason="",
        )
        try:
            if reason := candidate.why_not():
                raise BackendUnavailable(reason)
            result = self._made(candidate, plain)
            kept = self._kept.result(candidate.name)
            if kept and kept.artifact_sha256 == result.artifact_sha256:
                return kept
            if reason := candidate.cannot_run():
                return dataclasses.replace(result, status="unavailable", reason=reason)
            result = self._judged(candidate, result)
        except UserError as error:
            self._crew.end(candidate.name)
            status: Literal["failed", "unavailable"] = (
                "unavailable" if isinstance(error, BackendUnavailable) else "failed"
            )
            return dataclasses.replace(plain, status=status, reason=str(error))
        self._kept.keep_result(result)
        return result

    def open(self, candidate: Candidate) -> Any:
        """What the candidate's worker says of its runner, opened unless it is open."""
        if candidate.name not in self._crew:
            self._opened[candidate.name] = self._crew[candidate.name].ask(
                "open",
                artifact=str(self._files[candidate.name]),
                backend=candidate.backend,
                precision=candidate.precision,
                device=candidate.place,
                cuda_graph=candidate.cuda_graph,
                threads=self._crew.threads,
            )
        return self._opened[candidate.name]

    @property
    def reference(self) -> Reference:
        """What the others are compared with."""
        return self._reference(normalised=False, flip_tta=False)

    def _made(self, candidate: Candidate, result: Result) -> Result:
        """With its artifact, made if need be."""
        path, seconds = candidate.artifact or self._request.checkpoint, None
        if candidate.artifact is None and candidate.runs != "checkpoint":
            made = self._crew[BUILDER].ask(
                "make",
                patience=BUILDING,
                kind=candidate.runs,
                precision=candidate.precision,
                stored=candidate.stored,
                device=candidate.place,
                flavor=candidate.flavor if candidate.runs == "engine" else "",
                batches=self._request.batches,
                checkpoint=str(self._request.checkpoint),
                folder=str(make_folder(self._request.out / "artifacts")),
                dataset=self._dataset,
                root=self._root,
            )
            path, seconds, self.macs = Path(made["path"]), made["build_s"], made["macs"]
        self._files[candidate.name] = path
        return dataclasses.replace(
            result,
            artifact=str(path),
            artifact_sha256=sha256(path),
            artifact_bytes=path.stat().st_size,
            build_s=seconds,
        )

    def _judged(self, candidate: Candidate, result: Result) -> Result:
        """With all figures of accuracy, and what opening it told."""
        opened = self.open(candidate)
        reference = self._reference(normalised=opened["normalised"], flip_tta=opened["flip_tta"])
        if candidate.name == REFERENCE:
            embedded = reference.embedded
        else:
            embedded = self._judge.embedded(self._embed(candidate.name))
        checked = [str(self._judge.samples[index].path) for index in evenly(len(self._judge.samples), CHECKED_CROPS)]
        apart = self._crew[candidate.name].ask("compare_batch_sizes", paths=checked)
        figures = self._judge.figures(embedded, reference)
        notes = ["compared with torch's embeddings brought to length 1"] * opened["normalised"]
        notes += ["compared with the mean of torch's embeddings of crop and mirror image"] * opened["flip_tta"]
        return dataclasses.replace(
            result,
            notes=tuple(notes),
            provider=opened["provider"],
            gpu=opened["device"] if candidate.device == "cuda" else "",
            load_s=opened["load_s"],
            first_inference_s=opened["first_inference_s"],
            batch_min_cosine=apart["least_cosine"],
            **figures | {"max_length_error": max(figures["max_length_error"], apart["length_error"])},
        )

    def _embed(self, name: str, *, mirrored: bool = False) -> Embeddings:
        """Embeddings [Q + G, D] of the data set; the reference's are kept for a run that is resumed."""
        digest = sha256(self._files[name])[:12]
        out = self._kept.path(f"{file_name(name)}-{digest}{'-mirrored' if mirrored else ''}.npy")
        if not out.exists():
            self._crew[name].ask(
                "embed",
                paths=str(self._crops),
                out=str(out),
                mirrored=mirrored,
                progress=lambda done: self._say(f"{name}: embedded {done:.0%}"),
            )
        found = np.load(out, allow_pickle=False)
        if name != REFERENCE:
            out.unlink()
        return found

    def _reference(self, *, normalised: bool, flip_tta: bool) -> Reference:
        """The reference, its embeddings treated as a file's with such a contract are."""
        if (normalised, flip_tta) not in self._references:
            embeddings = self._embed(REFERENCE).astype(np.float64)
            if flip_tta:
                self.open(self._request.candidates[0])
                embeddings = (embeddings + self._embed(REFERENCE, mirrored=True)) / 2
            if normalised:
                embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
            embedded = self._judge.embedded(embeddings.astype(np.float32))
            self._references[normalised, flip_tta] = self._judge.reference(embedded)
        return self._references[normalised, flip_tta]
