"""Which file of an earlier export is used again: one rule for ONNX files, packages and engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path

from pmm.artifacts.artifact import Artifact, read_manifest
from pmm.artifacts.manifest import Manifest
from pmm.artifacts.onnx_file import OnnxFile
from pmm.selftest.reference import possible_mistakes
from pmm.selftest.vectors import read_selftest
from pmm.utils.errors import UserError
from pmm.utils.files import sha256


def reusable(
    out: Path,
    is_same: Callable[[Manifest], bool],
    *,
    verified: bool,
    built_from: OnnxFile | None = None,
    read: Callable[[Path], Manifest | None] = read_manifest,
) -> Artifact | None:
    """The file `out` of an earlier export, if a new export would be no better; else None.

    It must be whole, what the new export would make, verified, and have its selftest.

    Args:
        is_same: whether a file with this manifest is of the same source, options, libraries and machine.
        verified: whether it must have passed a parity check.
        built_from: of an engine, whose selftest is that of its ONNX file.
        read: reads the manifest of a file. Raises UserError if one of the two is damaged.
    """
    with contextlib.suppress(UserError):
        manifest = read(out) if out.is_file() else None
        if manifest is None or (verified and manifest.parity is None) or not is_same(manifest):
            return None
        mistakes = _mistakes_beside(built_from) if built_from else possible_mistakes(manifest)
        if mistakes is None or has_selftest(out, mistakes):
            return Artifact(out, manifest)
    return None


def has_selftest(artifact: Path, mistakes: Collection[str] = ()) -> bool:
    """Whether a whole selftest of `artifact` that can name these `mistakes` lies beside it: those of earlier versions
    name fewer."""
    try:
        selftest = read_selftest(artifact, sha256(artifact))
    except UserError:
        return False
    return {*mistakes} <= {mistake.name for mistake in selftest.vectors.mistakes}


def _mistakes_beside(file: OnnxFile) -> list[str] | None:
    """The mistakes that the selftest of an ONNX file names; None if it has no selftest."""
    try:
        return [mistake.name for mistake in read_selftest(file.path, file.sha256).vectors.mistakes]
    except UserError:
        return None
