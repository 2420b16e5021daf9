"""An exported file and the manifest beside it: written together and read together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pmm.artifacts.manifest import Manifest
from pmm.artifacts.measured_thresholds import MeasuredThresholds
from pmm.utils.errors import InvalidFile, UserError
from pmm.utils.files import replacing, sha256, write_file


@dataclass(frozen=True)
class Artifact:
    """An exported file and its manifest."""

    path: Path
    manifest: Manifest


SELFTEST_SUFFIXES = (".selftest.json", ".selftest.npz")


def manifest_path(artifact: Path) -> Path:
    """`model.onnx` -> `model.onnx.json`; of a link, beside the file it leads to."""
    target = artifact.resolve() if artifact.is_symlink() else artifact
    return target.with_name(target.name + ".json")


def selftest_paths(artifact: Path) -> tuple[Path, Path]:
    """`model.onnx` -> `model.onnx.selftest.json` and `model.onnx.selftest.npz`, beside its manifest."""
    target = artifact.resolve() if artifact.is_symlink() else artifact
    as_json, as_npz = (target.with_name(target.name + end) for end in SELFTEST_SUFFIXES)
    return as_json, as_npz


def read_manifest(artifact: Path, digest: str = "") -> Manifest | None:
    """The manifest beside `artifact` (None without one), checked against the file's SHA-256 `digest` (default: of the
    file as it is now).

    Raises InvalidFile if the manifest is damaged or belongs to another file.
    """
    path = manifest_path(artifact)
    if not path.exists():
        path = artifact.with_name(artifact.name + ".json")  # of a link to a file without one
    if not path.exists():
        return None
    manifest = Manifest.from_json(path.read_text(errors="replace"), path)
    digest = digest or sha256(artifact)
    if manifest.sha256 != digest:
        raise InvalidFile(
            f"its sha256 {digest[:12]}... is not the manifest's {manifest.sha256[:12]}...: "
            "the file was changed or replaced after the export",
            path=artifact,
            hint="export it again",
        )
    return manifest


def write_thresholds(artifact: Path, measured: MeasuredThresholds) -> bool:
    """Put `measured` into the manifest beside `artifact`, in place of earlier ones of that precision; the file itself
    stays as it is. False where there is no manifest beside it.

    Raises InvalidFile as `read_manifest`, CannotWrite as `pmm.utils.files.replacing`.
    """
    manifest = read_manifest(artifact)
    if manifest is None:
        return False
    others = (each for each in manifest.thresholds if each.precision != measured.precision)
    path = manifest_path(artifact)
    path = path if path.exists() else artifact.with_name(artifact.name + ".json")
    write_file(path, dataclasses.replace(manifest, thresholds=(*others, measured)).to_json())
    return True


@dataclass
class ArtifactDraft:
    """An artifact before it gets its name: it is at `path`, and will be at `out`."""

    path: Path
    out: Path
    manifest: Manifest
    selftest: tuple[bytes, bytes] | None = None
    """Content of its `selftest_paths`; None if there is none of this file."""

    @contextlib.contextmanager
    def openable(self) -> Iterator[None]:
        """Put the manifest beside the draft for the duration of the block, so that a runner can open it; errors name
        `out`."""
        temporary_manifest = manifest_path(self.path)
        try:
            temporary_manifest.write_text(self._sealed().to_json())
            yield
        except UserError as error:
            for fact in ("problem", "expected", "hint"):
                setattr(error, fact, getattr(error, fact).replace(str(self.path), str(self.out)))
            error.path = self.out if error.path == self.path else error.path
            raise
        finally:
            temporary_manifest.unlink(missing_ok=True)

    def _sealed(self) -> Manifest:
        return dataclasses.replace(self.manifest, sha256=sha256(self.path))


@contextlib.contextmanager
def new_artifact(path: Path, manifest: Manifest) -> Iterator[ArtifactDraft]:
    """Yield a draft to write to `draft.path`; `draft.manifest` may still be changed.

    On success the file, its manifest (with the file's hash) and its selftest get their names one right after the other,
    else none does; a selftest of an earlier file is removed. Raises CannotWrite as `pmm.utils.files.replacing`.
    """
    with (
        contextlib.ExitStack() as selftest,
        replacing(manifest_path(path)) as temporary_manifest,
        replacing(path) as temporary,
    ):
        draft = ArtifactDraft(temporary, path, manifest)
        yield draft
        draft.manifest = draft._sealed()
        temporary_manifest.write_text(draft.manifest.to_json())
        for place, content in zip(selftest_paths(path), draft.selftest or (), strict=False):
            selftest.enter_context(replacing(place)).write_bytes(content)
    if not draft.selftest:
        remove_selftest(path)


def remove_selftest(artifact: Path) -> None:
    """Remove the selftest of an earlier file in this place."""
    for place in selftest_paths(artifact):
        place.unlink(missing_ok=True)
