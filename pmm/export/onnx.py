"""Checkpoint -> ONNX file with its manifest, proved against the checkpoint on real crops before it gets its name."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pmm.config import Config
from pmm.data.crops import Crops, load_crops, preprocessing_of
from pmm.data.readers import read_dataset
from pmm.errors import UserError
from pmm.files import sha256
from pmm.manifest import Artifact, Manifest, drafted, read_manifest
from pmm.parity.numeric import NumericParity, numeric_parity
from pmm.runtime.ort import METADATA_KEY, OrtRunner

if TYPE_CHECKING:
    import onnx
    import torch

OPSET = 20
IR_VERSION = 10
VERIFY_CROPS = 64
MIN_COSINE = {"fp32": 0.99999}


def export_onnx(
    checkpoint: Path, out: Path, *, verify_dataset: str = "", verify_root: str = "", verify: bool = True
) -> Artifact:
    """Write the deployed graph of `checkpoint` to `out`, and its manifest beside it.

    Input `images` uint8 RGB [batch, H, W, 3] (normalisation is inside the graph), output `embeddings` float32
    [batch, D]; the batch is dynamic, batch-norm folded. The file gets its name only after it was checked and, unless
    `verify` is False, its embeddings of real crops equalled the checkpoint's.

    Args:
        verify_dataset, verify_root: data set to take the crops from (default: the one the checkpoint was trained on).

    Raises:
        UserError: a bad checkpoint, no crops to verify on, or embeddings that moved (then no file is left).
    """
    from pmm.checkpoint import load, restore_model
    from pmm.runtime.eager import EagerRunner, torch_device

    model, config = restore_model(load(checkpoint), checkpoint)
    crops = verification_crops(config, verify_dataset, verify_root) if verify else None
    proto = build_graph(model, config)
    manifest = Manifest(
        checkpoint_sha256=sha256(checkpoint),
        method=config.model.method,
        preprocessing=preprocessing_of(config),
        precision="fp32",
        precision_found=found_precision(proto),
        embedding_dim=int(model.embedding_dim),  # type: ignore[arg-type]
        opset=OPSET,
        versions=_versions(),
    )
    with drafted(out, manifest) as draft:
        _embed_manifest(proto, manifest)
        draft.path.write_bytes(proto.SerializeToString(deterministic=True))
        if crops is not None:
            reference = EagerRunner(model, preprocessing_of(config), torch_device("cpu"))
            with OrtRunner(draft.path) as candidate:
                parity = verify_runner(reference, candidate, crops, MIN_COSINE["fp32"], str(out))
            draft.manifest = dataclasses.replace(manifest, parity=dataclasses.asdict(parity))
    return Artifact(out, draft.manifest)


def verified_onnx(checkpoint: Path, out: Path, *, dataset: str = "", root: str = "") -> Artifact:
    """`out`, if it is whole, verified, and of this checkpoint; else exported anew as `export_onnx` does."""
    with contextlib.suppress(UserError):  # a damaged file is made anew
        manifest = read_manifest(out, sha256(out)) if out.is_file() else None
        if manifest and manifest.parity and manifest.checkpoint_sha256 == sha256(checkpoint):
            return Artifact(out, manifest)
    return export_onnx(checkpoint, out, verify_dataset=dataset, verify_root=root)


def describe(artifact: Artifact) -> str:
    """One line: file, precision, size, and how it compared with the checkpoint."""
    manifest, size = artifact.manifest, artifact.path.stat().st_size / 1e6
    line = f"{artifact.path}: {manifest.precision_found}, opset {manifest.opset}, {size:.1f} MB, "
    if manifest.parity is None:
        return line + "parity NOT verified (--no-verify)"
    rows, cosine, largest = (manifest.parity[key] for key in ("rows", "min_cosine", "max_abs"))
    return line + f"parity with the checkpoint on {rows} crops: min cosine {cosine:.7f}, max difference {largest:.1e}"


def build_graph(model: torch.nn.Module, config: Config) -> onnx.ModelProto:
    """The deployed graph of an eval-mode model, checked in full; the same model gives the same bytes."""
    import onnx
    import torch

    from pmm.export.fold import fold_batch_norms
    from pmm.models.registry import deployed
    from pmm.runtime.eager import Normalise

    folded = fold_batch_norms(deployed(copy.deepcopy(model).cpu().eval()))
    graph = torch.nn.Sequential(Normalise(preprocessing_of(config)), folded).eval()
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    # a batch of 2: torch.export would take a batch of 1 for a constant
    example = torch.zeros(2, config.data.height, config.data.width, 3, dtype=torch.uint8)
    with _quiet():
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    proto = program.model_proto
    proto.ir_version = IR_VERSION
    _strip_traces(proto)
    onnx.checker.check_model(proto, full_check=True)
    _check_interface(proto, config)
    return proto


def found_precision(proto: onnx.ModelProto) -> str:
    """The precision of all convolution and matrix weights, read from the file. Raises UserError if they differ."""
    import onnx

    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    products = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    found = {names.get(types.get(node.input[1], 0), "unknown") for node in products}
    if len(found) != 1:
        raise UserError(f"the exported graph mixes precisions: {', '.join(sorted(found)) or 'none found'}")
    return found.pop()


def verification_crops(config: Config, dataset: str = "", root: str = "") -> Crops:
    """Real test crops [N, H, W, 3], evenly over query and gallery of `root` or of the data set trained on."""
    dataset, root = dataset or config.data.dataset, root or config.data.root
    try:
        split = read_dataset(dataset, root)
    except UserError as error:
        raise UserError(f"no crops to verify on ({error}); give --verify-root DIR, or --no-verify") from error
    samples = (*split.query, *split.gallery)
    chosen = np.linspace(0, len(samples) - 1, min(VERIFY_CROPS, len(samples))).astype(int)
    return load_crops([samples[index].path for index in chosen], config.data.height, config.data.width)


def verify_runner(reference: Any, candidate: Any, crops: Crops, min_cosine: float, name: str) -> NumericParity:
    """Compare two runners on crops [N, H, W, 3] in batches of 1, 3 and N - 4 (ragged).

    Raises UserError if a row's cosine is below `min_cosine`, or depends on the batch it is in.
    """
    bounds = [0, 1, 4, len(crops)] if len(crops) > 4 else [0, len(crops)]
    rows = np.concatenate([candidate(crops[a:b]) for a, b in pairwise(bounds)])
    parity = numeric_parity(reference(crops), rows)
    together = numeric_parity(rows, candidate(crops))
    for figures, against in ((parity, "the torch checkpoint's"), (together, "the same row's in another batch")):
        if figures.min_cosine < min_cosine:
            raise UserError(
                f"{name}: parity failed: row {figures.worst_row} has cosine {figures.min_cosine:.7f} with {against}, "
                f"the least allowed is {min_cosine}; no file was left"
            )
    return parity


def _check_interface(proto: onnx.ModelProto, config: Config) -> None:
    dims = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in (*proto.graph.input, *proto.graph.output)}  # fmt: skip
    images, embeddings = dims.get("images", []), dims.get("embeddings", [])
    if images[1:] != [config.data.height, config.data.width, 3] or len(embeddings) != 2:
        raise RuntimeError(f"unexpected interface of the exported graph: {dims}")
    if not isinstance(images[0], str) or images[0] != embeddings[0]:
        raise RuntimeError(f"the exported batch dimension is not symbolic: {dims}")


def _strip_traces(proto: onnx.ModelProto) -> None:
    """Remove what torch.onnx records of this machine (stack traces hold absolute paths)."""
    del proto.metadata_props[:]
    for holder in (proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer,
                   *proto.graph.value_info):  # fmt: skip
        del holder.metadata_props[:]
    for node in proto.graph.node:
        node.doc_string = ""
    proto.doc_string = proto.graph.doc_string = ""


def _embed_manifest(proto: onnx.ModelProto, manifest: Manifest) -> None:
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, manifest.to_json()


def _versions() -> dict[str, str]:
    import onnx
    import onnxscript

    from pmm.checkpoint import versions

    return {**versions(), "onnx": onnx.__version__, "onnxscript": onnxscript.__version__}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter narrates its steps on stdout and warns of its own internals; its errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
