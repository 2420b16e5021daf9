"""Indices of earlier versions, one .npz of plain arrays without pickle: read, and made into a gallery."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pmm.artifacts.kinds import KIND_NAMES, kind_of_content
from pmm.gallery.gallery import Gallery
from pmm.gallery.storage.source import EmbeddingSource
from pmm.utils.errors import InvalidFile, InvalidInput, UserError, reason_of
from pmm.utils.files import existing_file
from pmm.utils.from_dict import from_dict

FORMAT = "pmm-index-1"
MEMBERS = ("contract", "embeddings", "paths")
REMAKE = "write a gallery with pmm embed"
EXPECTED = "an index written by pmm embed of an earlier version"


@dataclass(frozen=True, kw_only=True, eq=False)
class NpzIndex:
    """Embeddings float32 [N, D] of the images at `paths`, which are relative to `folder`, with / between."""

    embeddings: npt.NDArray[np.float32]
    paths: tuple[str, ...]
    folder: str
    source: EmbeddingSource

    def __post_init__(self) -> None:
        shape, dim = self.embeddings.shape, self.source.embedding.dim
        if self.embeddings.dtype != np.float32 or shape != (len(self.paths), dim) or not self.paths or dim < 1:
            raise InvalidInput(
                f"embeddings are {self.embeddings.dtype} {list(shape)} for {len(self.paths)} images",
                expected=f"float32 [{max(1, len(self.paths))}, {dim}]",
            )


def read_npz_index(path: Path) -> NpzIndex:
    """Read an index; no code inside the file is run, and no more memory is taken than twice what the file is long.

    Raises InvalidFile if the file is missing, damaged, or no index of this format.
    """
    path = existing_file(path, EXPECTED)
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name: _member(archive, f"{name}.npy") for name in MEMBERS}
        header = dict(json.loads(str(arrays["contract"])))
        if (form := header.pop("format")) != FORMAT:
            expected = f"{FORMAT!r}, which this version reads"
            raise InvalidFile(f"its format is {form!r}", path=path, expected=expected, hint=REMAKE)
        folder = header.pop("folder")
        if arrays["paths"].ndim != 1 or arrays["paths"].dtype.kind != "U" or not isinstance(folder, str):
            raise ValueError("its paths are no texts")
        return NpzIndex(
            embeddings=arrays["embeddings"],
            paths=tuple(arrays["paths"].tolist()),
            folder=folder,
            source=from_dict(EmbeddingSource, header),
        )
    except InvalidFile:
        raise
    except UserError as error:
        raise InvalidFile(str(error), path=path, hint=REMAKE) from error
    except Exception as error:  # zipfile, numpy and json raise a dozen types on a malicious file
        kind = kind_of_content(path)
        damaged = f"damaged, or not an index ({reason_of(error)})"
        problem = damaged if kind in (None, "index") else f"it is {KIND_NAMES[kind]}"
        raise InvalidFile(problem, path=path, expected=EXPECTED, hint=REMAKE) from error


def import_npz(index: Path, gallery: Path) -> Gallery:
    """Write the gallery of an index: paths are its ids.

    Raises InvalidFile as `read_npz_index`, and for embeddings that cannot be compared; CannotWrite as `Gallery.create`.
    """
    old = read_npz_index(index)
    try:
        return Gallery.create(
            gallery, old.embeddings, old.paths, source=old.source, columns={"path": old.paths}, folder=old.folder
        )
    except InvalidInput as error:
        raise InvalidFile(str(error), path=index, hint=REMAKE) from error


def _member(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """One array. What is stored as it is cannot unpack into more than the file holds."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with archive.open(info) as member:
        return _array(member, info.file_size, name)


def _array(member: IO[bytes], size: int, name: str) -> npt.NDArray[Any]:
    if np.lib.format.read_magic(member) != (1, 0):
        raise ValueError(f"{name} is of another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if fortran or dtype.kind not in "fU" or dtype.byteorder == ">":
        raise ValueError(f"{name} holds {dtype}, which is not plain numbers or texts")
    content = member.read()  # to the end, where zipfile checks the checksum
    count = 1
    for length in shape:
        count *= length
    if min(shape, default=0) < 0 or count * dtype.itemsize != len(content) or member.tell() != size:
        raise ValueError(f"{name} is not as long as it says")
    return np.frombuffer(content, dtype).reshape(shape)
