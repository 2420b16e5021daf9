"""Every backend on the same people: ranking metrics and their change, embeddings, latency."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pmm.bench.latency import LatencyPlan, measure
from pmm.config import Config
from pmm.data.crops import load_crops
from pmm.data.samples import Split, camids_of, pids_of
from pmm.embed import embed_samples, rank_split
from pmm.environment import describe_environment
from pmm.errors import UserError
from pmm.files import make_folder, sha256
from pmm.machine import nvidia_gpus, usable_cores
from pmm.metrics import RankingResult, distance_matrix
from pmm.parity.numeric import numeric_parity
from pmm.runtime.base import Embeddings, Runner, open_runner

SCHEMA = "pmm-bench-1"
REFERENCE = "torch"


@dataclass
class _Measured:
    """A backend that ran on the whole test split."""

    runner: Runner
    result: dict[str, Any]
    query: Embeddings
    gallery: Embeddings
    ranking: RankingResult


@dataclass(frozen=True)
class _Job:
    """What a backend needs to open its model."""

    checkpoint: Path
    config: Config
    artifacts: Path
    """Path of the artifacts without their suffix."""
    threads: int


@dataclass
class Unavailable(Exception):  # noqa: N818 - a state to report, not an error
    """A backend that this machine cannot run, and why."""

    reason: str
    facts: dict[str, Any] = field(default_factory=dict)


def bench(
    checkpoint: Path,
    state: Mapping[str, Any],
    config: Config,
    split: Split,
    *,
    backends: Sequence[str],
    batches: Sequence[int],
    out: Path,
    plan: LatencyPlan,
) -> tuple[dict[str, Any], Image.Image]:
    """Measure `backends` on the test part of `split`; returns the report (see `pmm.bench.report`) and ranked lists.

    `state` is what `pmm.checkpoint.load` read from `checkpoint`; `config` is its configuration, with the data to use.
    Artifacts that a backend needs are exported into `out`/artifacts once per checkpoint.

    Raises UserError for an unknown backend, or if the reference itself (torch, fp32) cannot be measured.
    """
    check_backends(backends)
    names = [REFERENCE, *(name for name in backends if name != REFERENCE)]
    threads = usable_cores()
    digest = sha256(checkpoint)
    artifacts = make_folder(out / "artifacts") / digest[:12]

    measured: dict[str, _Measured] = {}
    results = []
    for name in names:
        result = _empty_result(name)
        results.append(result)
        try:
            runner = BACKENDS[name](_Job(checkpoint, config, artifacts, threads), result)
            measured[name] = _rank(name, runner, split, result)
            _compare(measured[name], measured[REFERENCE])
        except Unavailable as reason:
            result |= {"status": "unavailable", "reason": reason.reason, **reason.facts}
        except Exception as error:  # one backend's failure, of whatever kind, must not cost the others their figures
            if name == REFERENCE:
                raise
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            result |= {**_empty_result(name), "status": "failed", "reason": said.strip().split("\n")[0]}
            measured.pop(name, None)
        print(f"{name}: {result['status']}{': ' + result['reason'] if result['reason'] else ''}", file=sys.stderr)

    _time(measured, split, batches, plan)
    picture = _ranked_lists(split, measured[REFERENCE])
    for entry in measured.values():
        entry.runner.close()
    report = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoint": {
            "path": str(checkpoint),
            "sha256": digest,
            "method": config.model.method,
            "epoch": state["epoch"],
            "embedding_dim": measured[REFERENCE].query.shape[1],
            "parameters_m": _parameters(state["model"]) / 1e6,
        },
        "dataset": _describe_dataset(config, split),
        "environment": describe_environment(threads),
        "method": {
            "warmup_s": plan.warmup,
            "samples_per_batch": plan.samples,
            "includes": "uint8 crops in host memory to embeddings in host memory; decoding and resizing not included",
        },
        "results": results,
    }
    return report, picture


def check_backends(names: Sequence[str]) -> None:
    """Raises UserError for an unknown backend, naming the known ones."""
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise UserError(f"unknown backend {', '.join(unknown)}; known: {', '.join(BACKENDS)}")


def _rank(name: str, runner: Runner, split: Split, result: dict[str, Any]) -> _Measured:
    query = embed_samples(runner, split.query, label=f"{name}: query")
    gallery = embed_samples(runner, split.gallery, label=f"{name}: gallery")
    ranking = rank_split(split, query, gallery)
    info = runner.info
    result |= {
        "status": "ok",
        "device": info.device,
        "precision": info.precision,
        "provider": info.provider,
        "mAP": ranking.mAP,
        "rank1": ranking.rank1,
        "mINP": ranking.mINP,
        "skipped_queries": ranking.skipped,
    }
    return _Measured(runner, result, query, gallery, ranking)


def _compare(candidate: _Measured, reference: _Measured) -> None:
    parity = numeric_parity(
        np.concatenate([reference.query, reference.gallery]), np.concatenate([candidate.query, candidate.gallery])
    )
    candidate.result |= {
        "map_delta": candidate.ranking.mAP - reference.ranking.mAP,
        "rank1_delta": candidate.ranking.rank1 - reference.ranking.rank1,
        "min_cosine": parity.min_cosine,
        "median_cosine": parity.median_cosine,
    }


def _time(measured: dict[str, _Measured], split: Split, batches: Sequence[int], plan: LatencyPlan) -> None:
    size = next(iter(measured.values())).runner.preprocessing
    samples = (*split.query, *split.gallery)
    for batch in batches:
        paths = [samples[index % len(samples)].path for index in range(batch)]
        crops = load_crops(paths, size.height, size.width)
        steps = {name: entry.runner.bind(crops) for name, entry in measured.items()}
        print(f"timing batch {batch}: {', '.join(steps)}", file=sys.stderr)
        for name, latency in measure(steps, plan, seed=batch).items():
            measured[name].result["batches"].append(
                {
                    "batch": batch,
                    "p50_ms": latency.p50,
                    "p90_ms": latency.p90,
                    "images_per_s": latency.per_second(batch),
                    "samples_ms": [round(value, 4) for value in latency.samples_ms],
                }
            )


def _ranked_lists(split: Split, reference: _Measured, queries: int = 6, items: int = 9) -> Image.Image:
    """A few queries from the hardest to the easiest, with what the reference ranks first."""
    from pmm.visualize import ranked_lists

    scores = reference.ranking.per_query_ap
    order = np.argsort(scores, kind="stable")[: int(np.isfinite(scores).sum())]
    chosen = order[np.linspace(0.05 * (len(order) - 1), 0.95 * (len(order) - 1), min(queries, len(order))).astype(int)]
    gallery_pids, gallery_camids = pids_of(split.gallery), camids_of(split.gallery)
    distances = distance_matrix(reference.query[chosen], reference.gallery, "euclidean")
    rows = []
    for query, row in zip(chosen, distances, strict=True):
        sample = split.query[query]
        right = gallery_pids == sample.pid
        kept = np.flatnonzero(~(right & (gallery_camids == sample.camid)))
        nearest = kept[np.argsort(row[kept], kind="stable")[:items]]
        rows.append([(split.gallery[index].path, bool(right[index])) for index in nearest])
    titles = [f"AP {scores[query]:.0%}" for query in chosen]
    return ranked_lists([split.query[query].path for query in chosen], rows, titles=titles)


def _empty_result(name: str) -> dict[str, Any]:
    figures = ("mAP", "rank1", "mINP", "skipped_queries", "map_delta", "rank1_delta", "min_cosine", "median_cosine")
    return {
        "backend": name,
        "device": "cpu" if name.endswith("cpu") or name == REFERENCE else "cuda",
        "precision": "fp32",
        "status": "ok",
        "reason": "",
        "provider": "",
        "artifact": None,
        "artifact_bytes": None,
        "load_s": None,
        **dict.fromkeys(figures),
        "batches": [],
    }


def _parameters(weights: Mapping[str, Any]) -> int:
    """Trained numbers in a state dict: all but batch-norm's running statistics."""
    counted = ("running_mean", "running_var", "num_batches_tracked")
    return sum(value.numel() for key, value in weights.items() if not key.endswith(counted))


