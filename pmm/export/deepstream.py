"""Checkpoint -> what DeepStream's tracker needs of a ReID model: an ONNX file and the `ReID:` section of its YAML.

Keys and their meaning: NVIDIA DeepStream's guide, plugin Gst-nvtracker, "Configuration Properties" of the
NvMultiObjectTracker, table "Re-ID"; the numbers of reidType, too, `REID_TYPES` in IReID.hpp of the SDK 9.2. The tracker
cuts crops out of the frame, resizes them in its own way, feeds netScaleFactor * (x - offsets) for x of 0 to 255, and
builds the engine with the TensorRT of its own. A netScaleFactor is one number: statistics per channel are in the graph.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pmm.artifacts.artifact import Artifact
from pmm.artifacts.batch_profiles import MAX_IMAGES
from pmm.artifacts.manifest import Manifest
from pmm.export.onnx import export_onnx
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.export.source import CheckpointSource, open_source
from pmm.export.unnamed_files import check_marked, check_onnx, output_folder
from pmm.utils.arguments import Arg
from pmm.utils.errors import CannotWrite, InvalidFile, InvalidValue, printable
from pmm.utils.files import output_file, write_file

REID_TYPES = {"nvdeepsort": 1, "nvdcf": 2}
"""Tracker -> reidType: for the association of each frame, or for people that come back."""
NETWORK_MODES = {"fp32": 0, "fp16": 1}
SECTION = "config_tracker_reid.yml"
HISTORY, WORKSPACE_MB = 100, 1000


@dataclass(frozen=True, kw_only=True)
class DeepStreamOptions:
    """How DeepStream runs the model. Raises InvalidValue for what it cannot take."""

    precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of the backbone in the file, and of the engine that DeepStream builds."""
    tracker: Literal["nvdcf", "nvdeepsort"] = "nvdcf"
    """Tracker that the section is for: nvdcf finds people again who were lost, nvdeepsort compares them in each
    frame."""
    batch_size: Annotated[int, Arg(least=1, most=MAX_IMAGES)] = 100
    """Most crops per call of the engine."""
    install_dir: Annotated[str, Arg("DIR")] = ""
    """Folder that the files will lie in where DeepStream runs (default: the one that they are written to)."""

    def __post_init__(self) -> None:
        for name, known in (("precision", NETWORK_MODES), ("tracker", REID_TYPES)):
            if getattr(self, name) not in known:
                raise InvalidValue(f"--{name}", getattr(self, name), choices=known)
        if not 1 <= self.batch_size <= MAX_IMAGES:
            raise InvalidValue("--batch-size", self.batch_size, f"1 to {MAX_IMAGES}")
        if self.install_dir and (
            not Path(self.install_dir).is_absolute() or printable(self.install_dir) != self.install_dir
        ):
            raise InvalidValue("--install-dir", self.install_dir, "the whole path of a folder, as /opt/models")


@dataclass(frozen=True)
class DeepStreamModel:
    """What was written."""

    artifact: Artifact
    section: Path
    """The `ReID:` section, as YAML."""


def export_deepstream(
    checkpoint: str | Path,
    out: str | Path,
    options: DeepStreamOptions | None = None,
    verification: VerifyOptions | None = None,
) -> DeepStreamModel:
    """Write the ONNX file, named after the checkpoint, and the section of the tracker's YAML to the folder `out`.

    The file takes pixels of 0 to 255, float32 NCHW RGB, and is verified as `pmm.export_onnx` does.

    Raises InvalidFile for a model that DeepStream's crops do not suit, CannotWrite for files in `out` that are not of
    an earlier export like this one, or as `pmm.export_onnx`.
    """
    checkpoint, out, options = Path(checkpoint), output_folder(Path(out)), options or DeepStreamOptions()
    export = ExportOptions(precision=options.precision, input="float255")
    file, section = out / f"{checkpoint.stem}{export.suffix}.onnx", out / SECTION
    for each in (file, section):
        output_file(each, checkpoint)
    installed = Path(options.install_dir or out.resolve()) / file.name
    if printable(installed) != str(installed):
        problem, hint = f"YAML cannot hold this name: {printable(installed)}", "give --install-dir, or rename it"
        raise CannotWrite(problem, path=file, hint=hint)
    source = open_source(checkpoint)
    size = source.preprocessing
    if not isinstance(source, CheckpointSource):
        problem, hint = "an adopted ONNX file, whose input is what it is", "adopt the network of torch instead"
        raise InvalidFile(problem, path=checkpoint, expected="a checkpoint, of pmm train or pmm adopt", hint=hint)
    if size.padding is not None:
        problem = f"its crops are padded ({size.describe()}), and DeepStream pads in another way"
        raise InvalidFile(problem, path=checkpoint, expected="a model for stretched crops")
    check_onnx(file, source, export)
    check_marked(section, source)
    artifact = export_onnx(checkpoint, file, export, verification)
    write_file(section, reid_section(artifact.manifest, installed, options))
    return DeepStreamModel(artifact, section)


def reid_section(manifest: Manifest, onnx_file: Path, options: DeepStreamOptions) -> str:
    """The text of the section, for the file of `manifest` that lies at `onnx_file` where DeepStream runs."""
    size, embedding = manifest.preprocessing, manifest.embedding
    mode, path = options.precision, str(onnx_file)
    lines = [
        ("reidType", REID_TYPES[options.tracker], f"{options.tracker}"),
        ("batchSize", options.batch_size, "most crops per run of the engine"),
        ("workspaceSize", WORKSPACE_MB, "MB, while the engine is built"),
        ("reidFeatureSize", embedding.dim, "of an embedding"),
        ("reidHistorySize", HISTORY, "embeddings that are kept of each person"),
        ("inferDims", [3, size.height, size.width], "channels, height, width"),
        ("networkMode", NETWORK_MODES[mode], mode),
        ("inputOrder", 0, "NCHW"),
        ("colorFormat", 0, "RGB"),
        ("offsets", [0.0, 0.0, 0.0], "pixels as they are: mean and std are in the graph"),
        ("netScaleFactor", 1.0, "0 to 255"),
        ("keepAspc", 0, "crops are stretched, as in training"),
        ("addFeatureNormalization", int(not embedding.normalised), "embeddings have norm 1 in the graph"
         if embedding.normalised else "the graph leaves embeddings as long as they are"),
        ("outputReidTensor", 0, "1 hands the embeddings on to what follows"),
        ("onnxFile", path, "as pmm export deepstream wrote it"),
        ("modelEngineFile", f"{path}_b{options.batch_size}_gpu0_{mode}.engine", "built at the first start"),
    ]  # fmt: skip
    head = "# In place of the ReID section of the tracker's configuration (ll-config-file of Gst-nvtracker).\n"
    head += f"# Of the checkpoint with sha256 {manifest.checkpoint_sha256}\nReID:\n"
    return head + "".join(f"  {key}: {json.dumps(value, ensure_ascii=False)}  # {why}\n" for key, value, why in lines)
