"""What a user asks the bench for: files, backends and precisions, turned into candidates and checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmm.artifacts.kinds import RUNNABLE, kind_among
from pmm.artifacts.manifest import MOST_IMAGES, Manifest
from pmm.artifacts.origin import checkpoint_of
from pmm.artifacts.runs import RUNS, newest_run
from pmm.bench.candidates import Candidate, chosen, given
from pmm.bench.latency import LatencyPlan
from pmm.bench.schema import SCHEMA, Gates
from pmm.bench.workers import file_name
from pmm.config import fast_mode
from pmm.utils import command_line
from pmm.utils.errors import UserError
from pmm.utils.files import sha256


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, as typed."""

    backends: str = ""
    """torch, torch-compile, aoti, ort-cpu, ort-cuda, tensorrt, tensorrt-rtx, openvino, with commas between; auto: torch
    and the usual ones of this machine; all: whatever it can run (default: auto; with artifacts, what runs those)."""
    precisions: str = ""
    """fp32, tf32, fp16, bf16, int8, with commas between; auto: fp32, int8, on a GPU fp16; or all (default: auto)."""
    batches: str = "1,8"
    """Images per call to time, with commas between."""
    dataset: str = ""
    """Data set (default: the one the checkpoint was trained on)."""
    root: str = ""
    """Folder of the data set (default: the one the checkpoint was trained on)."""
    device: str = "auto"
    """Where torch, torch-compile and aoti run: cpu, cuda, or auto; cuda:N is a GPU by its number, for all backends."""
    cuda_graph: str = "both"
    """Replay runs as CUDA graphs, on a GPU: on, off, or both, side by side."""
    out: Path | None = None
    """Folder of the report and of the files made for it (default: beside the checkpoint report/, or report-NAME/ of
    files that are given)."""
    resume: bool = False
    """Go on with an interrupted run: what it finished is not measured again."""
    samples: int = 400
    """Most latency samples of one backend at one batch size; p99 needs 368."""
    seconds: float = 10.0
    """Most time for them."""
    timeout: float = 300.0
    """Seconds without a sign of life after which a backend counts as hung, and is ended."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise UserError(f"--seconds is {self.seconds:g}; expected more than 0, at most 3600")
        if self.samples < 1:
            raise UserError(f"--samples is {self.samples}; it must be at least 1")
        if not 1 <= self.timeout <= 86400:
            raise UserError(f"--timeout is {self.timeout:g}; expected 1 to 86400 seconds")

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
    asked: frozenset[str]
    """Backends that were asked for by name, or by giving a file: one that cannot run here is a failure."""
    any_precision: bool
    """Asked for in all precisions: one that runs is enough, as not every machine has each."""
    batches: tuple[int, ...]
    gates: Gates
    out: Path
    options: Options


def requested(files: Sequence[Path], options: Options, gates: Gates) -> Request:
    """The request that a command line makes.

    Raises UserError for what does not exist, does not fit together or is not known, before anything is measured.
    """
    batches = command_line.numbers(options.batches, flag="--batches")
    if max(batches) > MOST_IMAGES:
        raise UserError(f"--batches: {max(batches)} images per call; at most {MOST_IMAGES} are possible")
    checkpoint, candidates, asked = subjects(files, options)
    ours = [candidate.artifact.stem for candidate in candidates if candidate.artifact]
    # a report of files that were given leaves the one of all backends where it is
    out = options.out or checkpoint.parent / "-".join(("report", *ours))
    _refuse_older(out)
    return Request(
        checkpoint=checkpoint,
        candidates=candidates,
        asked=asked,
        any_precision="all" in command_line.names(options.precisions or "auto", flag="--precisions"),
        batches=tuple(batches),
        gates=gates,
        out=out,
        options=options,
    )


def subjects(files: Sequence[Path], options: Options) -> tuple[Path, tuple[Candidate, ...], frozenset[str]]:
    """The checkpoint, the candidates, and the backends that must run.

    Args:
        files: at most one checkpoint, and artifacts. Without a checkpoint the artifacts' own is looked for; without any
            file it is that of the newest run.

    Raises:
        UserError: a missing or foreign file, several checkpoints, artifacts of different checkpoints, or as `chosen`.
    """
    backends = command_line.names(options.backends, flag="--backends") if options.backends else []
    precisions = command_line.names(options.precisions, flag="--precisions") if options.precisions else []
    exports = chosen(backends or ["auto"], precisions or ["auto"], device=options.device, cuda_graph=options.cuda_graph)
    kinds = {path: kind_among(path, *RUNNABLE) for path in files}
    checkpoints = [path for path, kind in kinds.items() if kind == "checkpoint"]
    artifacts = [path for path, kind in kinds.items() if kind != "checkpoint"]
    if len(checkpoints) > 1:
        raise UserError(f"{len(checkpoints)} checkpoints given; the bench compares the artifacts of one with it")
    found = given(artifacts, backends, device=options.device, cuda_graph=options.cuda_graph)
    checkpoint = checkpoints[0] if checkpoints else _checkpoint_of(found) if found else newest_run()
    _one_origin(found, checkpoint)
    candidates = exports if backends or precisions or not artifacts else exports[:1]
    named = [name for name in backends if name not in ("auto", "all")]
    asked = frozenset(named) | {candidate.backend for candidate, _ in found}
    # what was given needs no export of the same kind
    covered = {(candidate.backend, candidate.precision) for candidate, _ in found}
    kept = [c for c in candidates[1:] if (c.backend, c.precision) not in covered]
    everything = (candidates[0], *(candidate for candidate, _ in found), *kept)
    _refuse_namesakes(everything)
    return checkpoint, everything, asked


def _refuse_namesakes(candidates: Sequence[Candidate]) -> None:
    """A result goes by its name, in the report and in the files of the run."""
    seen: dict[str, Candidate] = {}
    for candidate in candidates:
        other = seen.setdefault(file_name(candidate.name), candidate)
        if other is not candidate:
            raise UserError(
                f"{other.artifact} and {candidate.artifact} would both be called '{candidate.name}'; rename one of them"
            )


def _refuse_older(out: Path) -> None:
    """Raises UserError if the folder `out` holds a report of another schema, which must not be mixed with this one's or
    be overwritten."""
    try:
        schema = json.loads((out / "report.json").read_text()).get("schema")
    except (OSError, ValueError, AttributeError):
        return
    if schema != SCHEMA:
        raise UserError(
            f"{out} holds a report of schema {schema!r}, this version writes {SCHEMA!r}; give another --out, or "
            "remove it"
        )


def _checkpoint_of(found: Sequence[tuple[Candidate, Manifest]]) -> Path:
    """Where the checkpoint lies that the first artifact came from: beside it, or in a run."""
    candidate, manifest = found[0]
    assert candidate.artifact is not None
    checkpoint = checkpoint_of(candidate.artifact, manifest)
    if checkpoint is not None:
        return checkpoint
    raise UserError(
        f"{candidate.artifact}: the checkpoint it was exported from ({manifest.checkpoint_sha256[:12]}...) is neither "
        f"beside it nor under {RUNS}/; give it too: pmm bench CKPT {candidate.artifact}"
    )


def _one_origin(found: Sequence[tuple[Candidate, Manifest]], checkpoint: Path) -> None:
    digest = sha256(checkpoint) if found else ""
    for candidate, manifest in found:
        if manifest.checkpoint_sha256 != digest:
            raise UserError(
                f"{candidate.artifact} was exported from another checkpoint ({manifest.checkpoint_sha256[:12]}...) "
                f"than {checkpoint} ({digest[:12]}...); the bench compares the artifacts of one checkpoint with it"
            )
