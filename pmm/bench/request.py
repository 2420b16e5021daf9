"""What a user asks the bench for: files, backends and precisions, turned into candidates and checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.artifacts.kinds import RUNNABLE, require_kind
from pmm.artifacts.manifest import MAX_IMAGES, Manifest
from pmm.artifacts.origin import RUNS, checkpoint_of, newest_run
from pmm.bench.candidates import Candidate, artifact_candidates, export_candidates
from pmm.bench.latency import LatencyPlan
from pmm.bench.schema import SCHEMA, Gates
from pmm.bench.workers import file_name
from pmm.config import fast_mode
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import CannotWrite, ConflictingOptions, InvalidFile, InvalidValue
from pmm.utils.files import sha256
from pmm.utils.hardware import cuda_index

LONGEST_NAME = 60
"""Characters of a report's default folder."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, as typed."""

    backends: Annotated[str, Arg("NAMES")] = ""
    """torch, torch-compile, aoti, ort-cpu, ort-cuda, tensorrt, tensorrt-rtx, openvino, with commas between; auto: torch
    and the usual ones of this machine; all: every one that this machine can run (default: auto; with exported files,
    the backends that run them)."""
    precisions: Annotated[str, Arg("NAMES")] = ""
    """fp32, tf32, fp16, bf16, int8, with commas between, or all; auto: fp32, int8, and fp16 on a GPU (default: auto).
    """
    batches: Annotated[str, Arg("N,N")] = "1,8"
    """Batch sizes to time, with commas between."""
    dataset: Annotated[str, Arg("NAME", group="data")] = ""
    """Data set (default: the one that the checkpoint was trained on)."""
    root: Annotated[str, Arg("DIR", group="data")] = ""
    """Folder of the data set (default: the one that the checkpoint was trained on)."""
    device: str = "auto"
    """Where torch, torch-compile and aoti run: auto, cpu or cuda; cuda:N is a GPU by its number, for all backends."""
    cuda_graph: Annotated[str, Arg("{on,off,both}")] = "both"
    """On a GPU, replay inference as CUDA graphs: on, off, or both, side by side."""
    out: Annotated[Path | None, Arg("DIR", short="-o")] = None
    """Folder of the report and of the files exported for it (default: report/ beside the checkpoint, or report-NAME/
    for exported files)."""
    resume: bool = False
    """Continue an interrupted run: finished measurements are kept."""
    samples: Annotated[int, Arg(group="timing")] = 400
    """Most latency samples of a backend at one batch size; p99 needs 368."""
    seconds: Annotated[float, Arg(group="timing")] = 10.0
    """Longest time in seconds for these samples."""
    timeout: Annotated[float, Arg(group="timing")] = 300.0
    """Seconds without a sign of life after which a backend counts as hung and is ended."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise InvalidValue("seconds", self.seconds, "more than 0 and at most 3600")
        if self.samples < 1:
            raise InvalidValue("samples", self.samples, "1 or more")
        if not 1 <= self.timeout <= 86400:
            raise InvalidValue("timeout", self.timeout, "1 to 86400 seconds")
        cuda_index(self.device)

    @property
    def plan(self) -> LatencyPlan:
        """How long to measure."""
        if fast_mode():
            return LatencyPlan(warmup=0.05, samples=10, settle=0.0, budget=self.seconds)
        return LatencyPlan(warmup_limit=min(5.0, self.seconds), samples=self.samples, budget=self.seconds)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure, checked."""

    checkpoint: Path
    candidates: tuple[Candidate, ...]
    """The reference comes first."""
    required: frozenset[str]
    """Backends that the command line names, or has a file for: one that this machine cannot run is a failure."""
    any_precision: bool
    """--precisions all: of a required backend one precision that runs is enough, as few machines have each."""
    batches: tuple[int, ...]
    gates: Gates
    out: Path
    options: Options


def make_request(files: Sequence[Path], options: Options, gates: Gates) -> Request:
    """The request that a command line makes.

    Raises UserError, of the kind that fits, before anything is measured.
    """
    batches = command_line.numbers(options.batches, flag="--batches")
    if max(batches) > MAX_IMAGES:
        raise InvalidValue("--batches", options.batches, f"at most {MAX_IMAGES} images per call")
    checkpoint, candidates, required = resolve_inputs(files, options)
    out = options.out or default_out(checkpoint, candidates)
    _refuse_older(out)
    return Request(
        checkpoint=checkpoint,
        candidates=candidates,
        required=required,
        any_precision="all" in command_line.names(options.precisions or "auto", flag="--precisions"),
        batches=tuple(batches),
        gates=gates,
        out=out,
        options=options,
    )