def _describe_dataset(config: Config, split: Split) -> dict[str, Any]:
    return {
        "name": config.data.dataset,
        "root": config.data.root,
        "queries": len(split.query),
        "gallery": len(split.gallery),
        "distractors": sum(sample.pid == 0 for sample in split.gallery),
        "identities": len({sample.pid for sample in split.query}),
    }


def _open(path: Path, device: str, job: _Job, result: dict[str, Any]) -> Runner:
    begin = time.perf_counter()
    runner = open_runner(path, device, job.threads)
    result |= {"artifact": str(path), "artifact_bytes": path.stat().st_size, "load_s": time.perf_counter() - begin}
    return runner


def _torch(job: _Job, result: dict[str, Any]) -> Runner:
    return _open(job.checkpoint, "cpu", job, result)


def _ort_cpu(job: _Job, result: dict[str, Any]) -> Runner:
    if not find_spec("onnxruntime"):
        raise Unavailable("ONNX Runtime is not installed: pip install onnxruntime-gpu (or onnxruntime)")
    return _open(_onnx_file(job), "cpu", job, result)


def _tensorrt(job: _Job, result: dict[str, Any]) -> Runner:
    from pmm.export.trt import build_engine, choose_flavor
    from pmm.onnx_file import read_onnx

    onnx_file = _onnx_file(job)
    try:
        choose_flavor("auto", onnx_file)
    except UserError as error:
        raise Unavailable(str(error)) from error
    engine = build_engine(read_onnx(onnx_file), job.artifacts.with_suffix(".plan"))
    contract = engine.manifest.engine
    if contract is not None and not nvidia_gpus():
        built = f"engine built with {contract.flavor} {contract.version}, but there is no NVIDIA GPU here to run it on"
        raise Unavailable(built, {"artifact": str(engine.path), "artifact_bytes": engine.path.stat().st_size})
    return _open(engine.path, "cuda", job, result)


def _onnx_file(job: _Job) -> Path:
    """The ONNX file of this checkpoint, exported unless an earlier run left it."""
    from pmm.export.onnx import verified_onnx
    from pmm.export.recipe import Verification

    config, out = job.config, job.artifacts.with_suffix(".onnx")
    return verified_onnx(job.checkpoint, out, verification=Verification(verify_root=config.data.root)).path


BACKENDS: dict[str, Callable[[_Job, dict[str, Any]], Runner]] = {
    "torch": _torch,
    "ort-cpu": _ort_cpu,
    "tensorrt": _tensorrt,
}
