"""The options of exports, checked. Loads no torch: command lines are checked before it is imported."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pmm.artifacts.batch_profiles import MAX_IMAGES, BatchProfile, BatchProfiles
from pmm.artifacts.manifest import InputContract, InputKind
from pmm.artifacts.native_contracts import HardwareCompatibility
from pmm.data.preprocessing import MAX_OF_UNIT, Colours, Preprocessing
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue
from pmm.utils.hardware import cuda_index

Precision = Literal["fp32", "fp16", "bf16", "int8"]

OPSET = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20}
OPSETS = (17, 22)
"""The oldest and the newest that a file can be written in."""
MIN_OPSET = {"fp32": 17, "fp16": 17, "bf16": 22, "int8": 17, "int8-fp16": 19}
"""By onnx.defs: convolutions and pooling take bf16 from 22 on, QuantizeLinear and DequantizeLinear fp16 from 19 on."""

MIN_COSINE = {"fp32": 0.99999, "tf32": 0.9999, "fp16": 0.9999, "bf16": 0.999, "int8": 0.98}
"""Least cosine of the worst row with the fp32 checkpoint's, for an export to get its name; TF32 rounds as fp16 does."""

MAX_NORM_ERROR = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2, "int8": 0.1}
"""Largest relative difference of a row's length: distances are Euclidean. About ten times a trained model's."""

MIN_CALIBRATION_CROPS = 32
MIN_VERIFICATION_CROPS = 16

MIN_SHARE_WITH_KEPT = 0.5
MIN_SHARE = {"fp32": 1.0, "fp16": 0.99, "bf16": 0.99, "int8": MIN_SHARE_WITH_KEPT}
"""Least share of the multiply-accumulates in the file's precision, with and without layers that were kept in fp32
because their rounding costs most."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The deployed graph: its precision, and what goes in and comes out."""

    precision: Precision = "fp32"
    """Precision of the backbone. The heads, the normalisation, the output and a float input are fp32 in every file, and
    so are layers of adopted networks that fp16 or bf16 would harm too much."""
    target: Literal["tensorrt", "cpu", "opencv"] = "tensorrt"
    """For int8: where the file will run: tensorrt, cpu (ONNX Runtime, OpenVINO, OpenCV from 4.10 on), or opencv (from
    4.6 on; also ONNX Runtime, but not OpenVINO)."""
    calibration_root: Annotated[str, Arg("DIR")] = ""
    """For int8: folder of a data set, whose training split is used, or of crops (default: the data set that the
    checkpoint was trained on)."""
    calibration_dataset: Annotated[str, Arg("NAME")] = ""
    """For int8: data set in --calibration-root (default: the one that the checkpoint was trained on; market1501 if that
    is unknown)."""
    calibration_images: int = 512
    """For int8: number of crops to calibrate on."""
    int8_fallback: Literal["fp16", "fp32"] = "fp32"
    """For int8 on TensorRT: precision of the layers that are not in int8; the heads are always in fp32."""
    input: InputKind = "uint8"
    """What the file takes: uint8 (NHWC, normalised in the graph), float (float32 NCHW, normalised by the caller as for
    the torch model), or float255 (float32 NCHW, pixels of 0 to 255, normalised in the graph)."""
    input_mean: Annotated[Colours | None, Arg("R G B")] = None
    """For --input float: mean by which the caller normalises pixels of 0..1 (default: the model's)."""
    input_std: Annotated[Colours | None, Arg("R G B")] = None
    """For --input float: standard deviation by which the caller normalises pixels of 0..1 (default: the model's)."""
    input_colour: Literal["rgb", "bgr"] = "rgb"
    """Order of the input's colour channels."""
    normalize: bool = False
    """Normalise embeddings to norm 1, to compare by cosine; a checkpoint with metric cosine always does."""
    flip_tta: bool = False
    """Output the mean of the embeddings of the crop and of its mirror image: twice the work."""
    static_batch: int | None = None
    """Number of images per call, fixed for converters and runtimes that need all sizes (default: any number)."""
    opset: int | None = None
    """ONNX operator set, 17 to 22; older runtimes need older ones (default: 20, and 22 for bf16)."""

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.precision != "int8":
            for name in ("target", "calibration_root", "calibration_dataset", "calibration_images", "int8_fallback"):
                if getattr(self, name) != ExportOptions.__dataclass_fields__[name].default:
                    problem = f"{flag_of(name)} is for --precision int8 only, and the precision is {self.precision}"
                    raise ConflictingOptions(problem, flag_of(name), "--precision")
        if self.calibration_dataset and not self.calibration_root:
            problem = "--calibration-dataset needs --calibration-root"
            hint = "give the folder, --calibration-root DIR"
            raise ConflictingOptions(problem, "--calibration-dataset", "--calibration-root", hint=hint)
        if self.calibration_images < MIN_CALIBRATION_CROPS:
            raise InvalidValue("calibration_images", self.calibration_images, f"at least {MIN_CALIBRATION_CROPS}")
        if self.int8_fallback == "fp16" and self.target != "tensorrt":
            problem = f"--int8-fallback fp16 is for TensorRT, and --target is {self.target}: CPUs have no fp16"
            raise ConflictingOptions(problem, "--int8-fallback", "--target")
        self._check_statistics()
        if self.static_batch is not None and not 1 <= self.static_batch <= MAX_IMAGES:
            raise InvalidValue("static_batch", self.static_batch, f"1 to {MAX_IMAGES}")
        if self.opset is not None and not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise InvalidValue("opset", self.opset, f"{OPSETS[0]} to {OPSETS[1]}")
        kind = "int8-fp16" if self.int8_fallback == "fp16" else self.precision
        if self.onnx_opset < MIN_OPSET[kind]:
            flag, value = ("--int8-fallback", "fp16") if kind == "int8-fp16" else ("--precision", kind)
            problem = f"--opset is {self.opset}, and {flag} {value} needs at least {MIN_OPSET[kind]}"
            raise ConflictingOptions(problem, "--opset", flag)

    def _check_statistics(self) -> None:
        if (self.input_mean is None) != (self.input_std is None):
            flags = ("--input-mean", "--input-std")
            given, missing = flags if self.input_std is None else flags[::-1]
            raise ConflictingOptions(f"{given} needs {missing}", given, missing, expected="both or neither")
        if self.input_mean is not None and self.input != "float":
            problem = f"--input-mean is for --input float, and a graph of --input {self.input} normalises by itself"
            raise ConflictingOptions(problem, "--input-mean", "--input")
        for flag, values in (("--input-mean", self.input_mean), ("--input-std", self.input_std)):
            if values and max(map(abs, values)) > MAX_OF_UNIT:
                raise InvalidValue(flag, values, f"of pixels in 0..1, so at most {MAX_OF_UNIT}", hint="divide by 255")

    def fed(self, size: Preprocessing) -> Preprocessing:
        """How crops for the file are prepared, of a network that takes them as `size` says. Raises InvalidValue for
        statistics that cannot be."""
        if self.input_mean is None or self.input_std is None:
            return size
        return replace(size, mean=self.input_mean, std=self.input_std)

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
        target = "" if self.target == "tensorrt" else f"-{self.target}"
        fallback = "-fp16" if self.int8_fallback == "fp16" else ""
        return "" if self.precision == "fp32" else f"-{self.precision}{target}{fallback}"


