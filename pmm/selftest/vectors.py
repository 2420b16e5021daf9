"""The files of a selftest: MODEL.selftest.json, what it is of and how to judge, and MODEL.selftest.npz, the arrays.

The arrays: `crop_0`, `crop_1`, ... uint8 RGB [h, w, 3]; `expected` float32 [N, D], their embeddings in that order; and
for each mistake `mistake_NAME` float32 [N, D], the embeddings that a client gets who makes it. What computed the
expected ones computes those too, but for files in int8: there it is the file itself, as it clips what is far from
right, and `own` float32 [N, D] is what it makes of the crops.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.artifacts.artifact import selftest_paths
from pmm.data.preprocessing import Crops
from pmm.selftest.crops import SIZED
from pmm.utils.errors import InvalidFile, InvalidValue, UserError
from pmm.utils.files import existing_file
from pmm.utils.from_dict import from_dict

FORMAT = "pmm-selftest-1"
AGAIN = "export the file again, which writes its selftest beside it"
WORD = re.compile(r"[a-z0-9_]{1,40}")
MAX_SIDE, MAX_CROPS, MAX_DIM, MAX_MISTAKES = 8192, 64, 1 << 17, 64
MAX_BYTES, MAX_JSON = 1 << 26, 1 << 20
"""Of all arrays together, and of the JSON."""
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")
"""The one with the most digits first."""
LEAST_COSINE, MOST_NORM_ERROR = 0.8, 0.8
"""No tolerance is wider."""
NPY_HEADER = 4096
"""Most bytes before the numbers of an array."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far embeddings may be from the expected ones, row by row."""

    min_cosine: float
    max_norm_error: float
    """Relative to the expected norm."""

    def __post_init__(self) -> None:
        if not LEAST_COSINE <= self.min_cosine <= 1:
            raise InvalidValue("min_cosine", self.min_cosine, f"{LEAST_COSINE} to 1")
        if not 0 <= self.max_norm_error <= MOST_NORM_ERROR:
            raise InvalidValue("max_norm_error", self.max_norm_error, f"0 to {MOST_NORM_ERROR}")


@dataclass(frozen=True, kw_only=True)
class MeasuredDifference:
    """How far the artifact's own embeddings of the crops were, at export."""

    min_cosine: float
    max_norm_error: float
    ran_on: str


@dataclass(frozen=True, kw_only=True)
class SelftestCrop:
    """One of the crops, in the order of the rows."""

    name: str
    """As --write-images names it."""
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class KnownMistake:
    """A mistake whose embeddings are in the file."""

    name: str
    description: str
    fix: str
    resizes: bool
    """It shows in crops alone that have not the model's size."""


@dataclass(frozen=True, kw_only=True)
class SelftestVectors:
    """What all files that are made from one network, with one contract, have in common."""

    reference: str
    """What computed the embeddings, in words."""
    source_sha256: str
    """Of the checkpoint, or the adopted ONNX file."""
    height: int
    width: int
    """Of the model's crops."""
    normalised: bool
    """Embeddings have norm 1."""
    crops: tuple[SelftestCrop, ...]
    mistakes: tuple[KnownMistake, ...]
    impossible: dict[str, str]
    """Mistakes that cannot be made with this file, and why."""
    rounding: Tolerance
    """Of rows whose crops are resized, where it is wider: what one grey level more or less in half of their pixels
    does."""
    has_own: bool = False
    """Whether the mistakes' embeddings, and those that are its `own`, are of the file itself."""
    arrays: dict[str, npt.NDArray[Any]] = field(repr=False)

    @property
    def expected(self) -> npt.NDArray[np.float32]:
        """[N, D]."""
        return self.arrays["expected"]

    @property
    def own(self) -> npt.NDArray[np.float32]:
        """[N, D]: of the crops, by what computed the mistakes' embeddings."""
        return self.arrays["own"] if self.has_own else self.expected

    @property
    def images(self) -> list[Crops]:
        """The crops, each uint8 RGB [h, w, 3]."""
        return [self.arrays[f"crop_{row}"] for row in range(len(self.crops))]

    def wrong(self, name: str) -> npt.NDArray[np.float32]:
        """The embeddings [N, D] of a client who makes the mistake `name`."""
        return self.arrays[f"mistake_{name}"]

    @property
    def sized(self) -> list[int]:
        """The rows whose crops have the model's size, so that no resize touches them."""
        size = (self.height, self.width)
        return [row for row, crop in enumerate(self.crops) if (crop.height, crop.width) == size]


@dataclass(frozen=True, kw_only=True)
class Selftest:
    """The selftest of one artifact."""

    vectors: SelftestVectors
    artifact_sha256: str
    precision: str
    """Of the artifact."""
    tolerances: dict[str, Tolerance]
    """By the precision that it is computed in."""
    measured: MeasuredDifference | None = None
    """None where it did not run at export."""


