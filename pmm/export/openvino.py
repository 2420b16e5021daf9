"""Checkpoint -> OpenVINO's IR (.xml and .bin) that takes crops of any size, resized and normalised inside.

A client feeds uint8 NHWC RGB crops as they are cut from a frame, all of one call at one size. They are resized as
PIL does (`pmm.export.openvino_resize`). On CPUs with bf16 instructions OpenVINO computes in bf16 unless a client sets
INFERENCE_PRECISION_HINT to f32.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pmm.artifacts.artifact import Artifact, ArtifactDraft
from pmm.artifacts.manifest import Manifest
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Crops, Preprocessing
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.onnx import export_onnx
from pmm.export.openvino_resize import FILTERS, resize_as_pil
from pmm.export.options import MIN_COSINE, ExportOptions, VerifyOptions
from pmm.export.parity_check import ParityFailed
from pmm.export.source import open_source
from pmm.export.unnamed_files import check_marked, check_onnx, output_folder
from pmm.runtime.openvino import shared_core
from pmm.runtime.ort import OrtRunner
from pmm.utils.errors import InvalidFile, reason_of
from pmm.utils.extras import check_installed, import_library
from pmm.utils.files import cannot_write, make_folder, output_file

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}
ENLARGED = (1, 3)
VERIFIED = 8


@dataclass(frozen=True)
class OpenVinoModel:
    """What was written."""

    path: Path
    """The .xml file; the weights are beside it."""
    artifact: Artifact
    """The ONNX file that it was made of, for crops at the model's size."""
    min_cosine: float | None
    """Of the worst crop with the ONNX file's embedding, at the model's size and at three times that; None if not
    verified."""

    def describe(self) -> str:
        """One line: file, input, and how it compared."""
        size = self.artifact.manifest.preprocessing
        compared = "NOT compared (--no-verify)" if self.min_cosine is None else f"min cosine {self.min_cosine:.7f}"
        return (
            f"{self.path}: uint8 NHWC RGB of any size, resized to {size.height}x{size.width} and normalised inside, "
            f"{compared} with the ONNX file"
        )


def check_openvino() -> None:
    """Raises MissingLibrary."""
    check_installed("openvino")


def export_openvino(
    checkpoint: str | Path,
    out: str | Path,
    *,
    precision: Literal["fp32", "int8"] = "fp32",
    normalize: bool = False,
    flip_tta: bool = False,
    verification: VerifyOptions | None = None,
) -> OpenVinoModel:
    """Write the model to the folder `out`, with the ONNX file that it is made of; both are named after the checkpoint.

    Args:
        checkpoint: or an ONNX file of pmm adopt.
        precision, normalize, flip_tta: as `ExportOptions` has them.

    Raises:
        InvalidFile: crops that OpenVINO cannot resize as the model was trained, or as `pmm.export_onnx`.
        MissingLibrary: OpenVINO is not installed.
        CannotWrite: files in `out` that are not of an earlier export like this one.
        ParityFailed: the embeddings moved; nothing was written then.
    """
    checkpoint, out = Path(checkpoint), output_folder(Path(out))
    check_openvino()
    options = ExportOptions(
        precision=precision,
        target="cpu" if precision == "int8" else "tensorrt",
        normalize=normalize,
        flip_tta=flip_tta,
    )
    file = out / f"{checkpoint.stem}{options.suffix}.onnx"
    path = file.with_suffix(".xml")
    for each in (file, path, path.with_suffix(".bin")):
        output_file(each, checkpoint)
    source = open_source(checkpoint)
    _check_resize(source.preprocessing, checkpoint)
    check_onnx(file, source, options)
    check_marked(path, source, path.with_suffix(".bin"))
    verification, min_cosine = verification or VerifyOptions(), None

    def convert(draft: ArtifactDraft) -> None:
        nonlocal min_cosine
        with draft.openable():
            model = with_preprocessing(read_openvino(draft.path), draft.manifest)
            if check := source.parity_check(options, verification):
                min_cosine = _verify(model, Artifact(draft.path, draft.manifest), check.sample(VERIFIED).crops, path)
        named_last.enter_context(saved_model(model, path, draft.manifest))

    with ExitStack() as named_last:
        artifact = export_onnx(checkpoint, file, options, verification, before_named=convert)
    return OpenVinoModel(path, artifact, min_cosine)


