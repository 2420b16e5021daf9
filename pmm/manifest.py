"""What an artifact promises, as JSON beside it (and inside an ONNX file), and the check that it still holds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmm.data.crops import Preprocessing
from pmm.errors import UserError
from pmm.files import replacing, sha256

FORMAT = "pmm-manifest-1"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contract of one artifact. Numbers, strings and plain nested tables only."""

    checkpoint_sha256: str
    """The checkpoint it came from."""
    method: str
    preprocessing: Preprocessing
    """Size and statistics; applied inside the graph. The caller resizes (bilinear with antialiasing, as PIL's)."""
    precision: str
    """Asked for: fp32."""
    precision_found: str
    """Read back from the file."""
    embedding_dim: int
    opset: int
    versions: dict[str, str]
    """Versions of the libraries that made it."""
    sha256: str = ""
    """Of the artifact. The copy inside an ONNX file has neither it nor `parity`: same checkpoint, same bytes."""
    input: dict[str, str] = field(
        default_factory=lambda: {
            "name": "images",
            "dtype": "uint8",
            "layout": "NHWC",
            "colour": "RGB",
            "interpolation": "bilinear, antialiased",
        }
    )
    embedding: dict[str, str] = field(
        default_factory=lambda: {"name": "embeddings", "dtype": "float32", "normalised": "no", "metric": "euclidean"}
    )
    parity: dict[str, Any] | None = None
    """Figures against the fp32 torch checkpoint, measured at export; None if not verified."""
    engine: dict[str, Any] | None = None
    """For an engine: builder, version, batch profile, where it can run."""
    format: str = FORMAT

    def to_json(self) -> str:
        """The same text for the same contract."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Raises UserError if `text` is not a manifest of this format."""
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise UserError(f"{source}: manifest format {values['format']!r}; this version reads {FORMAT!r}")
            shape = values.pop("preprocessing")
            preprocessing = Preprocessing(
                height=int(shape["height"]),
                width=int(shape["width"]),
                mean=tuple(shape["mean"]),
                std=tuple(shape["std"]),
            )
            return cls(preprocessing=preprocessing, **values)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source}: not a manifest of ours ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Artifact:
    """An exported file and what it promises."""

    path: Path
    manifest: Manifest


def manifest_path(artifact: Path) -> Path:
    """`model.onnx` -> `model.onnx.json`."""
    return artifact.with_name(artifact.name + ".json")


@dataclass
class Draft:
    """An artifact that has not got its name yet."""

    path: Path
    manifest: Manifest


@contextlib.contextmanager
def drafted(path: Path, manifest: Manifest) -> Iterator[Draft]:
    """Yield a draft to write to `draft.path`; `draft.manifest` may still be changed.

    On success the file and its manifest (with the file's hash) get their names one right after the other, else neither
    does. Raises UserError as `pmm.files.replacing`.
    """
    with replacing(manifest_path(path)) as temporary_manifest, replacing(path) as temporary:
        draft = Draft(temporary, manifest)
        yield draft
        draft.manifest = dataclasses.replace(draft.manifest, sha256=sha256(temporary))
        temporary_manifest.write_text(draft.manifest.to_json())


def read_manifest(artifact: Path, digest: str) -> Manifest | None:
    """The manifest beside `artifact` (None if there is none), checked against the file's `digest`.

    Raises UserError if the manifest is damaged or belongs to another file.
    """
    path = manifest_path(artifact)
    if not path.exists():
        return None
    manifest = Manifest.from_json(path.read_text(errors="replace"), str(path))
    if manifest.sha256 != digest:
        raise UserError(
            f"{artifact}: its sha256 {digest[:12]}... is not the manifest's {manifest.sha256[:12]}...; "
            "the file was changed or replaced after the export; export it again"
        )
    return manifest
