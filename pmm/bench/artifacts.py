"""Export and build the file of a candidate, once per source: a checkpoint or an adopted ONNX file. In a worker."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pmm.artifacts.artifact import Artifact
from pmm.artifacts.dataset_location import DatasetLocation, resolve_data_root
from pmm.artifacts.kinds import PACKAGE_SUFFIX, kind_of
from pmm.artifacts.onnx_file import read_onnx
from pmm.artifacts.origin import training_dataset
from pmm.bench.result_schema import EMBED_BATCH
from pmm.data.mistakes import likely_mistakes
from pmm.data.preprocessing import Preprocessing
from pmm.export.onnx import export_onnx_cached
from pmm.export.options import EngineOptions, ExportOptions, Precision, VerifyOptions
from pmm.export.trt import build_engine_cached
from pmm.utils.files import sha256
from pmm.utils.hardware import nvidia_gpus


def describe_source(path: Path) -> dict[str, Any]:
    """Facts of a checkpoint, or an adopted ONNX file, for the report; its data set (empty where nobody said what it
    was); and the mistakes that can be made in preparing its crops. Raises InvalidFile if it cannot be read."""
    return _describe_onnx(path) if kind_of(path) == "onnx" else _describe_checkpoint(path)


def _describe_onnx(path: Path) -> dict[str, Any]:
    import onnx

    file = read_onnx(path)
    manifest, floats = file.manifest, (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    weights = sum(math.prod(each.dims) for each in file.proto.graph.initializer if each.data_type in floats)
    origin = manifest.adopted
    assert origin is not None
    return {
        "kind": "onnx",
        "sha256": file.sha256,
        "method": manifest.method,
        "epoch": None,
        "embedding_dim": manifest.embedding.dim,
        "parameters_m": weights / 1e6,
        "source": {"SHA-256": origin.sha256, "written by": origin.producer or "unknown"},
        "dataset": origin.dataset,
        "root": resolve_data_root(origin.root, path),
        **_preparation(manifest.preprocessing, in_graph=manifest.input.normalised_by == "graph"),
    }


def _preparation(size: Preprocessing, *, in_graph: bool) -> dict[str, Any]:
    """How crops are prepared, and what can go wrong; of a graph that normalises itself, not the normalisation."""
    return {
        "height": size.height,
        "width": size.width,
        "preprocessing": size.describe(),
        "mistakes": [
            {
                "name": mistake.name,
                "mistake": mistake.description,
                "reason": "the file normalises its pixels itself" * (in_graph and mistake.name == "unnormalised")
                or mistake.problem,
            }
            for mistake in likely_mistakes(size)
        ],
    }


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    from pmm.artifacts.trained_model import read_model

    trained = read_model(path)
    return {
        "kind": "checkpoint",
        "sha256": sha256(path),
        "method": trained.method,
        "epoch": trained.epoch,
        "embedding_dim": trained.model.embedding_dim,
        "parameters_m": sum(p.numel() for p in trained.model.parameters()) / 1e6,
        "dataset": trained.data.name,
        "root": trained.data.root,
        "source": trained.source,
        **_preparation(trained.preprocessing, in_graph=False),
    }


def make_artifact(
    *,
    kind: str,
    precision: str,
    file_precision: Precision,
    device: str,
    flavor: str,
    batches: Sequence[int],
    source: str,
    folder: str,
    dataset: str,
    root: str,
) -> dict[str, Any]:
    """Path of the candidate's file, seconds of its export and build (None if it existed), and its MACs for one image.

    Args:
        kind: package, onnx or engine.
        file_precision: precision of the ONNX file, where `precision` is a way to run it.
        device: cpu, cuda or cuda:N.
        flavor: of an engine: tensorrt or rtx.
        batches: that will be timed; an engine gets an optimisation profile for each.
        source: path of the checkpoint or adopted ONNX file.
        folder: of the artifacts; their names begin with the source's hash.
        dataset, root: data set to verify on, and to calibrate on if that of the source is unknown or gone.

    Raises:
        UserError: as the exports do.
    """
    path, begin = Path(source), time.perf_counter()
    processor: Literal["cpu", "cuda"] = "cpu" if device == "cpu" else "cuda"
    stem = Path(folder) / sha256(path)[:12]
    before = {path: path.stat().st_mtime_ns for path in Path(folder).glob("*")}
    verification = VerifyOptions(verify_root=root, verify_dataset=dataset)
    if kind == "package":
        from pmm.export.aoti import export_aoti_cached

        artifact = export_aoti_cached(
            path,
            stem.with_name(f"{stem.name}-{processor}-{precision}{PACKAGE_SUFFIX}"),
            precision,
            device,
            verification,
        )
    else:
        target: Literal["tensorrt", "cpu"] = "tensorrt" if processor == "cuda" else "cpu"
        artifact = _onnx(path, stem, file_precision, target, verification)
        if kind == "engine":
            options = EngineOptions(
                batch=profiles_for(batches),
                device=device if nvidia_gpus() else "auto",
                flavor=flavor,  # type: ignore[arg-type]
                tf32=precision == "tf32",
            )
            bests = "_".join(str(profile.best) for profile in options.profiles.profiles)
            out = stem.with_name(f"{stem.name}-{flavor}-{precision}-{bests}-{options.profiles.most}.plan")
            artifact = build_engine_cached(read_onnx(artifact.path), out, options, path, verification)
    new = artifact.path != path and before.get(artifact.path) != artifact.path.stat().st_mtime_ns
    return {
        "path": str(artifact.path),
        "build_s": time.perf_counter() - begin if new else None,
        "macs": artifact.manifest.macs,
    }


def profiles_for(batches: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Least, best and most images of the optimisation profiles in which `batches` are timed, each in the one that it is
    the best of. All take smaller batches too, and the last those in which crops are embedded: accuracy uses them."""
    sizes = sorted(set(batches))
    return tuple((1, size, size if size != sizes[-1] else max(size, EMBED_BATCH)) for size in sizes)


def _onnx(
    source: Path, stem: Path, precision: Precision, target: Literal["tensorrt", "cpu"], verification: VerifyOptions
) -> Artifact:
    if precision == "fp32" and kind_of(source) == "onnx":
        return Artifact(source, read_onnx(source).manifest)
    recipe = ExportOptions(precision=precision)
    if precision == "int8":
        data = _calibration_data(source, verification)
        recipe = ExportOptions(
            precision=precision, target=target, calibration_root=data.root, calibration_dataset=data.name
        )
    return export_onnx_cached(source, stem.with_name(f"{stem.name}{recipe.suffix}.onnx"), recipe, verification)


def _calibration_data(source: Path, verification: VerifyOptions) -> DatasetLocation:
    """The data set to calibrate on, if the source's training set is unknown or no longer exists; else empty."""
    root = training_dataset(source).root
    known = root and Path(root).is_dir()
    return DatasetLocation("", "") if known else DatasetLocation(verification.verify_dataset, verification.verify_root)