def resolve_inputs(files: Sequence[Path], options: Options) -> tuple[Path, tuple[Candidate, ...], frozenset[str]]:
    """The checkpoint, the candidates, and the backends that must run.

    Args:
        files: at most one checkpoint, and artifacts. Without a checkpoint it is the one that the first artifact was
            exported from; without any file it is that of the newest run.

    Raises:
        InvalidFile: a file that is missing, that pmm did not write, or that comes from another checkpoint.
        ConflictingOptions: several checkpoints, or files of one name.
        UserError: as `export_candidates`.
    """
    backends = command_line.names(options.backends, flag="--backends") if options.backends else []
    precisions = command_line.names(options.precisions, flag="--precisions") if options.precisions else []
    exports = export_candidates(
        backends or ["auto"], precisions or ["auto"], device=options.device, cuda_graph=options.cuda_graph
    )
    kinds = {path: require_kind(path, *RUNNABLE) for path in files}
    checkpoints = [path for path, kind in kinds.items() if kind == "checkpoint"]
    artifacts = [path for path, kind in kinds.items() if kind != "checkpoint"]
    if len(checkpoints) > 1:
        names = [str(path) for path in checkpoints]
        problem = f"{len(names)} checkpoints: {', '.join(names)}"
        raise ConflictingOptions(problem, *names, expected="one checkpoint, and files exported from it")
    exported = artifact_candidates(artifacts, backends, device=options.device, cuda_graph=options.cuda_graph)
    checkpoint = checkpoints[0] if checkpoints else _checkpoint_of(exported) if exported else newest_run()
    _check_origin(exported, checkpoint)
    candidates = exports if backends or precisions or not artifacts else exports[:1]
    named = [name for name in backends if name not in ("auto", "all")]
    required = frozenset(named) | {candidate.backend for candidate, _ in exported}
    # a file needs no export of the same kind
    covered = {(candidate.backend, candidate.precision) for candidate, _ in exported}
    to_export = [c for c in candidates[1:] if (c.backend, c.precision) not in covered]
    everything = (candidates[0], *(candidate for candidate, _ in exported), *to_export)
    _check_unique_names(everything)
    return checkpoint, everything, required


def default_out(checkpoint: Path, candidates: Sequence[Candidate]) -> Path:
    """report/ beside the checkpoint. A report of exported files leaves that of all backends where it is: it is
    report-NAMES/, or with more than LONGEST_NAME characters report-NAME-and-2-more/."""
    names = [candidate.artifact.stem for candidate in candidates if candidate.artifact]
    folder = "-".join(("report", *names))
    if len(folder) > LONGEST_NAME:
        folder = f"report-{names[0][:LONGEST_NAME]}" + (f"-and-{len(names) - 1}-more" if names[1:] else "")
    return checkpoint.parent / folder


def _check_unique_names(candidates: Sequence[Candidate]) -> None:
    """Raises ConflictingOptions: a result goes by its name, in the report and in the files of the run."""
    seen: dict[str, Candidate] = {}
    for candidate in candidates:
        first = seen.setdefault(file_name(candidate.name), candidate)
        if first is not candidate:
            problem = f"{first.artifact} and {candidate.artifact} have one name in the report, '{candidate.name}'"
            raise ConflictingOptions(problem, str(first.artifact), str(candidate.artifact), hint="rename one of them")


def _refuse_older(out: Path) -> None:
    """Raises CannotWrite if the folder `out` holds a report of another schema, which must not be mixed with this one's
    or be overwritten."""
    try:
        schema = json.loads((out / "report.json").read_text()).get("schema")
    except (OSError, ValueError, AttributeError):
        return
    if schema != SCHEMA:
        problem = f"it holds a report of schema {schema!r}, and this version writes {SCHEMA!r}"
        raise CannotWrite(problem, path=out, hint="choose another folder with --out, or remove it")


def _checkpoint_of(exported: Sequence[tuple[Candidate, Manifest]]) -> Path:
    """Path of the checkpoint that the first artifact was exported from: beside it, or in a run."""
    candidate, manifest = exported[0]
    assert candidate.artifact is not None
    checkpoint = checkpoint_of(candidate.artifact, manifest)
    if checkpoint is not None:
        return checkpoint
    problem = f"its checkpoint (SHA-256 {manifest.checkpoint_sha256[:12]}...) is neither beside it nor under {RUNS}/"
    raise InvalidFile(problem, path=candidate.artifact, hint=f"name both: pmm bench CKPT {candidate.artifact}")


def _check_origin(exported: Sequence[tuple[Candidate, Manifest]], checkpoint: Path) -> None:
    """Raises InvalidFile for an artifact of another checkpoint: the bench compares artifacts with their own."""
    digest = sha256(checkpoint) if exported else ""
    for candidate, manifest in exported:
        if manifest.checkpoint_sha256 != digest:
            raise InvalidFile(
                f"it was exported from another checkpoint (SHA-256 {manifest.checkpoint_sha256[:12]}...)",
                path=candidate.artifact,
                expected=f"an export of {checkpoint} ({digest[:12]}...)",
            )
