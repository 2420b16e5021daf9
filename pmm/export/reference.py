"""What an export is compared with: the fp32 torch checkpoint, or the ONNX file that was itself compared with it.

Loads torch only for a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.artifacts.onnx_file import OnnxFile
from pmm.artifacts.runs import with_resolved_data_root
from pmm.config import Config
from pmm.data.preprocessing import Crops, Preprocessing, preprocessing_of
from pmm.data.readers import DEFAULT_LAYOUT
from pmm.export.emulate_half import emulated, half_type
from pmm.export.options import VerifyOptions
from pmm.export.parity_check import Embed, ParityCheck, verification_crops
from pmm.runtime.base import Embeddings, in_runs
from pmm.runtime.ort_session import open_session
from pmm.runtime.trt_variant import gpu_for
from pmm.utils.errors import UserError

if TYPE_CHECKING:
    import onnx
    import torch


def checkpoint_gate(
    model: torch.nn.Module, config: Config, embedding: EmbeddingContract, verification: VerifyOptions
) -> ParityCheck | None:
    """The gate of a checkpoint's exports, or None if they are not to be verified.

    Raises UserError if there are no crops to verify on.
    """
    if verification.no_verify:
        return None

    from pmm.runtime.eager import EagerRunner, torch_device

    size = preprocessing_of(config)
    dataset = verification.verify_dataset or config.data.dataset
    crops = verification_crops(dataset, verification.verify_root or config.data.root, size)
    return ParityCheck.of(EagerRunner(model, size, torch_device("cpu")), crops, embedding)


def engine_gate(
    file: OnnxFile, checkpoint: Path | None, verification: VerifyOptions, flavor: str, device: str = "auto"
) -> ParityCheck | None:
    """The gate of an engine of `flavor` built from `file`: against `checkpoint`, or else the ONNX file on the CPU.

    None if the GPU that `device` names does not run such engines, or it is not to be verified.

    Raises:
        UserError: there is a GPU to run the engine on, but no crops to verify it with, or `file` itself was never
            verified.
    """
    if verification.verify_root and not Path(verification.verify_root).is_dir():
        raise UserError(f"--verify-root {verification.verify_root} is not a folder; expected the root of a data set")
    if verification.no_verify or not gpu_for(flavor, device):
        return None
    manifest = file.manifest
    if checkpoint:
        from pmm.artifacts.checkpoint import load, restore_model

        model, config = restore_model(load(checkpoint), checkpoint)
        return checkpoint_gate(model, with_resolved_data_root(config, checkpoint), manifest.embedding, verification)
    if manifest.parity is None:
        raise UserError(
            f"{file.path}: its own embeddings were never verified against the checkpoint (or its manifest was not "
            "copied along), so an engine cannot be verified against them; give the checkpoint, or --no-verify"
        )
    dataset = verification.verify_dataset or DEFAULT_LAYOUT
    crops = verification_crops(dataset, verification.verify_root, manifest.preprocessing)
    half = half_type(manifest)
    graph = emulated(file.proto) if half else file.proto
    expected = in_memory(graph, manifest.input, manifest.preprocessing, optimise=not half)(crops)
    return ParityCheck(crops, expected, f"the verified ONNX file's ({file.sha256[:12]})")


def in_memory(proto: onnx.ModelProto, contract: InputContract, size: Preprocessing, *, optimise: bool = True) -> Embed:
    """Crops [N, H, W, 3] -> embeddings [N, D] through ONNX Runtime on the CPU, for a graph without a file."""
    session = open_session(proto.SerializeToString(), optimise=optimise)

    def run(crops: Crops) -> Embeddings:
        return session.run(None, {contract.name: contract.feed(crops, size)})[0]

    return lambda crops: in_runs(run, crops, contract.batch)
