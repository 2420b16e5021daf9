"""ONNX file -> engine, with TensorRT or TensorRT-RTX: one Python API, the module is a parameter ("flavor")."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmm.errors import UserError
from pmm.files import existing_file
from pmm.machine import nvidia_gpus
from pmm.manifest import Artifact, Manifest, drafted, read_manifest

FLAVORS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}


@dataclass(frozen=True, kw_only=True)
class BatchProfile:
    """The batch sizes an engine is built for."""

    least: int = 1
    best: int = 8
    most: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most:
            raise UserError(
                f"batch profile {self.least} {self.best} {self.most}: expected 1 <= least <= best <= most, as 1 8 64"
            )


def choose_flavor(onnx_file: Path) -> tuple[str, Any]:
    """The builder to use and its module: TensorRT where it and a GPU are there, else TensorRT-RTX.

    Raises UserError saying what to install if there is none.
    """
    order = ("tensorrt", "rtx") if nvidia_gpus() else ("rtx",)
    for flavor in order:
        try:
            return flavor, importlib.import_module(FLAVORS[flavor])
        except ImportError:
            continue
    raise UserError(
        "no engine builder here: pip install tensorrt-rtx (builds on any machine), or tensorrt on a machine with an "
        f"NVIDIA GPU; the ONNX file is {onnx_file}"
    )


def build_engine(onnx_file: Path, out: Path, profile: BatchProfile | None = None) -> Artifact:
    """Build an engine from an exported ONNX file, in the precision that the file holds, and write its manifest.

    Raises UserError if there is no builder, the file has no manifest, or the parser or the builder refuses it.
    """
    profile = profile or BatchProfile()
    flavor, trt = choose_flavor(onnx_file)
    content = existing_file(onnx_file, "an ONNX file").read_bytes()
    source = read_manifest(onnx_file, hashlib.sha256(content).hexdigest())
    if source is None:
        raise UserError(f"{onnx_file}: no manifest beside it; export it with export/to_onnx.py")

    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise UserError(f"{onnx_file}: {flavor} {trt.__version__} does not parse it ({reasons[:300]})")
    found = _network_precision(trt, network)
    if found != source.precision_found:
        raise UserError(f"{onnx_file}: holds {source.precision_found}, but {flavor} read {found or 'nothing'} from it")
    config = builder.create_builder_config()
    size = source.preprocessing
    batches = builder.create_optimization_profile()
    shapes = [(batch, size.height, size.width, 3) for batch in (profile.least, profile.best, profile.most)]
    batches.set_shape("images", *shapes)
    if config.add_optimization_profile(batches) < 0:
        raise UserError(f"{onnx_file}: {flavor} refuses the batch profile {shapes}")
    # TF32 is on by default in TensorRT; an fp32 engine must be fp32
    config.clear_flag(trt.BuilderFlag.TF32)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"{onnx_file}: {flavor} {trt.__version__} built no engine ({logger.last or 'no reason given'})")
    with drafted(out, _manifest(source, found, flavor, str(trt.__version__), profile)) as draft:
        draft.path.write_bytes(bytes(engine))
    return Artifact(out, draft.manifest)


def _network_precision(trt: Any, network: Any) -> str:
    """The type of the parsed network's convolutions and matrix products, which a strongly typed build keeps."""
    names = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}
    products = (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return "+".join(sorted({names.get(x.get_output(0).dtype, "other") for x in layers if x.type in products}))


def _manifest(source: Manifest, found: str, flavor: str, version: str, profile: BatchProfile) -> Manifest:
    gpus = nvidia_gpus()
    engine = {
        "flavor": flavor,
        "version": version,
        "onnx_sha256": source.sha256,
        "precision_read_from": "parsed network",
        "built_on": gpus[0] if gpus else "cpu",
        "batch": dataclasses.asdict(profile),
    }
    # the parity figures are the ONNX file's; an engine's own are measured where it runs
    versions = {**source.versions, FLAVORS[flavor]: version}
    return dataclasses.replace(source, precision_found=found, parity=None, engine=engine, versions=versions)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps the last error; the builder's progress notes are not for the user."""

        last = ""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last = message.strip().splitlines()[0]

    return Logger()
