"""Checkpoint -> AOTInductor package (.pt2) with its manifest, proved against the checkpoint on real crops.

torch compiles the deployed graph ahead of time, for one kind of processor; what runs it needs torch, but no compiler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pmm.artifacts.artifact import Artifact, ArtifactDraft, new_artifact
from pmm.artifacts.kinds import KIND_NAMES, PACKAGE_SUFFIX, kind_of
from pmm.artifacts.manifest import METADATA_KEY, EmbeddingContract, InputContract, Manifest
from pmm.artifacts.native_contracts import PackageContract
from pmm.artifacts.native_file import read_native
from pmm.export.cached import reusable
from pmm.export.options import Precision, VerifyOptions
from pmm.export.parity_check import ParityCheck
from pmm.export.precision import GraphPrecision, tally
from pmm.export.reference import changed_meanwhile, checkpoint_parity_check
from pmm.export.selftest import add_selftest, checkpoint_vectors
from pmm.utils.errors import InvalidFile, InvalidValue
from pmm.utils.files import output_file, sha256

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from pmm.artifacts.trained_model import TrainedModel

PackagePrecision = Literal["fp32", "tf32", "fp16", "bf16"]

_OPTIONS = {
    # as many threads as the runner sets, not as many as there were at the export
    "cpp.dynamic_threads": True,
    # a third of the file, and the names of this machine's folders
    "aot_inductor.enable_line_tables": False,
}


def export_aoti(
    checkpoint: Path, out: Path, precision: str = "fp32", device: str = "cpu", verification: VerifyOptions | None = None
) -> Artifact:
    """Compile the deployed graph of `checkpoint` into `out`, and write its manifest beside it.

    The batch is dynamic, batch-norm folded. The file gets its name only after its precision was read back from the
    exported graph and, unless `verification` switches it off, its embeddings of real crops equalled the fp32
    checkpoint's.

    Args:
        precision: fp32, tf32 (on a GPU), fp16 or bf16.
        device: cpu, cuda or cuda:N: where it will run, on a machine like this one.

    Raises:
        InvalidValue: another precision.
        InvalidFile: a bad checkpoint, or no crops to verify on.
        ParityFailed: the embeddings moved; no file is left.
        UserError: torch cannot compile the graph.
        BackendUnavailable: no C++ compiler, no GPU, or none with TF32.
    """
    verification = verification or VerifyOptions()
    output_file(out, checkpoint, suffixes=(PACKAGE_SUFFIX,))
    _check(checkpoint, precision)

    from pmm.artifacts.trained_model import read_model
    from pmm.runtime.eager import torch_device
    from pmm.runtime.torch_runner import check_modes, tf32_allowed

    target = torch_device(device)
    check_modes(target, tf32=precision == "tf32")
    digest = sha256(checkpoint)
    trained = read_model(checkpoint)
    parity_check = checkpoint_parity_check(trained, EmbeddingContract.of(trained.model), verification)
    program = _program(trained, precision, target)
    manifest = _manifest(trained, digest, precision, _measured(program, precision, out), target)
    with new_artifact(out, manifest) as draft:
        with tf32_allowed(precision == "tf32"):
            _build(program, manifest, draft.path)
        if sha256(checkpoint) != digest:
            raise changed_meanwhile(checkpoint)
        _prove(draft, trained, parity_check, device)
    return Artifact(out, draft.manifest)


def export_aoti_cached(
    checkpoint: Path, out: Path, precision: str = "fp32", device: str = "cpu", verification: VerifyOptions | None = None
) -> Artifact:
    """`out` if it is what `export_aoti` would make here (`pmm.export.cached.reusable`), else a new export."""
    from pmm.artifacts.checkpoint import versions
    from pmm.runtime.aoti import this_machine
    from pmm.runtime.eager import torch_device

    target, verification = torch_device(device), verification or VerifyOptions()

    def is_same(manifest: Manifest) -> bool:
        here = manifest.package == this_machine(target) and manifest.precision == precision
        return here and manifest.made_from(sha256(checkpoint), versions())

    def read(path: Path) -> Manifest:
        return read_native(path, PackageContract).manifest

    cached = reusable(out, is_same, verified=not verification.no_verify, read=read)
    return cached or export_aoti(checkpoint, out, precision, device, verification)


def describe_package(artifact: Artifact) -> str:
    """One line: device, precision, size, and how it compared with the checkpoint."""
    manifest, package = artifact.manifest, artifact.manifest.package
    assert package is not None
    shares = ", ".join(f"{share:.2%} {name}" for name, share in manifest.precision_share.items())
    line = (
        f"{artifact.path}: {manifest.precision_found} ({shares} of {manifest.macs / 1e9:.2f} GMAC), torch "
        f"{package.torch} AOTInductor for {package.gpu or 'this kind of CPU'}, "
        f"{artifact.path.stat().st_size / 1e6:.1f} MB, "
    )
    if manifest.parity is None:
        return line + "parity NOT verified (--no-verify)"
    return line + f"parity on {manifest.parity['rows']} crops: min cosine {manifest.parity['min_cosine']:.7f}"


def exported_precision(program: ExportedProgram) -> GraphPrecision:
    """Count the convolutions and matrix products of an exported graph for one image, each of the type of its weights
    or, where both factors are computed, of the second one.

    Raises ValueError for a product that cannot be counted.
    """
    import torch

    from pmm.models.graph_macs import product_macs, product_type

    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    macs = {node: product_macs(node) for node in program.graph.nodes}
    return tally((names.get(kind := product_type(node), str(kind)), count) for node, count in macs.items() if count)


def _check(checkpoint: Path, precision: str) -> None:
    """Raises InvalidValue for another precision, InvalidFile for an ONNX file."""
    if precision not in get_args(PackagePrecision):
        raise InvalidValue("precision", precision, choices=get_args(PackagePrecision))
    if kind_of(checkpoint, "checkpoint") == "onnx":
        expected = "a checkpoint written by pmm train or pmm adopt (.pth)"
        hint = "adopt the nn.Module that it was made from, or build an engine of it (pmm export trt)"
        raise InvalidFile(f"it is {KIND_NAMES['onnx']}", path=checkpoint, expected=expected, hint=hint)


def _stored(precision: str) -> Precision:
    """The precision of the graph: for TF32 it is the same as for fp32, and the runner lets its products run in TF32."""
    return "fp32" if precision == "tf32" else precision  # type: ignore[return-value]


def _program(trained: TrainedModel, precision: str, target: torch.device) -> ExportedProgram:
    """The deployed graph on `target`, traced with a dynamic batch."""
    import torch

    from pmm.runtime.deployed_graph import deployed_graph

    size, contract = trained.preprocessing, InputContract()
    graph = deployed_graph(trained.model, size, contract, EmbeddingContract.of(trained.model), _stored(precision))
    graph.to(device=target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _traced(graph, torch.zeros(2, *contract.shape(size), dtype=torch.uint8, device=target))


def _traced(graph: torch.nn.Module, example: torch.Tensor) -> ExportedProgram:
    """`graph` with a dynamic batch; `example` has two images: of one, torch.export would make a constant."""
    import torch

    from pmm.runtime.torch_graph import quiet

    with quiet(), torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _measured(program: ExportedProgram, precision: str, out: Path) -> GraphPrecision:
    """The precision that `program` computes in, read back. Raises InvalidFile, of `out`, if it is another."""
    measured = exported_precision(program)
    measured.check(_stored(precision), out)
    return GraphPrecision({"tf32": measured.total}) if precision == "tf32" else measured


def _manifest(
    trained: TrainedModel, digest: str, precision: str, measured: GraphPrecision, target: torch.device
) -> Manifest:
    from pmm.artifacts.checkpoint import versions
    from pmm.runtime.aoti import this_machine

    return Manifest(
        checkpoint_sha256=digest,
        method=trained.method,
        preprocessing=trained.preprocessing,
        input=InputContract(),
        embedding=EmbeddingContract.of(trained.model),
        precision=precision,
        precision_found=measured.precision,
        precision_share=measured.share,
        macs=measured.total,
        opset=0,
        package=this_machine(target),
        versions={**versions(), "pmm kernels in training": trained.kernels},
        crop_statistics=trained.crop_statistics,
    )


def _prove(draft: ArtifactDraft, trained: TrainedModel, parity_check: ParityCheck | None, device: str) -> None:
    """Give the draft, which is written, its parity figures and its selftest. Raises ParityFailed."""
    from pmm.runtime.aoti import AotiRunner

    manifest = draft.manifest
    with draft.openable(), AotiRunner(draft.path, device, warn=False) as runner:
        if parity_check:
            parity = parity_check.check(runner, manifest.precision, str(draft.out), runner.info.provider)
            draft.manifest = dataclasses.replace(manifest, parity=parity)
        vectors = checkpoint_vectors(
            trained, manifest.checkpoint_sha256, manifest.preprocessing, manifest.input, manifest.embedding
        )
        add_selftest(draft, vectors, runner)


def _build(program: ExportedProgram, manifest: Manifest, out: Path) -> None:
    """Compile `program` to the file `out`, with a copy of `manifest` inside. Raises UserError."""
    import torch
    from torch._inductor.utils import fresh_cache

    from pmm.runtime.torch_graph import build_failed, quiet

    options = {name: value for name, value in _OPTIONS.items() if name in torch._inductor.list_options()}
    metadata = {METADATA_KEY: manifest.to_json()}
    with tempfile.TemporaryDirectory() as folder:
        # under its final name: the package repeats that of its file inside
        built = Path(folder) / f"model{PACKAGE_SUFFIX}"
        try:
            with quiet():
                _detect_instructions()
            with quiet(), fresh_cache(dir=folder):
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(built), inductor_configs={**options, "aot_inductor.metadata": metadata}
                )
        except RuntimeError as error:
            raise build_failed("AOTInductor", error) from error
        shutil.copyfile(built, out)


def _detect_instructions() -> None:
    """Torch tests by building which vector instructions the CPU and its compiler have. Do it now, with the lasting
    cache: the one of an export is emptied."""
    with contextlib.suppress(ImportError):  # a private name of torch
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list

        valid_vec_isa_list()
