"""The embeddings to compare an export with: the fp32 torch checkpoint's, an adopted ONNX file's, or those of an ONNX
file that was itself compared with one of them.

Loads torch only for a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pmm.artifacts.dataset_location import DatasetLocation, resolve_data_root
from pmm.artifacts.kinds import kind_of
from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.artifacts.onnx_file import OnnxFile, read_onnx
from pmm.data.preprocessing import Crops, Preprocessing
from pmm.data.readers import DEFAULT_DATASET
from pmm.export.half_precision import emulated, half_type
from pmm.export.options import VerifyOptions
from pmm.export.parity_check import Embed, ParityCheck, verification_crops
from pmm.runtime.base import Embeddings, run_in_batches
from pmm.runtime.ort_session import open_session
from pmm.runtime.trt_variant import gpu_for
from pmm.utils.errors import InvalidFile

if TYPE_CHECKING:
    import onnx

    from pmm.artifacts.trained_model import TrainedModel


def checkpoint_parity_check(
    trained: TrainedModel, embedding: EmbeddingContract, verification: VerifyOptions
) -> ParityCheck | None:
    """The parity check of a checkpoint's exports, or None if they are not to be verified.

    Raises InvalidFile if there are no crops to verify on.
    """
    if verification.no_verify:
        return None

    from pmm.runtime.eager import EagerRunner, torch_device

    size, data = trained.preprocessing, trained.data
    dataset = verification.verify_dataset or data.name or DEFAULT_DATASET
    crops = verification_crops(dataset, verification.verify_root or data.root, size)
    return ParityCheck.of(EagerRunner(trained.model, size, torch_device("cpu")), crops, embedding)


def onnx_parity_check(
    file: OnnxFile, data: DatasetLocation, verification: VerifyOptions, name: str = ""
) -> ParityCheck | None:
    """The parity check against the embeddings that an ONNX file has in ONNX Runtime on the CPU, or None if there is to
    be none.

    Args:
        data: the data set to take crops of where `verification` names none.
        name: whose embeddings those are, for messages.

    Raises InvalidFile if there are no crops.
    """
    if verification.no_verify:
        return None
    manifest = file.manifest
    dataset = verification.verify_dataset or data.name or DEFAULT_DATASET
    crops = verification_crops(dataset, verification.verify_root or data.root, manifest.preprocessing)
    half = "" if manifest.is_adopted_itself else half_type(manifest)
    graph = emulated(file.proto) if half else file.proto
    expected = in_memory(graph, manifest.input, manifest.preprocessing, optimise=not half)(crops)
    return ParityCheck(crops, expected, name or f"the adopted ONNX file's ({file.sha256[:12]})")


def engine_parity_check(
    file: OnnxFile, source: Path | None, verification: VerifyOptions, flavor: str, device: str = "auto"
) -> ParityCheck | None:
    """The parity check of an engine of `flavor` built from `file`: against its `source`, a checkpoint or an adopted
    ONNX file, or else against `file` on the CPU.

    None if the GPU that `device` names does not run such engines, or it is not to be verified.

    Raises:
        InvalidFile: there is a GPU to run the engine on, but no crops to verify it with, or `file` itself was never
            verified.
    """
    if verification.verify_root and not Path(verification.verify_root).is_dir():
        hint = "give another --verify-root DIR"
        raise InvalidFile("not a folder", path=verification.verify_root, expected="a data set's root", hint=hint)
    if verification.no_verify or not gpu_for(flavor, device):
        return None
    manifest, origin = file.manifest, file.manifest.adopted
    data = (
        DatasetLocation(origin.dataset, resolve_data_root(origin.root, file.path))
        if origin
        else DatasetLocation("", "")
    )
    if source and kind_of(source) == "onnx":
        return onnx_parity_check(read_onnx(source), data, verification)
    if source:
        from pmm.artifacts.trained_model import read_model

        return checkpoint_parity_check(read_model(source), manifest.embedding, verification)
    if manifest.is_adopted_itself:
        return onnx_parity_check(file, data, verification)
    if manifest.parity is None:
        problem = f"its embeddings were not verified against {manifest.source_name}, or its manifest is not beside it"
        hint = f"build the engine from {manifest.source_name}, or with --no-verify"
        raise InvalidFile(problem, path=file.path, expected="a verified file to compare the engine with", hint=hint)
    return onnx_parity_check(file, data, verification, f"the verified ONNX file's ({file.sha256[:12]})")


def changed_meanwhile(checkpoint: Path) -> InvalidFile:
    """The error for a checkpoint that another process wrote while it was exported."""
    return InvalidFile("it changed during the export: is it still being trained?", path=checkpoint, hint="export again")


def in_memory(
    proto: onnx.ModelProto,
    contract: InputContract,
    size: Preprocessing,
    *,
    optimise: bool = True,
    float_biases: bool = False,
) -> Embed:
    """Crops [N, H, W, 3] -> embeddings [N, D] through ONNX Runtime on the CPU, for a graph without a file; the options
    are those of `open_session`."""
    session = open_session(proto.SerializeToString(), optimise=optimise, float_biases=float_biases)

    def run(crops: Crops) -> Embeddings:
        return session.run(None, {contract.name: contract.feed(crops, size)})[0]

    return lambda crops: run_in_batches(run, crops, contract.batch)
