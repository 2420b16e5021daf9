"""What a file is, by its content and not by its name. Loads neither torch nor onnx, and runs nothing of the file.

Only what a reader is chosen by: the reader then checks the file.
"""

from __future__ import annotations

import functools
import logging
import zipfile
from pathlib import Path
from typing import BinaryIO, Literal

from pmm.utils.errors import InvalidFile, one_of
from pmm.utils.files import existing_file

Kind = Literal["checkpoint", "torch", "program", "onnx", "engine", "package", "index"]

KIND_NAMES: dict[Kind, str] = {
    "checkpoint": "a checkpoint",
    "torch": "a file of torch, but no PMM checkpoint",
    "program": "a program of torch (TorchScript or torch.export)",
    "onnx": "an ONNX file",
    "engine": "a TensorRT engine",
    "package": "an AOTInductor package",
    "index": "an index",
}
RUNNABLE: tuple[Kind, ...] = ("checkpoint", "onnx", "package", "engine")
"""What a backend can run."""
ENGINE_SUFFIXES = (".plan", ".engine")
PACKAGE_SUFFIX = ".pt2"
SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".pth", ".pt", ".tar"), "checkpoint"),
    ".onnx": "onnx",
    **dict.fromkeys(ENGINE_SUFFIXES, "engine"),
    PACKAGE_SUFFIX: "package",
    ".npz": "index",
}
"""What the ending of a name declares."""
KIND_DESCRIPTIONS: dict[Kind, str] = {
    "checkpoint": "a checkpoint (.pth, .pt)",
    "onnx": "an ONNX file (.onnx)",
    "engine": "a TensorRT engine (.plan, .engine)",
    "package": "an AOTInductor package (.pt2)",
    "index": "an index (.npz)",
}
FORMAT_MARK = b"pmm-checkpoint-"
"""In each PMM checkpoint: see `pmm.artifacts.checkpoint.FORMAT`."""
_ENGINE_MAGIC = (b"ptrt", b"ftrt", b"vtrt")  # TensorRT's two, and TensorRT-RTX's
_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.serialization.MAGIC_NUMBER, behind the pickle's protocol
_SEARCHED = 1 << 20  # bytes of a pickle; the format is the first entry of a PMM checkpoint


KNOWN_KINDS = one_of(KIND_DESCRIPTIONS.values())


def kind_of(path: str | Path, *expected: Kind) -> Kind:
    """What the file at `path` is: by its content or, where that tells nothing (a damaged file, say), by its suffix.

    Where the two disagree the content decides, and one line (logger "pmm") says so.

    Args:
        expected: kinds that a message names (default: all).

    Raises InvalidFile if the file is missing, or neither tells.
    """
    known = one_of(KIND_DESCRIPTIONS[each] for each in expected or KIND_DESCRIPTIONS)
    path = existing_file(path, known)
    declared, kind = SUFFIXES.get(path.suffix.lower()), kind_of_content(path)
    if kind is None:
        if declared is None:
            raise InvalidFile("neither its content nor its name tells what it is", path=path, expected=known)
        return declared
    of_torch = ("checkpoint", "torch", "program")
    if declared not in (None, kind) and not (declared in of_torch and kind in of_torch):
        _warn_once(f"{path}: its name ends in {path.suffix}, but it is {KIND_NAMES[kind]}, and taken as that")
    return kind


def require_kind(path: str | Path, *expected: Kind) -> Kind:
    """As `kind_of`, of a file that has to be one of those `expected`; a file of torch counts as the checkpoint that it
    was meant to be, as reading it says what to do with it.

    Raises InvalidFile for other kinds too.
    """
    kind = kind_of(path, *expected)
    if kind == "torch" and "checkpoint" in expected:
        return "checkpoint"
    if kind not in expected:
        raise InvalidFile(
            f"it is {KIND_NAMES[kind]}", path=path, expected=one_of(KIND_NAMES[each] for each in expected)
        )
    return kind


def kind_of_content(path: Path) -> Kind | None:
    """What the content of the file at `path` tells alone; None if nothing."""
    with path.open("rb") as file:
        head = file.read(16)
        if head.startswith(_ENGINE_MAGIC):
            return "engine"
        if head.startswith(b"PK\x03\x04"):
            return _kind_of_zip(file)
        if head[:1] == b"\x80" and head[2:15] == _LEGACY_TORCH:
            return "checkpoint" if FORMAT_MARK in file.read(_SEARCHED) else "torch"
        return "onnx" if _is_onnx(file, path.stat().st_size) else None


def _kind_of_zip(file: BinaryIO) -> Kind | None:
    """By the names of its members, as torch.save, torch.jit, torch.export, AOTInductor and old indices have them."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if any("/data/aotinductor/" in name for name in names):
                return "package"
            if any(name.endswith(("/constants.pkl", "/models/model.json")) for name in names):
                return "program"
            for name in names:
                if name.endswith("/data.pkl"):
                    with archive.open(name) as pickle:
                        return "checkpoint" if FORMAT_MARK in pickle.read(_SEARCHED) else "torch"
            return "index" if {"contract.npy", "embeddings.npy", "paths.npy"} <= set(names) else None
    except Exception:  # zipfile raises a dozen types on a malicious file; its reader says what is wrong
        return None


def _is_onnx(file: BinaryIO, size: int) -> bool:
    """Whether it begins as an onnx.ModelProto: the version of its format (field 1), some short fields, and a graph
    (field 7), or as much of that as a truncated file has."""
    file.seek(0)
    if _varint(file) != 0x08 or not 3 <= _varint(file) <= 32:
        return False
    for count in range(16):
        tag = _varint(file)
        if tag == 0x3A:
            return True
        if tag not in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x42):  # producer, domain, model_version, doc_string, opset_import
            return count > 0 and file.tell() == size
        length = _varint(file)
        if tag != 0x28:
            if file.tell() + length > size:
                return True
            file.seek(length, 1)
    return False


def _varint(file: BinaryIO) -> int:
    """Protocol buffers' number of 7 bits a byte; 0 at the end of the file."""
    value = 0
    for shift in range(0, 70, 7):
        byte = (file.read(1) or b"\0")[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return value


@functools.cache
def _warn_once(line: str) -> None:
    logging.getLogger("pmm").warning(line)
