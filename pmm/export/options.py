"""What an export is asked for. Loads no torch: command lines are checked before it is imported."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from pmm.artifacts.manifest import BatchProfile, BatchProfiles, HardwareCompatibility, InputContract
from pmm.utils.errors import UserError
from pmm.utils.hardware import cuda_index

Precision = Literal["fp32", "fp16", "bf16", "int8"]

OPSET = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20}
OPSETS = (17, 22)
"""The oldest and the newest that a file can be written in."""
LEAST_OPSET = {"fp32": 17, "fp16": 17, "bf16": 22, "int8": 17, "int8-fp16": 19}
"""By onnx.defs: convolutions and pooling take bf16 from 22 on, QuantizeLinear and DequantizeLinear fp16 from 19 on."""

MIN_COSINE = {"fp32": 0.99999, "tf32": 0.9999, "fp16": 0.9999, "bf16": 0.999, "int8": 0.98}
"""Least cosine of the worst row with the fp32 checkpoint's, for an export to get its name; TF32 rounds as fp16 does."""

MAX_LENGTH_ERROR = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2, "int8": 0.1}
"""Largest relative difference of a row's length: distances are Euclidean. About ten times a trained model's."""

LEAST_CALIBRATION_CROPS = 32
LEAST_VERIFICATION_CROPS = 16

MIN_SHARE = {"fp32": 1.0, "fp16": 0.99, "bf16": 0.99, "int8": 0.5}
"""Least share of the multiply-accumulates in the precision asked for; int8 may keep sensitive layers in fp32."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The deployed graph: its precision, and what goes in and comes out."""

    precision: Precision = "fp32"
    """Of the trunk; the heads, the normalisation, the input and the output are fp32 (or uint8) in every file."""
    target: Literal["tensorrt", "cpu"] = "tensorrt"
    """Where an int8 file will run: TensorRT and CPUs want different ones."""
    calibration_root: str = ""
    """For int8: a data set, whose training part is used, or one folder of crops (default: the data trained on)."""
    calibration_images: int = 512
    """For int8: how many crops to calibrate on."""
    int8_fallback: Literal["fp16", "fp32"] = "fp32"
    """For int8 on TensorRT: the type of all that is not in 8 bits, but for the heads, which stay in fp32."""
    input: Literal["uint8", "float"] = "uint8"
    """uint8 NHWC, normalised inside the graph, or float32 NCHW, normalised by the caller as the torch model's input."""
    input_colour: Literal["rgb", "bgr"] = "rgb"
    """Order of the input's channels."""
    normalize: bool = False
    """Embeddings of length 1, to compare by cosine; those of a checkpoint with metric cosine always have it."""
    flip_tta: bool = False
    """The mean of the embeddings of the crop and its mirror image; twice the work."""
    static_batch: int | None = None
    """Write a file that takes this many images per run and no other number, for converters and runtimes that want all
    sizes known (default: any number)."""
    opset: int | None = None
    """ONNX operator set, 17 to 22; older ones for older readers (default: 20, and 22 for bf16)."""

    def __post_init__(self) -> None:
        plain = ExportOptions.__dataclass_fields__
        if self.precision != "int8":
            for name in ("target", "calibration_root", "calibration_images", "int8_fallback"):
                if getattr(self, name) != plain[name].default:
                    flag = "--" + name.replace("_", "-")
                    raise UserError(f"{flag} is for --precision int8 only, and the precision is {self.precision}")
        if self.calibration_images < LEAST_CALIBRATION_CROPS:
            raise UserError(
                f"--calibration-images is {self.calibration_images}; at least {LEAST_CALIBRATION_CROPS} are needed"
            )

        if self.int8_fallback == "fp16" and self.target == "cpu":
            raise UserError("--int8-fallback fp16 is for TensorRT, and --target is cpu: ONNX Runtime has no fp16 there")
        if self.opset is not None and not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise UserError(f"--opset is {self.opset}; expected {OPSETS[0]} to {OPSETS[1]}")
        kind = "int8-fp16" if self.int8_fallback == "fp16" else self.precision
        if self.onnx_opset < LEAST_OPSET[kind]:
            what = "--int8-fallback fp16" if kind == "int8-fp16" else f"--precision {kind}"
            raise UserError(f"--opset is {self.opset}, and {what} needs at least {LEAST_OPSET[kind]}")
        try:
            _ = self.contract
        except UserError as error:
            raise UserError(f"--static-batch: {error}") from None

    @property
    def onnx_opset(self) -> int:
        """The operator set of the file."""
        return OPSET[self.precision] if self.opset is None else self.opset

    @property
    def contract(self) -> InputContract:
        """What the file takes."""
        return InputContract.of(self.input, self.input_colour, self.static_batch)

    @property
    def suffix(self) -> str:
        """For file names: -fp16, -int8-cpu, -int8-fp16, ...; nothing for fp32."""
        target = "-cpu" if self.target == "cpu" else ""
        fallback = "-fp16" if self.int8_fallback == "fp16" else ""
        return "" if self.precision == "fp32" else f"-{self.precision}{target}{fallback}"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What the embeddings are proved on."""

    verify_root: str = ""
    """Data set whose test crops the parity check uses (default: the one trained on)."""
    verify_dataset: str = ""
    """Layout of --verify-root (default: that of the data set trained on; market1501 for an ONNX file)."""
    no_verify: bool = False
    """Export without the parity check; the manifest says so, and runners warn."""

    def __post_init__(self) -> None:
        if self.no_verify and (self.verify_root or self.verify_dataset):
            raise UserError("--no-verify compares nothing, so --verify-root and --verify-dataset do not go with it")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is built."""

    batch: tyro.conf.UseAppendAction[tuple[tuple[int, int, int], ...]] = ()
    """Least, best and most images per call that the engine is built for (default: 1 8 64). Repeated, as --batch 1 1 1
    --batch 1 8 64, each is an optimisation profile with kernels of its own."""
    flavor: Literal["auto", "tensorrt", "rtx"] = "auto"
    """Builder: tensorrt (needs a GPU), rtx (TensorRT-RTX, builds anywhere), or auto (tensorrt where it can)."""
    device: str = "auto"
    """GPU to build for, and to prove the engine on: cuda or cuda:N (default: the first, where one is)."""
    workspace: float | None = None
    """Most GPU memory, in GiB, that a kernel may use for scratch (default: all of it)."""
    opt_level: int | None = None
    """How hard the builder tries, 0 to 5 (default: the builder's own)."""
    timing_cache: Path | None = None
    """File (.cache) of measured kernel times, read if there and written after the build; makes later builds faster."""
    tf32: bool = False
    """Let fp32 convolutions and matrix products run in TF32: faster, with 10 bits of mantissa."""
    hardware_compatibility: HardwareCompatibility = "none"
    """What a TensorRT engine runs on, at some cost: the GPU it was built on (and, with a warning, others of its compute
    capability), any of its compute capability, or any from Ampere on. TensorRT-RTX engines are for all that it knows.
    """
    verbose: bool = False
    """Print the builder's whole log as it comes; in any case it is written beside the engine, as best.plan.log."""

    def __post_init__(self) -> None:
        _ = self.profiles
        if self.device == "cpu":
            raise UserError("--device cpu: an engine is for a GPU; to build one without a GPU, leave the flag out")
        cuda_index(self.device)
        if self.workspace is not None and not 0 < self.workspace < 1024:
            raise UserError(f"--workspace is {self.workspace}; expected GiB, above 0")
        if self.timing_cache is not None and self.timing_cache.suffix != ".cache":
            raise UserError(f"--timing-cache is {self.timing_cache}; it is written to: give it a name ending in .cache")
        if self.opt_level is not None and not 0 <= self.opt_level <= 5:
            raise UserError(f"--opt-level is {self.opt_level}; expected 0 to 5")

    @property
    def profiles(self) -> BatchProfiles:
        """`batch` by name, in order of size. Raises UserError if one is impossible, or two are for the same."""
        try:
            named = [BatchProfile(least=least, best=best, most=most) for least, best, most in self.batch]
            in_order = tuple(sorted(named, key=lambda profile: (profile.best, profile.most, profile.least)))
            return BatchProfiles(in_order) if in_order else BatchProfiles()
        except UserError as error:
            raise UserError(f"--batch: {error}") from error


