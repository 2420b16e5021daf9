"""A gallery on disk: the embeddings of a folder of crops, what made them, and exact search among them.

Loads no torch. The file is an .npz of plain arrays, without pickle.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.artifacts.kinds import KIND_NAMES, kind_of_content
from pmm.evaluation.distances import MEMORY_LIMIT, Blocks, EmbeddingDistances, EmbeddingMatrix
from pmm.evaluation.nearest import nearest
from pmm.gallery.source import EmbeddingSource as IndexContract
from pmm.runtime.base import Embeddings
from pmm.utils.errors import CannotWrite, InvalidFile, InvalidInput, InvalidValue, UserError, reason_of
from pmm.utils.files import existing_file, output_file, replacing, sha256
from pmm.utils.from_dict import from_dict

FORMAT = "pmm-index-1"
MEMBERS = ("contract", "embeddings", "paths")
BROKEN = "the model or the backend is broken"
REMAKE = "write one with pmm embed"


class Neighbours(NamedTuple):
    """The nearest items of one query [K] or of several [Q, K], nearest first."""

    indices: npt.NDArray[np.int64]
    """Rows of the index."""
    distances: npt.NDArray[np.float64]
    """Euclidean distance or, if the contract's metric is cosine, 1 - cosine similarity."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Embeddings float32 [N, D], N >= 1, of the images at `paths`.

    Raises InvalidInput if they do not fit the contract or each other, or are NaN or Inf (naming the first files).
    """

    embeddings: Embeddings
    paths: tuple[str, ...]
    """Relative to `folder`, with / between."""
    folder: str
    contract: IndexContract

    def __post_init__(self) -> None:
        shape, dim = self.embeddings.shape, self.contract.embedding.dim
        if self.embeddings.dtype != np.float32 or shape != (len(self.paths), dim) or not self.paths or dim < 1:
            raise InvalidInput(
                f"embeddings are {self.embeddings.dtype} {list(shape)} for {len(self.paths)} images",
                expected=f"float32 [{max(1, len(self.paths))}, {dim}]",
            )
        self._refuse(~np.isfinite(self.embeddings).all(1), "hold NaN or Inf", BROKEN)
        if self.contract.embedding.metric == "cosine":
            self._refuse(~self.embeddings.any(1), "are all zero and have no direction to compare by cosine")

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """Where the image of row `index` was when the index was made."""
        return Path(self.folder) / self.paths[index]

    def nearest(self, query: npt.NDArray[np.floating[Any]], top: int) -> Neighbours:
        """The `top` items nearest to each query ([D] or [Q, D]), all if there are fewer; ties go to the lower index.

        Exact, and the same for any number of queries at once (`pmm.evaluation.nearest`). Memory stays bounded however
        large the gallery. Raises InvalidInput for a query of another dimension, NaN or Inf in it, or all zero where the
        metric is cosine; InvalidValue for top < 1.
        """
        if top < 1:
            raise InvalidValue("top", top, "at least 1")
        dim, metric = self.embeddings.shape[1], self.contract.embedding.metric
        if query.ndim not in (1, 2) or query.shape[-1] != dim:
            raise InvalidInput(f"query embeddings are {list(query.shape)}", expected=f"[{dim}] or [Q, {dim}]")
        if not np.isfinite(query).all():
            raise InvalidInput("the query's embedding holds NaN or Inf", hint=BROKEN)
        queries = EmbeddingMatrix(np.atleast_2d(query), metric=metric, name="query embeddings")
        between = EmbeddingDistances(queries, self._matrix)
        blocks = Blocks.within(MEMORY_LIMIT, between.shape, dim, 1)
        indices, halves, _ = nearest(between, min(top, len(self)), blocks)
        distances = halves if metric == "cosine" else np.sqrt(2 * halves * between.factor)
        return Neighbours(indices[0], distances[0]) if query.ndim == 1 else Neighbours(indices, distances)

    @cached_property
    def _matrix(self) -> EmbeddingMatrix:
        return EmbeddingMatrix(self.embeddings, metric=self.contract.embedding.metric)

    def _refuse(self, bad: Any, problem: str, hint: str = "") -> None:
        """Raise InvalidInput naming the first files of the rows where `bad` [N] is true, if any."""
        rows = np.flatnonzero(bad)
        if len(rows):
            names = ", ".join(self.paths[row] for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
            problem = f"{len(rows)} of {len(self)} embeddings {problem}: {names}"
            raise InvalidInput(problem, index=int(rows[0]), hint=hint)

    def save(self, path: str | Path) -> None:
        """Write the index whole or not at all; equal content gives equal bytes.

        Raises CannotWrite for a full disk, or another kind of file at `path`.
        """
        target = output_file(Path(path))
        if target.is_file() and (kind := kind_of_content(target)) not in (None, "index"):
            raise CannotWrite(f"it is {KIND_NAMES[kind]}", path=path, hint="give the index another name")
        header = {"format": FORMAT, "folder": self.folder, **dataclasses.asdict(self.contract)}
        arrays = {
            "contract": np.array(json.dumps(header, sort_keys=True)),
            "embeddings": np.ascontiguousarray(self.embeddings, "<f4"),
            "paths": np.array(self.paths),
        }
        with replacing(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name in MEMBERS:
                # np.savez would write the time of day into the file
                entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                with archive.open(entry, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, arrays[name], version=(1, 0), allow_pickle=False)

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Read what `save` wrote; no code inside the file is run, and no more memory is taken than the file is long.

        Raises InvalidFile if the file is missing, damaged, or no index of this format.
        """
        path = existing_file(path, "an index written by pmm embed")
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
            return cls(
                embeddings=arrays["embeddings"],
                paths=tuple(arrays["paths"].tolist()),
                folder=folder,
                contract=from_dict(IndexContract, header),
            )
        except InvalidFile:
            raise
        except UserError as error:
            raise InvalidFile(str(error), path=path, hint=REMAKE) from error
        except Exception as error:  # zipfile, numpy and json raise a dozen types on a malicious file
            kind = kind_of_content(path)
            damaged = f"damaged, or not an index ({reason_of(error)})"
            problem = damaged if kind in (None, "index") else f"it is {KIND_NAMES[kind]}"
            raise InvalidFile(problem, path=path, expected="an index written by pmm embed", hint=REMAKE) from error


def describe_index(path: Path) -> dict[str, Any]:
    """What the index at `path` holds, as plain values. Raises InvalidFile as `Index.load`."""
    index = Index.load(path)
    return {
        "kind": "index",
        "sha256": sha256(path),
        "images": len(index),
        "dimensions": index.embeddings.shape[1],
        **dataclasses.asdict(index.contract),
        "preprocessing": index.contract.preprocessing.facts(),
    }


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