@dataclass(frozen=True, kw_only=True)
class _SelftestJson:
    """The JSON file."""

    format: str
    artifact_sha256: str
    vectors_sha256: str
    precision: str
    dim: int
    tolerances: dict[str, Tolerance]
    measured: MeasuredDifference | None
    reference: str
    source_sha256: str
    height: int
    width: int
    normalised: bool
    crops: tuple[SelftestCrop, ...]
    mistakes: tuple[KnownMistake, ...]
    impossible: dict[str, str]
    rounding: Tolerance
    has_own: bool

    def __post_init__(self) -> None:
        sides = [self.height, self.width, *(side for crop in self.crops for side in (crop.height, crop.width))]
        if not 1 <= len(self.crops) <= MAX_CROPS or not all(1 <= side <= MAX_SIDE for side in sides):
            raise ValueError(f"its crops are not 1 to {MAX_CROPS}, of sides of 1 to {MAX_SIDE} pixels")
        if not 1 <= self.dim <= MAX_DIM or len(self.mistakes) > MAX_MISTAKES:
            raise ValueError(f"its embeddings have {self.dim} numbers, for {len(self.mistakes)} mistakes")
        if not all(WORD.fullmatch(each.name) for each in self.mistakes):
            raise ValueError("the name of a mistake is no word")
        if not all(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}\.png", each.name) for each in self.crops):
            raise ValueError("the name of a crop is no name of a PNG file")
        for named in (self.crops, self.mistakes):
            if len({each.name for each in named}) < len(named):
                raise ValueError("two of its crops, or of its mistakes, have one name")
        if [(crop.height, crop.width) for crop in self.crops[:SIZED]] != [(self.height, self.width)] * SIZED:
            raise ValueError(f"its first {SIZED} crops have not the model's size")
        if self.precision not in self.tolerances or not self.tolerances.keys() <= set(PRECISIONS):
            raise ValueError(f"tolerances for {list(self.tolerances)[:5]}, and the file is {self.precision[:20]}")
        total = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in self.shapes().values())
        if total > MAX_BYTES:
            raise ValueError(f"its arrays have {total / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f}")

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name of each array -> its type and its shape."""
        rows = ("<f4", (len(self.crops), self.dim))
        crops = {f"crop_{row}": ("|u1", (crop.height, crop.width, 3)) for row, crop in enumerate(self.crops)}
        own = {"own": rows} if self.has_own else {}
        return {**crops, "expected": rows, **own, **{f"mistake_{each.name}": rows for each in self.mistakes}}


def selftest_files(selftest: Selftest) -> tuple[bytes, bytes]:
    """The content of the two files, JSON and npz; the same bytes for the same selftest."""
    vectors = selftest.vectors
    npz = _npz(vectors.arrays)
    shared = {each.name: getattr(vectors, each.name) for each in dataclasses.fields(vectors) if each.name != "arrays"}
    content = _SelftestJson(
        format=FORMAT,
        artifact_sha256=selftest.artifact_sha256,
        vectors_sha256=hashlib.sha256(npz).hexdigest(),
        precision=selftest.precision,
        dim=vectors.expected.shape[1],
        tolerances=selftest.tolerances,
        measured=selftest.measured,
        **shared,
    )
    return (json.dumps(dataclasses.asdict(content), indent=2) + "\n").encode(), npz


def read_selftest(artifact: Path, digest: str) -> Selftest:
    """The selftest beside `artifact`, whose SHA-256 is `digest`.

    Raises InvalidFile if there is none, or it is damaged, or of another file.
    """
    json_path, npz_path = selftest_paths(artifact)
    if not json_path.exists() or not npz_path.exists():
        missing = json_path if not json_path.exists() else npz_path
        raise InvalidFile(f"no selftest beside it ({missing.name} is missing)", path=artifact, hint=AGAIN)
    try:
        content = from_dict(_SelftestJson, json.loads(_bounded(existing_file(json_path, "a selftest"), MAX_JSON)))
        if content.format != FORMAT:
            raise ValueError(f"its format is {content.format[:40]!r}, not {FORMAT!r}")
    except (UserError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidFile(f"not a selftest ({error})", path=json_path, hint=AGAIN) from error
    if content.artifact_sha256 != digest:
        problem = (
            f"it is of a file with the SHA-256 {content.artifact_sha256[:12]}..., and {artifact} has {digest[:12]}..."
        )
        raise InvalidFile(problem, path=json_path, hint=AGAIN)
    npz = _bounded(existing_file(npz_path, "the arrays of a selftest"), 2 * MAX_BYTES)
    if hashlib.sha256(npz).hexdigest() != content.vectors_sha256:
        raise InvalidFile(f"it was changed: {json_path.name} names another SHA-256", path=npz_path, hint=AGAIN)
    try:
        arrays = {name: _array(npz, name, *kind) for name, kind in content.shapes().items()}
    except Exception as error:  # numpy and zipfile raise a dozen types on a malicious file
        raise InvalidFile(f"its arrays cannot be read ({error})", path=npz_path, hint=AGAIN) from error
    shared = {each.name for each in dataclasses.fields(SelftestVectors)} - {"arrays"}
    vectors = SelftestVectors(**{name: getattr(content, name) for name in shared}, arrays=arrays)
    return Selftest(
        vectors=vectors,
        artifact_sha256=content.artifact_sha256,
        precision=content.precision,
        tolerances=content.tolerances,
        measured=content.measured,
    )


def _bounded(path: Path, most: int) -> bytes:
    """Raises InvalidFile beyond `most` bytes."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InvalidFile(f"it has more than {most / 1e6:.0f} MB", path=path, hint=AGAIN)
    return content


def _npz(arrays: dict[str, npt.NDArray[Any]]) -> bytes:
    """As numpy.savez_compressed, without the time of the day."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _array(npz: bytes, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Raises ValueError, and what numpy and zipfile raise, for another type, shape or size, and for NaN."""
    with zipfile.ZipFile(io.BytesIO(npz)) as archive:
        entry = archive.getinfo(f"{name}.npy")
        if not 0 < entry.file_size - np.dtype(dtype).itemsize * int(np.prod(shape)) <= NPY_HEADER:
            raise ValueError(f"{name} is not {list(shape)}")
        array = np.lib.format.read_array(io.BytesIO(archive.read(entry)), allow_pickle=False)
    if array.dtype.str != dtype or array.shape != shape:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not {list(shape)}")
    if dtype == "<f4" and not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or Inf")
    return array