def check_request(
    checkpoint: bool, recipe: ExportOptions, given: AbstractSet[str], *, profile_layers: bool, no_manifest: bool
) -> None:
    """Raises UserError for flags of `pmm export trt` that do not go together: what is decided in the ONNX file cannot
    be asked of the engine, and what is unknown cannot be asked at all.

    Args:
        checkpoint: the model is one, and no ONNX file.
        given: flags of the command line, as --precision.
    """
    if checkpoint and no_manifest:
        raise UserError("--no-manifest is for ONNX files that are not ours; a checkpoint's always get one")
    if profile_layers and no_manifest:
        raise UserError("--profile-layers opens the engine, and no runner here opens one of --no-manifest")
    if recipe.target == "cpu":
        raise UserError("--target cpu is for ONNX Runtime; TensorRT wants the other file: leave the flag out")
    flags = {"--" + each.name.replace("_", "-") for each in fields(ExportOptions)}
    decided = sorted((flags if no_manifest else flags - {"--precision"}) & given)
    if decided and not checkpoint:
        raise UserError(f"{', '.join(decided)}: decided in the ONNX file; give a checkpoint, or export the file anew")


def check_kept(file: Path, holds: str, asked: str) -> None:
    """Raises UserError if an ONNX file `holds` another precision than is `asked` of the engine."""
    if holds != asked:
        raise UserError(
            f"{file} holds {holds}, asked for {asked}: an engine keeps the file's types; export the ONNX file with "
            f"--precision {asked}"
        )
