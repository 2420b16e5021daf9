"""Files that an export writes to a folder under its own names, without replacing what it did not write."""

from __future__ import annotations

from pathlib import Path

from pmm.artifacts.artifact import read_manifest
from pmm.export.onnx import check_overwrite
from pmm.export.options import ExportOptions
from pmm.export.source import ExportSource
from pmm.utils.errors import CannotWrite, InvalidFile

FILE_ENDINGS = (".onnx", ".xml", ".bin", ".yml", ".yaml", ".json")
HINT = "move it away, or give another place with -o"


def output_folder(out: Path) -> Path:
    """`out`, to be made a folder. Raises CannotWrite for a new one with the name of a file."""
    if out.suffix.lower() in FILE_ENDINGS and not out.is_dir():
        raise CannotWrite(
            f"its name ends in {out.suffix}", path=out, expected="a folder", hint="leave the file's name out"
        )
    return out


def check_onnx(file: Path, source: ExportSource, options: ExportOptions) -> None:
    """Raises CannotWrite if the ONNX file `file` is not ours, is another export of `source`, or takes other input than
    an export of `source` with `options`: configurations lead to it."""
    try:
        check_overwrite(file, source.path, options)
    except CannotWrite as error:
        error.hint = HINT
        raise
    try:
        manifest = read_manifest(file) if file.is_file() else None
    except InvalidFile:  # damaged: it is made anew
        return
    if manifest and manifest.input != source.input(options):
        raise CannotWrite("an export of another model, which takes other input", path=file, hint=HINT)


def check_marked(path: Path, source: ExportSource, *beside: Path) -> None:
    """Raises CannotWrite if the text at `path`, or a file `beside` it, is there and not of an earlier export of
    `source`, whose SHA-256 is written in `path` then."""
    there = [each for each in (path, *beside) if each.exists()]
    if there and not (path.is_file() and source.sha256.encode() in path.read_bytes()):
        raise CannotWrite(f"pmm did not export this file of {source.path.name}", path=there[0], hint=HINT)
