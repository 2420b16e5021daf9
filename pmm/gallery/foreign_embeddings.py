"""Embeddings that other programs wrote, as .npy or .npz files. Loads no torch, and runs nothing of the file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.utils.errors import InvalidFile, reason_of
from pmm.utils.files import existing_file

EXPECTED = ".npz file with the arrays embeddings [N, D] and ids [N], or a .npy file of embeddings"


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignEmbeddings:
    """Numbers [N, D], whose ids and columns [N] are whole numbers, floats or texts."""

    embeddings: npt.NDArray[Any]
    ids: npt.NDArray[Any]
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


def read_embeddings(file: Path, ids: Path | None = None) -> ForeignEmbeddings:
    """Embeddings with the ids of the file itself (`ids` in a .npz file) or of the file `ids`: a .npy file, or a text
    file with one on each line. All other arrays of a .npz file are columns.

    Raises InvalidFile for files that are not that, or do not fit each other.
    """
    arrays = _arrays(existing_file(file, f"a {EXPECTED}"))
    if "embeddings" not in arrays:
        raise InvalidFile(f"it holds {', '.join(list(arrays)[:5]) or 'nothing'}", path=file, expected=f"a {EXPECTED}")
    if {"contract", "paths"} <= arrays.keys():
        raise InvalidFile("it is an index of an earlier version", path=file, hint=f"pmm gallery import {file}")
    embeddings, own = arrays.pop("embeddings"), arrays.pop("ids", None)
    if ids is not None and own is not None:
        raise InvalidFile("it holds ids itself", path=file, hint="leave --ids out")
    if ids is None and own is None:
        raise InvalidFile("it holds no ids", path=file, hint="give --ids FILE: a .npy file, or a text of one per line")
    found = _ids(ids) if ids is not None else np.asarray(own)
    if embeddings.ndim != 2 or embeddings.dtype.kind not in "fiu":
        problem = f"its embeddings are {embeddings.dtype} {list(embeddings.shape)}"
        raise InvalidFile(problem, path=file, expected="numbers [N, D]")
    for name, values in {"ids": found, **arrays}.items():
        if values.shape != (len(embeddings),):
            problem = f"{name} are {list(values.shape)} for {len(embeddings)} embeddings"
            raise InvalidFile(problem, path=ids if name == "ids" and ids else file, expected=f"[{len(embeddings)}]")
    return ForeignEmbeddings(embeddings=embeddings, ids=found, columns=arrays)


def _ids(file: Path) -> npt.NDArray[Any]:
    existing_file(file, "ids: a .npy file, or a text file with one on each line")
    if file.suffix.lower() == ".npy":
        return _arrays(file)["embeddings"]
    return np.array(lines_of(file), object)


def lines_of(file: Path) -> list[str]:
    """The lines of a text of ids, which hold whatever ends no line in a text file. Raises InvalidFile for no text."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidFile(f"it is no UTF-8 text ({error.reason})", path=file, expected="an id on each line") from error
    return text.removesuffix("\n").split("\n") if text else []


def _arrays(file: Path) -> dict[str, npt.NDArray[Any]]:
    """Name -> array; that of a .npy file is `embeddings`, and memory-mapped."""
    try:
        if zipfile.is_zipfile(file):
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        return {"embeddings": np.load(file, mmap_mode="r", allow_pickle=False)}
    except Exception as error:  # numpy and zipfile raise a dozen types on a malicious file
        reason = "it holds Python objects, or is no array" if "allow_pickle" in str(error) else reason_of(error)
        raise InvalidFile(f"it cannot be read ({reason})", path=file, expected=f"a {EXPECTED}") from error
