"""The contract of an artifact: JSON beside the file, and a copy inside an ONNX file or a package."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmm.artifacts.batch_profiles import MAX_IMAGES
from pmm.artifacts.client_contract import client_contract
from pmm.artifacts.measured_thresholds import MeasuredThresholds
from pmm.artifacts.native_contracts import EngineContract, PackageContract
from pmm.artifacts.onnx_content import GraphDigest
from pmm.data.crop_statistics import CropStatistics
from pmm.data.preprocessing import Crops, Preprocessing
from pmm.utils.errors import InvalidFile, InvalidInput, InvalidValue, UserError
from pmm.utils.from_dict import from_dict

FORMAT = "pmm-manifest-3"
FOR_CLIENTS = "for_clients"
"""Key of what `pmm.artifacts.client_contract` says: written, and ignored when a manifest is read."""
METADATA_KEY = "pmm_manifest"
"""Of the copy in the metadata of an ONNX file or a package."""
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")
InputKind = Literal["uint8", "float", "float255"]
"""As the export's --input names what the graph takes: see `InputContract`."""


@dataclass(frozen=True, kw_only=True)
class InputContract:
    """What the graph takes. The caller resizes, as the `Preprocessing` says; see `pmm.data.crops`.

    Our exports take uint8 NHWC crops, or the same pixels, 0 to 255, as float32 NCHW, which are normalised inside the
    graph, or float32 NCHW crops, which the caller normalises, as for the torch model. Adopted ONNX files take either
    type in either layout. Raises InvalidValue for an impossible batch.
    """

    name: str = "images"
    dtype: Literal["uint8", "float32"] = "uint8"
    layout: Literal["NHWC", "NCHW"] = "NHWC"
    colour: Literal["rgb", "bgr"] = "rgb"
    normalised_by: Literal["graph", "caller"] = "graph"
    batch: int | None = None
    """Images per run, if the file takes no other number; None if any number will do."""

    def __post_init__(self) -> None:
        if self.batch is not None and not 1 <= self.batch <= MAX_IMAGES:
            raise InvalidValue("batch", self.batch, f"1 to {MAX_IMAGES}")

    @classmethod
    def of(cls, kind: InputKind, colour: Literal["rgb", "bgr"], batch: int | None = None) -> InputContract:
        """`kind`, `colour` and `batch` as the export's --input, --input-colour and --static-batch name them."""
        if kind == "uint8":
            return cls(colour=colour, batch=batch)
        by: Literal["graph", "caller"] = "caller" if kind == "float" else "graph"
        return cls(dtype="float32", layout="NCHW", normalised_by=by, colour=colour, batch=batch)

    def shape(self, size: Preprocessing) -> tuple[int, int, int]:
        """One image's shape: (H, W, 3) or (3, H, W)."""
        return (size.height, size.width, 3) if self.layout == "NHWC" else (3, size.height, size.width)

    def check_batch(self, images: int, name: str | Path) -> None:
        """Raises InvalidInput if the file `name`, of a static batch, does not take so many images in one run."""
        if self.batch not in (None, images):
            problem = f"it got {images} images for one run, and its static batch is {self.batch}"
            raise InvalidInput(problem, path=name, hint=f"give {self.batch}")

    def feed(self, crops: Crops, size: Preprocessing) -> npt.NDArray[Any]:
        """uint8 RGB crops [B, H, W, 3] -> the contiguous array that the graph takes."""
        as_they_are = self.dtype == "uint8" or self.normalised_by == "graph"
        images = crops if as_they_are else size.normalise(crops)
        if self.layout != ("NHWC" if as_they_are else "NCHW"):
            images = images.transpose(0, 3, 1, 2) if self.layout == "NCHW" else images.transpose(0, 2, 3, 1)
        if self.colour == "bgr":
            images = np.flip(images, self.layout.index("C"))
        return np.ascontiguousarray(images, self.dtype)


@dataclass(frozen=True, kw_only=True)
class EmbeddingContract:
    """What the graph returns: float32 [batch, dim]."""

    dim: int
    name: str = "embeddings"
    dtype: str = "float32"
    normalised: bool = False
    """Each row has norm 1."""
    flip_tta: bool = False
    """The mean of the crop's embedding and its mirror image's."""
    metric: Literal["euclidean", "cosine"] = "euclidean"

    @classmethod
    def of(cls, model: Any, *, normalised: bool = False, flip_tta: bool = False) -> EmbeddingContract:
        """The contract of what `model` returns; with `normalised`, scaled to norm 1 even if the model does not do
        that."""
        normalised = normalised or bool(model.normalised)
        metric: Literal["euclidean", "cosine"] = "cosine" if normalised else "euclidean"
        return cls(dim=int(model.embedding_dim), normalised=normalised, flip_tta=flip_tta, metric=metric)


