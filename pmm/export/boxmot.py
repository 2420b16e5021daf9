"""Checkpoint -> what BoxMOT (version 25) needs of a ReID model: an ONNX file, and the sidecars that it reads.

BoxMOT resizes crops with OpenCV's bilinear, turns BGR into RGB, normalises by ImageNet's statistics, feeds float32 NCHW
and brings each embedding to norm 1. The size of the crops it takes from a sidecar (`boxmot.reid.core.artifacts`):
without one its OpenCV backend feeds 256x128 to every network, whose embeddings are then wrong without a word.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmm.artifacts.artifact import Artifact, ArtifactDraft
from pmm.artifacts.manifest import InputContract, Manifest
from pmm.config import IMAGENET_MEAN, IMAGENET_STD
from pmm.export.onnx import export_onnx
from pmm.export.openvino import check_openvino, read_openvino, saved_model
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.export.source import CheckpointSource, ExportSource, open_source
from pmm.export.unnamed_files import HINT, check_marked, check_onnx, output_folder
from pmm.utils.errors import CannotWrite, InvalidFile
from pmm.utils.files import output_file, write_file

SCHEMA = 1
"""Of BoxMOT's sidecars, and of the model's part of them."""
SIDECAR = ".metadata.json"
FOLDER, FOLDER_SIDECAR = "_openvino_model", "manifest.json"
FED = InputContract.of("float", "rgb")


@dataclass(frozen=True)
class BoxmotModel:
    """What was written."""

    artifact: Artifact
    files: tuple[Path, ...]
    """The ONNX file and, if there is one, the folder for OpenVINO: what BoxMOT is given."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What BoxMOT does differently, whatever the file says."""
        size = self.artifact.manifest.preprocessing
        if not size.antialias:
            return ()
        return (
            f"BoxMOT resizes with OpenCV's bilinear, and this model was trained on {size.filter_name}: crops that are "
            f"much larger than {size.height}x{size.width} get other embeddings",
        )


def export_boxmot(
    checkpoint: str | Path,
    out: str | Path,
    *,
    flip_tta: bool = False,
    openvino: bool = False,
    verification: VerifyOptions | None = None,
) -> BoxmotModel:
    """Write the ONNX file `out`, or one named after the checkpoint in the folder `out`, and its sidecar.

    Statistics other than ImageNet's are converted in the graph. The file is verified as `pmm.export_onnx` does.

    Args:
        checkpoint: or an ONNX file of pmm adopt that takes what BoxMOT feeds.
        flip_tta: the mean of the embeddings of a crop and of its mirror image.
        openvino: write the folder that BoxMOT's OpenVINO backend opens, too.

    Raises:
        InvalidFile: a model that crops of BoxMOT's do not suit, or as `pmm.export_onnx`.
        CannotWrite: files with names that were not given, and that are not of an earlier export like this one.
        MissingLibrary: OpenVINO is not installed, and was asked for.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    named = out.suffix.lower() == ".onnx"
    file = out if named else output_folder(out) / f"{checkpoint.stem}.onnx"
    folder, of_file = file.with_name(file.stem + FOLDER), file.with_name(file.name + SIDECAR)
    model = folder / f"{file.stem}.xml"
    in_folder = folder / FOLDER_SIDECAR, folder / (model.name + SIDECAR)
    output_file(file, checkpoint, suffixes=(".onnx",))
    for each in (of_file, *((model, model.with_suffix(".bin"), *in_folder) if openvino else ())):
        output_file(each, checkpoint)
    if openvino:
        check_openvino()
    elif folder.exists():
        hint = "give --openvino to write it anew, too, or move it away"
        raise CannotWrite("it was made of another ONNX file than the new one", path=folder, hint=hint)
    source = open_source(checkpoint)
    options = _options(source, flip_tta)
    if not named:
        check_onnx(file, source, options)
    if of_file.exists() and not file.exists():
        raise CannotWrite("pmm did not write it, and does not replace it", path=of_file, hint=HINT)
    check_marked(model, source, model.with_suffix(".bin"), *in_folder)

    def convert(draft: ArtifactDraft) -> None:
        with draft.openable():
            converted = read_openvino(draft.path)
        named_last.enter_context(saved_model(converted, model, draft.manifest))

    with ExitStack() as named_last:
        artifact = export_onnx(checkpoint, file, options, verification, before_named=convert if openvino else None)
    sidecar = json.dumps(_sidecar(artifact.manifest), indent=2) + "\n"
    for each in (of_file, *(in_folder if openvino else ())):
        write_file(each, sidecar)
    return BoxmotModel(artifact, (file, folder) if openvino else (file,))


def _options(source: ExportSource, flip_tta: bool) -> ExportOptions:
    """Raises InvalidFile for a model that does not suit the crops that BoxMOT feeds."""
    size = source.preprocessing
    if size.padding is not None:
        problem = f"its crops are padded ({size.describe()}), and BoxMOT stretches them"
        raise InvalidFile(problem, path=source.path, expected="a model for stretched crops")
    as_trained = (size.mean, size.std) == (IMAGENET_MEAN, IMAGENET_STD)
    if isinstance(source, CheckpointSource):
        statistics = {} if as_trained else {"input_mean": IMAGENET_MEAN, "input_std": IMAGENET_STD}
        return ExportOptions(input="float", flip_tta=flip_tta, **statistics)  # type: ignore[arg-type]
    options = ExportOptions(flip_tta=flip_tta)
    if source.input(options) != FED or not as_trained:
        fed = source.input(options)
        raise InvalidFile(
            f"an adopted ONNX file that takes {fed.name}: {fed.dtype} {fed.layout} {fed.colour.upper()}, "
            f"{size.describe()}",
            path=source.path,
            expected="what BoxMOT feeds: images, float32 NCHW RGB, normalised by ImageNet's mean and std",
            hint="adopt the network of torch instead",
        )
    return options


def _sidecar(manifest: Manifest) -> dict[str, Any]:
    size = [manifest.preprocessing.height, manifest.preprocessing.width]
    return {
        "schema_version": SCHEMA,
        "model_kwargs_schema_version": SCHEMA,
        "model_name": manifest.method,
        "model_kwargs": {"img_size": size},
        "img_size": size,
        "preprocess": "resize",
    }
