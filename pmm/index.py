"""A gallery on disk: the embeddings of a folder of crops, what made them, and exact search among them.

Loads no torch. The file is an .npz of plain arrays, without pickle.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.data.crops import Preprocessing
from pmm.errors import UserError
from pmm.files import existing_file, replacing
from pmm.manifest import EmbeddingContract
from pmm.metrics import distance_matrix
from pmm.runtime.base import Embeddings
from pmm.typed import built

FORMAT = "pmm-index-1"
MEMBERS = ("contract", "embeddings", "paths")
CHUNK_NUMBERS = 1 << 22
"""Numbers (float64) of the gallery that a search holds at once: 32 MiB."""
QUERIES_AT_ONCE = 64


class Neighbours(NamedTuple):
    """The nearest items of one query [K] or of several [Q, K], nearest first."""

    indices: npt.NDArray[np.int64]
    """Rows of the index."""
    distances: npt.NDArray[np.float64]
    """Euclidean distance or, if the contract's metric is cosine, 1 - cosine similarity."""


@dataclass(frozen=True, kw_only=True)
class IndexContract:
    """What made the embeddings, and so what a query's embedding must be made by."""

    checkpoint_sha256: str
    artifact_sha256: str
    """Of the file that ran: the checkpoint itself, an ONNX file or an engine."""
    precision: str
    """Really used: fp32, tf32, fp16, bf16 or int8."""
    embedding: EmbeddingContract
    preprocessing: Preprocessing

    def differences(self, other: IndexContract) -> list[str]:
        """`name mine, not theirs`: what keeps embeddings of `other` from being compared with these."""
        found = []
        if self.checkpoint_sha256 != other.checkpoint_sha256:
            found.append(f"checkpoint {self.checkpoint_sha256[:12]}..., not {other.checkpoint_sha256[:12]}...")
        for mine, theirs in ((self.embedding, other.embedding), (self.preprocessing, other.preprocessing)):
            names = [field.name for field in dataclasses.fields(mine)]
            pairs = [(name, getattr(mine, name), getattr(theirs, name, None)) for name in names]
            found += [f"{name} {value}, not {its}" for name, value, its in pairs if value != its]
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Embeddings float32 [N, D], N >= 1, of the images at `paths`.

    Raises UserError if they do not fit the contract or each other, or are NaN or Inf (naming the first files).
    """

    embeddings: Embeddings
    paths: tuple[str, ...]
    """Relative to `folder`, with / between."""
    folder: str
    contract: IndexContract

    def __post_init__(self) -> None:
        shape, dim = self.embeddings.shape, self.contract.embedding.dim
        if self.embeddings.dtype != np.float32 or shape != (len(self.paths), dim) or not self.paths or dim < 1:
            raise UserError(
                f"embeddings are {self.embeddings.dtype} {list(shape)} for {len(self.paths)} images; "
                f"expected float32 [{max(1, len(self.paths))}, {dim}]"
            )
        self._refuse(~np.isfinite(self.embeddings).all(1), "hold NaN or Inf; the model or the backend is broken")
        if self.contract.embedding.metric == "cosine":
            self._refuse(~self.embeddings.any(1), "are all zero and have no direction to compare by cosine")

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """Where the image of row `index` was when the index was made."""
        return Path(self.folder) / self.paths[index]

    def nearest(self, query: npt.NDArray[np.floating[Any]], top: int) -> Neighbours:
        """The `top` items nearest to each query ([D] or [Q, D]), all if there are fewer; ties go to the lower index.

        Exact: a matrix product finds the candidates, and only they are measured, by differences, in float64. Memory
        stays bounded however large the gallery. Raises UserError for a query of another dimension, NaN or Inf in it,
        or top < 1.
        """
        if top < 1:
            raise UserError(f"top is {top}; it must be at least 1")
        dim = self.embeddings.shape[1]
        if query.ndim not in (1, 2) or query.shape[-1] != dim:
            raise UserError(f"query embeddings are {list(query.shape)}; expected [{dim}] or [Q, {dim}]")
        if not np.isfinite(query).all():
            raise UserError("the query's embedding holds NaN or Inf; the model or the backend is broken")
        queries = self._vectors(np.atleast_2d(query))
        top = min(top, len(self))
        indices, squares = np.empty((len(queries), top), np.int64), np.empty((len(queries), top))
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            indices[rows], squares[rows] = self._nearest(queries[rows], top)
        # for vectors of length 1, |a - b|^2 = 2 (1 - cos)
        distances = squares / 2 if self.contract.embedding.metric == "cosine" else np.sqrt(squares)
        return Neighbours(indices[0], distances[0]) if query.ndim == 1 else Neighbours(indices, distances)

    def _nearest(
        self, queries: npt.NDArray[np.float64], top: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Indices and squared distances [Q, top] among all vectors, chunk by chunk."""
        best: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]
        best = [(np.empty(0, np.int64), np.empty(0))] * len(queries)
        step = max(1, CHUNK_NUMBERS // queries.shape[1])
        for start in range(0, len(self), step):
            chunk = self._vectors(self.embeddings[start : start + step])
            about = distance_matrix(queries, chunk, "euclidean")
            error = _largest_error(queries, chunk)
            for q, row in enumerate(about):
                near = _candidates(row, error, best[q][1], top)
                # not the matrix product's: its rounding depends on where a row lies, so equal rows would not tie
                gap = chunk[near] - queries[q]
                squares = np.concatenate([best[q][1], np.einsum("nd,nd->n", gap, gap)])
                order = np.argsort(squares, kind="stable")[:top]
                best[q] = np.concatenate([best[q][0], start + near])[order], squares[order]
        return np.stack([indices for indices, _ in best]), np.stack([squares for _, squares in best])

    def _vectors(self, embeddings: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """As they are compared: in float64, for cosine of length 1. Raises UserError for a query without direction."""
        vectors = np.asarray(embeddings, np.float64)
        if self.contract.embedding.metric == "euclidean":
            return vectors
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not lengths.all():
            raise UserError("the query's embedding is all zero and has no direction to compare by cosine")
        return vectors / lengths

    def _refuse(self, bad: Any, reason: str) -> None:
        """Raise UserError naming the first files of the rows where `bad` [N] is true, if any."""
        rows = np.flatnonzero(bad)
        if len(rows):
            names = ", ".join(self.paths[row] for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
            raise UserError(f"{len(rows)} of {len(self)} embeddings {reason}: {names}")

    def save(self, path: str | Path) -> None:
        """Write the index whole or not at all; equal content gives equal bytes. Raises UserError for a full disk."""
        header = {"format": FORMAT, "folder": self.folder, **dataclasses.asdict(self.contract)}
        arrays = {
            "contract": np.array(json.dumps(header, sort_keys=True)),
            "embeddings": np.ascontiguousarray(self.embeddings, "<f4"),
            "paths": np.array(self.paths),
        }
        with replacing(Path(path)) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name in MEMBERS:
                # np.savez would write the time of day into the file
                entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                with archive.open(entry, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, arrays[name], version=(1, 0), allow_pickle=False)

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Read what `save` wrote; no code inside the file is run, and no more memory is taken than the file is long.

        Raises UserError if the file is missing, damaged, or no index of this format.
        """
        path = existing_file(path, "an index written by pmm.embed")
        try:
            with zipfile.ZipFile(path) as archive:
                found = {name: _member(archive, f"{name}.npy") for name in MEMBERS}
            header = dict(json.loads(str(found["contract"])))
            if (form := header.pop("format")) != FORMAT:
                raise UserError(f"format {form!r}; this version reads {FORMAT!r}")
            folder = header.pop("folder")
            if found["paths"].ndim != 1 or found["paths"].dtype.kind != "U" or not isinstance(folder, str):
                raise ValueError("its paths are no texts")
            return cls(
                embeddings=found["embeddings"],
                paths=tuple(found["paths"].tolist()),
                folder=folder,
                contract=built(IndexContract, header),
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except Exception as error:  # zipfile, numpy and json raise a dozen types on a file made to harm
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise UserError(f"{path}: damaged, or not an index written by pmm.embed ({reason})") from error


def _largest_error(queries: npt.NDArray[np.float64], vectors: npt.NDArray[np.float64]) -> float:
    """How wrong rounding makes a squared distance that is computed as |q|^2 + |v|^2 - 2 q.v, at most."""
    longest = sum(np.sqrt(np.einsum("nd,nd->n", rows, rows).max()) for rows in (queries, vectors))
    return float((queries.shape[1] + 4) * np.finfo(np.float64).eps * longest**2)


def _candidates(
    about: npt.NDArray[np.float64], error: float, best: npt.NDArray[np.float64], top: int
) -> npt.NDArray[np.int64]:
    """Which of the squared distances `about` [N], each wrong by `error` at most, can be among the `top` least, given
    the least ones so far."""
    bound = np.inf if len(about) <= top else np.partition(about, top - 1)[top - 1] + 2 * error
    if len(best) == top:
        bound = min(bound, best[-1] + error)
    return np.flatnonzero(about <= bound)


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
