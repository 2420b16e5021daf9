"""What a user asks the bench for: files, backends and precisions, turned into candidates and checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pmm.artifacts.batch_profiles import MAX_IMAGES
from pmm.artifacts.kinds import RUNNABLE, Kind, require_kind
from pmm.artifacts.manifest import Manifest
from pmm.artifacts.origin import RUNS, checkpoint_of, manifest_of, newest_run
from pmm.bench.candidates import Candidate, artifact_candidates, export_candidates
from pmm.bench.chain_schema import INDEX_NAMES, REQUIRED, TARGETS
from pmm.bench.latency import LatencyPlan
from pmm.bench.schema import SCHEMA, Gates
from pmm.bench.workers import file_name
from pmm.config import fast_mode
from pmm.data.bad_images import BadImageOptions
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import CannotWrite, ConflictingOptions, InvalidFile, InvalidValue, one_of
from pmm.utils.files import sha256
from pmm.utils.hardware import cuda_index

LONGEST_NAME = 60
"""Characters of a report's default folder."""


@dataclass(frozen=True, kw_only=True)
class Options(BadImageOptions):
    """What to measure, as typed."""

    backends: Annotated[str, Arg("NAMES")] = ""
    """torch, torch-compile, aoti, ort-cpu, ort-cuda, tensorrt, tensorrt-rtx, openvino, with commas between; auto: torch
    and the usual ones of this machine; all: every one that this machine can run; an adopted ONNX file has no network
    in torch, and ort-cpu in fp32 is its reference (default: auto; with exported files, the backends that run them)."""
    precisions: Annotated[str, Arg("NAMES")] = ""
    """fp32, tf32, fp16, bf16, int8, with commas between, or all; auto: fp32, int8, and fp16 on a GPU (default: auto).
    """
    batches: Annotated[str, Arg("N,N")] = "1,8"
    """Batch sizes to time, with commas between."""
    dataset: Annotated[str, Arg("NAME", group="data")] = ""
    """Data set (default: the one that the model was trained on, or that was named when it was adopted)."""
    root: Annotated[str, Arg("DIR", group="data")] = ""
    """Folder of the data set (default: as for --dataset)."""
    wrong_preprocessing: Annotated[Literal["sample", "all", "off"], Arg(group="data")] = "sample"
    """Measure what mistakes in preparing crops cost (BGR, another resize, no normalisation): on a sample of at most
    2,000 crops, on all crops, or not at all; each takes the reference one more pass over these crops."""
    device: str = "auto"
    """Where torch, torch-compile and aoti run: auto, cpu or cuda; cuda:N is a GPU by its number, for all backends."""
    cuda_graph: Annotated[str, Arg("{on,off,both}")] = "both"
    """On a GPU, replay inference as CUDA graphs: on, off, or both, side by side."""
    out: Annotated[Path | None, Arg("DIR", short="-o")] = None
    """Folder of the report and of the files exported for it (default: report/ beside the model, or report-NAME/ for
    exported files)."""
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
class ChainOptions:
    """The chain from the checkpoint to the index, as typed."""

    gallery: bool = False
    """Measure the chain: checkpoint, artifact, stored precision, index. The artifact is the fastest that may ship.
    Thresholds are written into the manifests beside the exported files, from where pmm embed takes them."""
    gallery_size: Annotated[int, Arg("N", least=0)] = 0
    """Raise the gallery to N crops, as 1000000, by made-up people (default: the crops that there are)."""
    indexes: Annotated[str, Arg("NAMES")] = ""
    """Indexes to judge, with commas between: certified, certified-fp16, pca-64, ivf-sq8, ivf-pq, ivf-pq-rescored,
    hnsw-16, hnsw-64, hnsw-256, usearch-64; all; a named one must keep the gates (default: all that are installed)."""
    target_fmr: Annotated[float, Arg("X")] = 1e-3
    """False match rate of the deployed threshold: 0.01, 0.001 or 0.0001."""

    def __post_init__(self) -> None:
        if self.target_fmr not in TARGETS:
            raise InvalidValue("target_fmr", self.target_fmr, one_of(f"{rate:g}" for rate in TARGETS))
        unknown = [name for name in self._words if name not in (*INDEX_NAMES, "all")]
        if unknown:
            raise InvalidValue("indexes", unknown[0], choices=(*INDEX_NAMES, "all"))
        defaults = {"gallery_size": 0, "indexes": "", "target_fmr": TARGETS[1]}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        if given and not self.gallery:
            flags = [f"--{name.replace('_', '-')}" for name in given]
            problem = f"{' and '.join(flags)} need{'s' * (len(flags) == 1)} --gallery"
            raise ConflictingOptions(problem, *flags, hint="add --gallery")

    @property
    def names(self) -> tuple[str, ...]:
        """The indexes to judge."""
        return INDEX_NAMES if "all" in self._words else tuple(self._words)

    @property
    def required(self) -> tuple[str, ...]:
        """Links whose gates fail the run: those of the chain that is deployed, and indexes that were named."""
        return (*REQUIRED, *(name for name in self._words if name not in (*REQUIRED, "all")))

    @property
    def _words(self) -> list[str]:
        return command_line.names(self.indexes, flag="--indexes") if self.indexes else ["all"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure, checked."""

    source: Path
    """The checkpoint, or the adopted ONNX file, that is judged."""
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
    chain: ChainOptions = ChainOptions()

    @property
    def reference(self) -> Candidate:
        """What the others are compared with: the source's own run in fp32."""
        return self.candidates[0]


def make_request(files: Sequence[Path], options: Options, gates: Gates, chain: ChainOptions | None = None) -> Request:
    """The request that a command line makes.

    Raises UserError, of the kind that fits, before anything is measured.
    """
    chain = chain or ChainOptions()
    batches = command_line.numbers(options.batches, flag="--batches")
    if max(batches) > MAX_IMAGES:
        raise InvalidValue("--batches", options.batches, f"at most {MAX_IMAGES} images per call")
    source, candidates, required = resolve_inputs(files, options)
    out = options.out or default_out(source, candidates)
    _refuse_older(out)
    return Request(
        source=source,
        candidates=candidates,
        required=required,
        any_precision="all" in command_line.names(options.precisions or "auto", flag="--precisions"),
        batches=tuple(batches),
        gates=gates if chain.gallery else dataclasses.replace(gates, max_fmr_factor=None, max_tpr_drop=None),
        out=out,
        options=options,
        chain=chain,
    )


def resolve_inputs(files: Sequence[Path], options: Options) -> tuple[Path, tuple[Candidate, ...], frozenset[str]]:
    """The source, the candidates, and the backends that must run.

    Args:
        files: at most one source (a checkpoint, or an adopted ONNX file), and artifacts. Without a source it is the one
            that the first artifact was exported from; without any file it is the checkpoint of the newest run.

    Raises:
        InvalidFile: a file that is missing, that pmm did not write, or that comes from another source.
        ConflictingOptions: several sources, or files of one name.
        UserError: as `export_candidates`.
    """
    backends = command_line.names(options.backends, flag="--backends") if options.backends else []
    precisions = command_line.names(options.precisions, flag="--precisions") if options.precisions else []
    kinds = {path: require_kind(path, *RUNNABLE) for path in files}
    sources = [path for path, kind in kinds.items() if _is_source(path, kind)]
    artifacts = [path for path in kinds if path not in sources]
    if len(sources) > 1:
        names = [str(path) for path in sources]
        problem = f"{len(names)} models: {', '.join(names)}"
        expected = "one checkpoint or adopted ONNX file, and files exported from it"
        raise ConflictingOptions(problem, *names, expected=expected)
    exported = artifact_candidates(artifacts, backends, device=options.device, cuda_graph=options.cuda_graph)
    source = sources[0] if sources else _source_of(exported) if exported else newest_run()
    exports = export_candidates(
        backends or ["auto"],
        precisions or ["auto"],
        source=_kind_of_source(source),
        device=options.device,
        cuda_graph=options.cuda_graph,
    )
    _check_origin(exported, source)
    candidates = exports if backends or precisions or not artifacts else exports[:1]
    named = [name for name in backends if name not in ("auto", "all")]
    required = frozenset(named) | {candidate.backend for candidate, _ in exported}
    # a file needs no export of the same kind
    covered = {(candidate.backend, candidate.precision) for candidate, _ in exported}
    to_export = [c for c in candidates[1:] if (c.backend, c.precision) not in covered]
    everything = (candidates[0], *(candidate for candidate, _ in exported), *to_export)
    _check_unique_names(everything)
    return source, everything, required


def default_out(source: Path, candidates: Sequence[Candidate]) -> Path:
    """report/ beside the source. A report of exported files leaves that of all backends where it is: it is
    report-NAMES/, or with more than LONGEST_NAME characters report-NAME-and-2-more/."""
    names = [candidate.artifact.stem for candidate in candidates if candidate.artifact]
    folder = "-".join(("report", *names))
    if len(folder) > LONGEST_NAME:
        folder = f"report-{names[0][:LONGEST_NAME]}" + (f"-and-{len(names) - 1}-more" if names[1:] else "")
    return source.parent / folder


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


def _is_source(path: Path, kind: Kind) -> bool:
    return kind == "checkpoint" or (kind == "onnx" and manifest_of(path).is_adopted_itself)


def _kind_of_source(source: Path) -> Literal["checkpoint", "onnx"]:
    """Raises InvalidFile for an ONNX file that has no run in fp32 to compare with."""
    if require_kind(source, *RUNNABLE) != "onnx":
        return "checkpoint"
    if (found := manifest_of(source).precision_found) not in ("fp32", "fp16"):  # ONNX Runtime's run of fp16 is fp32
        expected, hint = "fp32, as its own run is the reference", "adopt the file that it was made from"
        raise InvalidFile(f"it is in {found}", path=source, expected=expected, hint=hint)
    return "onnx"


def _source_of(exported: Sequence[tuple[Candidate, Manifest]]) -> Path:
    """Path of the checkpoint, or adopted ONNX file, that the first artifact was exported from: beside it, or in a
    run."""
    candidate, manifest = exported[0]
    assert candidate.artifact is not None
    source = checkpoint_of(candidate.artifact, manifest)
    if source is not None:
        return source
    what, name = ("its adopted ONNX file", "ADOPTED") if manifest.adopted else ("its checkpoint", "CKPT")
    problem = f"{what} (SHA-256 {manifest.checkpoint_sha256[:12]}...) is neither beside it nor under {RUNS}/"
    raise InvalidFile(problem, path=candidate.artifact, hint=f"name both: pmm bench {name} {candidate.artifact}")


def _check_origin(exported: Sequence[tuple[Candidate, Manifest]], source: Path) -> None:
    """Raises InvalidFile for an artifact of another source: the bench compares artifacts with their own."""
    digest = sha256(source) if exported else ""
    for candidate, manifest in exported:
        if manifest.checkpoint_sha256 != digest:
            what = "another adopted ONNX file" if manifest.adopted else "another checkpoint"
            raise InvalidFile(
                f"it was exported from {what} (SHA-256 {manifest.checkpoint_sha256[:12]}...)",
                path=candidate.artifact,
                expected=f"an export of {source} ({digest[:12]}...)",
            )