@dataclass(frozen=True, kw_only=True)
class OnnxOrigin:
    """Where an adopted ONNX file comes from; files that are made from it say the same."""

    sha256: str
    """Of the file as others wrote it."""
    producer: str
    """The program that wrote it, as pytorch 2.4.0; empty if the file does not say."""
    dataset: str = ""
    """Layout of the data set to judge it on; empty if nobody said what it was."""
    root: str = ""
    """Folder of that data set."""
    flags: str = ""
    """What was given to pmm adopt, as it is typed."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contract of one artifact. Numbers, strings and plain nested tables only."""

    checkpoint_sha256: str
    """The checkpoint it came from; of an adopted ONNX file the file as others wrote it, and of what is made from that
    the adopted file."""
    method: str
    """Of the checkpoint, as pmm train has it; or adopted."""
    preprocessing: Preprocessing
    """How crops are resized, and the statistics that normalise them."""
    input: InputContract
    embedding: EmbeddingContract
    precision: str
    """As --precision set it: fp32, tf32, fp16, bf16 or int8."""
    precision_found: str
    """Read back from the file: the type in which most multiplications are done."""
    precision_share: dict[str, float]
    """Share of the multiply-accumulates per type, read back from the file."""
    macs: int
    """Multiply-accumulates of convolutions and matrix products, for one image."""
    opset: int
    """0 if it is no ONNX file, nor made from one."""
    versions: dict[str, str]
    """Versions of the libraries that made it."""
    sha256: str = ""
    """Of the artifact. The copy inside an ONNX file has neither it nor `parity` and `thresholds`: same checkpoint, same
    bytes."""
    parity: dict[str, Any] | None = None
    """Figures against the fp32 torch checkpoint (or the adopted ONNX file), measured at export on real crops; None if
    not verified."""
    quantization: dict[str, Any] | None = None
    """For int8: target, calibration, the layers in higher precision, and those in floats that have only their weights
    in 8 bits (heads). For fp16 and bf16 of adopted networks, if some layers are in fp32: these, as kept_in_fp32."""
    graph: GraphDigest | None = None
    """Of an ONNX file, or the one that an engine was built from: files that other tools rewrote are told by it. None
    for a package."""
    engine: EngineContract | None = None
    """For an engine only."""
    package: PackageContract | None = None
    """For an AOTInductor package only."""
    adopted: OnnxOrigin | None = None
    """For an adopted ONNX file, and files made from it: the fp32 embeddings to compare with are those of the adopted
    file in ONNX Runtime on a CPU, as there is no checkpoint."""
    thresholds: tuple[MeasuredThresholds, ...] = ()
    """Those that the bench measured (pmm bench --gallery), one per precision that the file ran in."""
    crop_statistics: CropStatistics | None = None
    """Of the crops that the network was trained on, where they were measured."""
    format: str = FORMAT

    def __post_init__(self) -> None:
        for field in ("precision", "precision_found"):
            if getattr(self, field) not in PRECISIONS:
                raise ValueError(f"{field} is {getattr(self, field)[:60]!r}; expected one of {', '.join(PRECISIONS)}")

    @property
    def keeps_layers(self) -> bool:
        """Whether layers are in fp32 because their rounding to `precision` would cost too much."""
        return bool((self.quantization or {}).get("kept_in_fp32"))

    @property
    def native(self) -> EngineContract | PackageContract | None:
        """The part about native code; None if the artifact has none."""
        return self.engine or self.package

    @property
    def is_adopted_itself(self) -> bool:
        """Whether it is the manifest of an adopted ONNX file itself, which others are made from."""
        return self.adopted is not None and self.adopted.sha256 == self.checkpoint_sha256

    @property
    def source_name(self) -> str:
        """What its embeddings are compared with, for messages."""
        return "the adopted ONNX file" if self.adopted else "the checkpoint"

    def source_sha256(self, digest: str) -> str:
        """SHA-256 of the checkpoint, or adopted ONNX file, that all files of this model are made from; `digest` is that
        of the file of this manifest."""
        return digest if self.is_adopted_itself else self.checkpoint_sha256

    def made_from(self, checkpoint_sha256: str, versions: Mapping[str, str]) -> bool:
        """Whether it was made from this checkpoint with these versions of libraries (and possibly others)."""
        return self.checkpoint_sha256 == checkpoint_sha256 and versions.items() <= self.versions.items()

    def check_copy(self, copy: Manifest, path: Path) -> None:
        """Raises InvalidFile unless `copy`, which lies in the file `path` and is hashed with it, says the same.

        Native code checks no sizes: fed with crops of another size it would read memory beyond them.
        """
        for field in dataclasses.fields(self):
            beside, inside = getattr(self, field.name), getattr(copy, field.name)
            if field.name not in ("sha256", "parity", "thresholds") and beside != inside:
                raise InvalidFile(
                    f"the manifest beside it says {field.name} {str(beside)[:80]}, the copy inside it "
                    f"{str(inside)[:80]}: the manifest was changed",
                    path=path,
                    hint="export the file again",
                )

    def to_json(self) -> str:
        """JSON with the contract and the table for programs in other languages that follows from it; the same contract
        gives the same text. Thresholds, statistics and graph are left out where there are none."""
        values = dataclasses.asdict(self)
        for field in ("thresholds", "crop_statistics", "graph"):
            if not values[field]:
                del values[field]
        values[FOR_CLIENTS] = client_contract(self)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str | Path) -> Manifest:
        """Raises InvalidFile, of the path `source`, if `text` is not a manifest of this format."""
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                problem = f"manifest format {values['format']!r}"
                expected = f"{FORMAT!r}, which this version reads"
                raise InvalidFile(problem, path=source, expected=expected, hint="export the file again")
            values.pop(FOR_CLIENTS, None)  # what is derived is not trusted
            return from_dict(cls, values)
        except InvalidFile:
            raise
        except (UserError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"invalid manifest ({type(error).__name__}: {error})"
            raise InvalidFile(reason, path=source, hint="export the file again") from error