OF_ADOPTED = ("input", "input_mean", "input_std", "input_colour", "normalize", "flip_tta", "static_batch", "opset")
"""The options that an adopted ONNX file has decided."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What the embeddings are compared on."""

    verify_root: Annotated[str, Arg("DIR")] = ""
    """Folder of the data set whose test crops the parity check uses (default: the one that the checkpoint was trained
    on)."""
    verify_dataset: Annotated[str, Arg("NAME")] = ""
    """Data set in --verify-root (default: the one that the checkpoint was trained on; market1501 for an ONNX file)."""
    no_verify: bool = False
    """Skip the parity check; the manifest records it, and runners warn."""

    def __post_init__(self) -> None:
        if self.no_verify and (self.verify_root or self.verify_dataset):
            problem = "--no-verify compares nothing, so --verify-root and --verify-dataset would change nothing"
            raise ConflictingOptions(problem, "--no-verify", "--verify-root", "--verify-dataset")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is built."""

    batch: Annotated[tuple[tuple[int, int, int], ...], Arg("MIN BEST MAX")] = ()
    """Min, best and max images per call (default: 1 8 64). Each --batch of several, as --batch 1 1 1 --batch 1 8 64,
    is an optimisation profile with its own kernels."""
    flavor: Literal["auto", "tensorrt", "rtx"] = "auto"
    """Builder: tensorrt (needs a GPU), rtx (TensorRT-RTX, needs none), or auto (tensorrt on a machine with a GPU)."""
    device: str = "auto"
    """GPU to build for and to verify the engine on: cuda or cuda:N (default: the first, if there is a GPU)."""
    workspace: float | None = None
    """Most GPU memory in GiB that a kernel may use as workspace (default: all of it)."""
    opt_level: int | None = None
    """Builder optimisation level, 0 to 5 (default: the builder's own)."""
    timing_cache: Annotated[Path | None, Arg("FILE.cache")] = None
    """File of measured kernel times that makes later builds faster: read if it exists, written after the build."""
    tf32: bool = False
    """Let fp32 convolutions and matrix products run in TF32: faster, with 10 bits of mantissa."""
    hardware_compatibility: HardwareCompatibility = "none"
    """GPUs that a TensorRT engine runs on: the model that it was built on (others of its compute capability run it with
    a warning), any of its compute capability, or any from Ampere on; the last two cost some speed. A TensorRT-RTX
    engine runs on every GPU that TensorRT-RTX supports."""
    verbose: bool = False
    """Print the builder's whole log; it is always written beside the engine, as best.plan.log."""

    def __post_init__(self) -> None:
        _check_choices(self)
        if not isinstance(self.batch, tuple | list) or not all(map(_is_profile, self.batch)):
            raise InvalidValue("batch", self.batch, "min, best and max images of each profile, as ((1, 8, 64),)")
        _ = self.profiles
        if self.device == "cpu":
            hint = "to build an engine on a machine without a GPU, leave the flag out"
            raise InvalidValue("device", "cpu", "cuda or cuda:N: engines are for GPUs", hint=hint)
        cuda_index(self.device)
        if self.workspace is not None and not 0 < self.workspace < 1024:
            raise InvalidValue("workspace", self.workspace, "GiB, above 0 and below 1024")
        if self.timing_cache is not None and self.timing_cache.suffix != ".cache":
            raise InvalidValue("timing_cache", self.timing_cache, "a name that ends in .cache: it will be written to")
        if self.opt_level is not None and not 0 <= self.opt_level <= 5:
            raise InvalidValue("opt_level", self.opt_level, "0 to 5")

    @property
    def profiles(self) -> BatchProfiles:
        """`batch` by name, in order of size. Raises InvalidValue for impossible sizes, ConflictingOptions if two are
        for the same."""
        named = [BatchProfile(least=least, best=best, most=most) for least, best, most in self.batch]
        in_order = tuple(sorted(named, key=lambda profile: (profile.best, profile.most, profile.least)))
        return BatchProfiles(in_order) if in_order else BatchProfiles()


def check_flags(
    checkpoint: bool,
    options: ExportOptions,
    flags: AbstractSet[str],
    *,
    profile_layers: bool,
    no_manifest: bool,
    adopted: bool = False,
) -> None:
    """Raises ConflictingOptions for flags of `pmm export trt` that exclude each other, or that the ONNX file has
    already decided.

    Args:
        checkpoint: the model is a checkpoint, and no ONNX file.
        flags: those of the command line, as --precision.
        adopted: the model is an ONNX file of pmm adopt, of which files in other precisions can be made.
    """
    if checkpoint and no_manifest:
        problem = "--no-manifest is for ONNX files that pmm did not write, and the model is a checkpoint"
        raise ConflictingOptions(problem, "--no-manifest", hint="leave the flag out")
    if profile_layers and no_manifest:
        problem = "--profile-layers opens the engine, and an engine without a manifest cannot be opened"
        raise ConflictingOptions(problem, "--profile-layers", "--no-manifest")
    if options.target != "tensorrt":
        problem = (
            f"--target {options.target} is for ONNX Runtime and OpenCV on CPUs; an engine needs a file for TensorRT"
        )
        raise ConflictingOptions(problem, "--target", hint="leave the flag out")
    names = OF_ADOPTED if adopted else [each.name for each in fields(ExportOptions)]
    of_file = set(map(flag_of, names)) - (set() if no_manifest else {"--precision"})
    if not checkpoint and (decided := sorted(of_file & flags)):
        hint = "give the checkpoint, or export the ONNX file again with pmm export onnx"
        hint = "leave it out, or adopt a file that has it" if adopted else hint
        raise ConflictingOptions(f"{', '.join(decided)}: the ONNX file decides that", *decided, hint=hint)


def check_file_precision(file: Path, precision: str, of_engine: str) -> None:
    """Raises InvalidFile if an ONNX file is of another `precision` than its engine is to be."""
    if precision != of_engine:
        hint = f"an engine has the types of its file: pmm export onnx --precision {of_engine}"
        raise InvalidFile(f"it is in {precision}", path=file, expected=of_engine, hint=hint)


def _is_profile(sizes: object) -> bool:
    return isinstance(sizes, tuple | list) and len(sizes) == 3 and all(isinstance(size, int) for size in sizes)


def flag_of(name: str) -> str:
    """The flag of a field: `static_batch` -> `--static-batch`."""
    return "--" + name.replace("_", "-")


def _check_choices(options: Any) -> None:
    """Raises InvalidValue for a word that is none of its field's: Python checks no `Literal`."""
    for name, kind in get_type_hints(type(options)).items():
        if get_origin(kind) is Literal and getattr(options, name) not in get_args(kind):
            raise InvalidValue(name, getattr(options, name), choices=get_args(kind))
