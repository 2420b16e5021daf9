"""The report of a bench run: the schema of report.json, field by field.

Fractions are in 0..1, latencies in ms, memory and sizes in bytes, times in s. An interval is [low, high], at 95 %. None
(null) is a figure that was not measured, or has too few samples.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pmm.bench.chain_schema import ChainReport
from pmm.bench.result_schema import Interval, Result
from pmm.utils.errors import InvalidFile
from pmm.utils.from_dict import from_dict

SCHEMA = "pmm-bench-3"


@dataclass(frozen=True, kw_only=True)
class GateFailure:
    """A gate that a result fails, or whose figure could not be measured."""

    result: str
    """Name of the result."""
    gate: str
    """The flag, as --max-map-drop."""
    message: str
    """The figure and the bound, one line."""
    undecided: bool = False
    """The figure breaks the bound, but with so few queries it may be by chance."""


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The bounds of the run. None is off."""

    max_map_drop: float | None
    max_rank1_flips: float | None
    """Share of the queries whose first gallery crop turned from right to wrong or back."""
    min_cosine: dict[str, float]
    """Per precision."""
    max_p95_ms: float | None
    """At the smallest batch."""
    max_norm_error: dict[str, float] | None = None
    """Per precision; of an embedding's norm, relative."""
    max_fmr_factor: float | None = None
    """Of the links of the chain: false match rate at the deployed threshold, over its target."""
    max_tpr_drop: float | None = None
    """Of the links of the chain: fall of the true-positive rate at the deployed threshold, as a fraction."""
    failures: tuple[GateFailure, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PreprocessingCost:
    """One mistake in preparing crops, made with the reference."""

    mistake: str
    """In words, as "BGR, not RGB"."""
    reason: str = ""
    """Why its cost was not measured, one line; empty if it was."""
    mAP: float | None = None  # noqa: N815
    rank1: float | None = None
    map_delta: float | None = None
    """Minus that of the right preprocessing on the same crops; below 0 is a loss."""
    map_delta_interval: Interval | None = None
    """Paired bootstrap over queries."""
    rank1_delta: float | None = None
    rank1_delta_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class WrongPreprocessing:
    """What each mistake in preparing crops costs, all on the same crops of the test part."""

    sample: bool
    """On some identities and all of their crops, without distractors; else on all crops."""
    identities: int
    """Of queries."""
    queries: int
    gallery: int
    mAP: float  # noqa: N815
    """Of the reference, with the right preprocessing."""
    rank1: float
    costs: tuple[PreprocessingCost, ...]


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """The model that is judged: a checkpoint, or an adopted ONNX file."""

    path: str
    sha256: str
    method: str
    """adopted for a network that others trained."""
    epoch: int | None
    embedding_dim: int
    parameters_m: float
    """Millions of trained numbers."""
    height: int
    width: int
    kind: Literal["checkpoint", "onnx"] = "checkpoint"
    """onnx: an adopted ONNX file."""
    source: dict[str, str] = field(default_factory=dict)
    """Of an adopted one: where it comes from."""
    preprocessing: str = ""
    """In words; empty in older reports."""


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    name: str
    root: str
    queries: int
    gallery: int
    distractors: int
    identities: int
    cameras: int
    digest: str
    """Of names and contents of query and gallery: equal for the same data set."""
    unreadable: int = 0
    """Queries and gallery crops that were left out, as they cannot be read."""


@dataclass(frozen=True, kw_only=True)
class TimingFacts:
    """How latency was measured."""

    samples: int
    """Most samples per backend and batch."""
    seconds: float
    """Most time per backend and batch."""
    block: int
    threads: int
    """CPU threads of each backend."""
    matrix_tflops: dict[str, float]
    """Rate of the GPU's matrix product per precision, measured; empty without one."""
    gflop_per_image: float | None
    """Multiplications and additions of the deployed graph, for one image."""


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """report.json."""

    schema: str
    created: str
    seconds: float
    """Wall time of the run, exports included."""
    checkpoint: CheckpointFacts
    dataset: DatasetFacts
    environment: dict[str, Any]
    """See `pmm.utils.environment.describe_environment`."""
    timing: TimingFacts
    reference: str
    """Name of the result that the others are compared with."""
    results: tuple[Result, ...]
    gates: Gates
    wrong_preprocessing: WrongPreprocessing | None = None
    """None: not measured, or an older report."""
    chain: ChainReport | None = None
    """From the checkpoint to the index; None without --gallery, and in an older report."""

    def to_json(self) -> str:
        """Raises ValueError for a figure that is not finite, which JSON has no number for."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    def result(self, name: str) -> Result | None:
        """The result of that name."""
        return next((r for r in self.results if r.name == name), None)


def read_report(path: Path) -> BenchReport:
    """report.json as `BenchReport`. Raises InvalidFile for a file that is no such report, or of another schema."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        problem = f"it is not a report of pmm bench ({type(error).__name__})"
        raise InvalidFile(problem, path=path, expected="a report.json") from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        problem = f"its schema is {schema!r}" if schema else "it is not a report of pmm bench"
        raise InvalidFile(problem, path=path, expected=f"schema {SCHEMA!r}", hint="run pmm bench again")
    try:
        return from_dict(BenchReport, values)
    except (ValueError, TypeError) as error:
        problem = f"it is not a report of pmm bench ({error})"
        raise InvalidFile(problem, path=path, expected="a report.json") from error