def read_openvino(path: Path) -> Any:
    """The ONNX file at `path` as OpenVINO has it. Raises InvalidFile if it cannot."""
    try:
        return shared_core().read_model(path)
    except RuntimeError as error:
        raise InvalidFile(f"OpenVINO cannot read it ({reason_of(error)})", path=path) from error


@contextmanager
def saved_model(model: Any, path: Path, manifest: Manifest) -> Iterator[None]:
    """Write `path` (.xml) and the weights beside it, in fp32; they get their names at the end of the block, if nothing
    was raised in it. An .xml is never there with the weights of another. Raises CannotWrite."""
    model.set_rt_info(manifest.checkpoint_sha256, ["pmm", "checkpoint_sha256"])
    make_folder(path.parent)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
            draft = Path(folder) / path.name
            import_library("openvino").save_model(model, draft, compress_to_fp16=False)
            yield
            path.unlink(missing_ok=True)
            os.replace(draft.with_suffix(".bin"), path.with_suffix(".bin"))
            os.replace(draft, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    except RuntimeError as error:  # of OpenVINO: a full disk, say
        raise cannot_write(path, OSError(reason_of(error))) from error


def with_preprocessing(model: Any, manifest: Manifest) -> Any:
    """`model`, which takes crops as `manifest` says, as one that takes uint8 NHWC RGB crops of any size."""
    openvino = import_library("openvino")
    preprocess = import_library("openvino.preprocess")
    contract, size = manifest.input, manifest.preprocessing
    whole = preprocess.PrePostProcessor(model)
    images = whole.input()
    nhwc = openvino.Layout("NHWC")
    images.tensor().set_element_type(openvino.Type.u8).set_layout(nhwc).set_spatial_dynamic_shape()
    steps = images.preprocess().custom(
        lambda node: resize_as_pil(node, size.height, size.width, size.interpolation).output(0)
    )
    if contract.dtype == "float32":
        steps.convert_element_type(openvino.Type.f32)
    if contract.normalised_by == "caller":
        steps.mean([255 * each for each in size.mean]).scale([255 * each for each in size.std])
    if contract.colour == "bgr":
        steps.reverse_channels()
    images.model().set_layout(openvino.Layout(contract.layout))
    model = whole.build()
    fed = "uint8 NHWC RGB crops of any size; they are resized as PIL does and normalised inside"
    model.set_rt_info(fed, ["pmm", "input"])
    return model


def _check_resize(size: Preprocessing, path: Path) -> None:
    """Raises InvalidFile for crops that OpenVINO cannot resize as they should be."""
    if size.padding is None and size.antialias and size.interpolation in FILTERS:
        return
    problem = f"its crops are {size.describe()}, which OpenVINO's preprocessing cannot do"
    expected = "crops that are stretched by PIL's bilinear or bicubic"
    hint = "export it with pmm export onnx, which OpenVINO reads too, and resize crops before"
    raise InvalidFile(problem, path=path, expected=expected, hint=hint)


def _verify(model: Any, artifact: Artifact, crops: Crops, path: Path) -> float:
    """The least cosine with the ONNX file's embeddings, of crops at the model's size and at three times that.

    Raises ParityFailed if it is too low.
    """
    size, precision = artifact.manifest.preprocessing, artifact.manifest.precision
    compiled = shared_core().compile_model(model, "CPU", SETTINGS)
    if batch := artifact.manifest.input.batch:
        crops = np.resize(crops, (batch, *crops.shape[1:]))
    worst = 1.0
    with OrtRunner(artifact.path, warn=False) as runner:
        for times in ENLARGED:
            larger = np.stack([_enlarged(crop, times) for crop in crops])
            found = numeric_parity(runner(load_crops(larger, size)), compiled({0: larger})[0]).min_cosine
            if found < (least := MIN_COSINE[precision]):
                raise ParityFailed(
                    f"parity failed: at {times} times the model's size a crop has cosine {found:.7f} with the ONNX "
                    "file's embedding of it",
                    path=path,
                    expected=f"{least} or more for {precision}",
                    hint="it was not written",
                )
            worst = min(worst, found)
    return worst


def _enlarged(crop: Crops, times: int) -> Crops:
    height, width, _ = crop.shape
    return np.asarray(Image.fromarray(crop).resize((times * width, times * height), Image.Resampling.BICUBIC))
