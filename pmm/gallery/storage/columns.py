"""Columns of a gallery as .npy files: numbers, and texts as UTF-8 bytes with offsets; written once, then memory-mapped.

Texts that repeat are stored once: `codes` says which of them each row has.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pmm.gallery.storage.manifest import StoredFile
from pmm.utils.errors import InvalidFile, reason_of

Array: TypeAlias = npt.NDArray[Any]
Texts: TypeAlias = npt.NDArray[np.object_]
ColumnValues: TypeAlias = npt.NDArray[np.int64] | npt.NDArray[np.float64] | Texts
Ids: TypeAlias = npt.NDArray[np.int64] | Texts

DAMAGED = "restore it from a copy, or embed the folder again"
TOO_MANY_FILES = "let this process open more files (ulimit -n), or make them few with pmm gallery compact"
_BLOCK = 1 << 24
_BAD_HEADER = (ValueError, SyntaxError, TypeError, tokenize.TokenError, ArithmeticError, MemoryError, RecursionError)
"""What numpy raises for it."""
_SMALL = 1 << 16
"""Bytes that are read at once: each memory map keeps a file open."""
_OFFSETS, _BYTES, _CODES = "{}.offsets.npy", "{}.bytes.npy", "{}.codes.npy"


@dataclass(frozen=True)
class NumberColumn:
    """Numbers [N] of one chunk."""

    values: Array

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """The numbers of these rows."""
        return np.asarray(self.values[rows])

    def equal_to(self, values: Sequence[object]) -> npt.NDArray[np.bool_]:
        """Which rows [N] hold one of `values`."""
        return np.isin(self.values, np.array(list(self._held(values)), self.values.dtype))

    def _held(self, values: Sequence[object]) -> Iterator[Any]:
        """Those of `values` that a number of this kind can be equal to."""
        for value in values:
            if isinstance(value, int | float | np.integer | np.floating):
                with contextlib.suppress(OverflowError, ValueError):  # 2^70, Inf and NaN as whole numbers
                    number = self.values.dtype.type(value)
                    if number.item() == value:
                        yield number


@dataclass(frozen=True)
class TextColumn:
    """Texts of one chunk; `path` is the chunk's, for errors."""

    offsets: npt.NDArray[np.int64]
    content: npt.NDArray[np.uint8]
    codes: npt.NDArray[np.int32] | None
    path: Path

    def take(self, rows: npt.NDArray[np.int64]) -> Texts:
        """The texts of these rows. Raises InvalidFile if they lie outside the file."""
        if self.codes is None:
            return self._texts(rows)
        places, inverse = np.unique(self.checked_codes(rows), return_inverse=True)
        return self._texts(places.astype(np.int64))[inverse]

    def dictionary(self) -> Texts:
        """The texts that are stored: each different one once if there are codes, else those of all rows."""
        return self._texts(np.arange(len(self.offsets) - 1))

    def equal_to(self, values: Sequence[object]) -> npt.NDArray[np.bool_]:
        """Which rows [N] hold one of `values`."""
        wanted = {value for value in values if isinstance(value, str)}
        every = self.dictionary()
        is_one = np.fromiter((text in wanted for text in every), np.bool_, len(every))
        return is_one if self.codes is None else is_one[self.checked_codes(slice(None))]

    def checked_codes(self, rows: Any) -> npt.NDArray[np.int32]:
        """Of these rows. Raises InvalidFile for one of a text that is not there."""
        assert self.codes is not None
        codes = np.asarray(self.codes[rows])
        if len(codes) and not (codes.min() >= 0 and codes.max() < len(self.offsets) - 1):
            raise InvalidFile("damaged: a text lies outside the file", path=self.path, hint=DAMAGED)
        return codes

    def _texts(self, places: npt.NDArray[np.int64]) -> Texts:
        starts, ends = np.asarray(self.offsets[places]), np.asarray(self.offsets[places + 1])
        if ((starts < 0) | (starts > ends) | (ends > len(self.content))).any():
            raise InvalidFile("damaged: a text lies outside the file", path=self.path, hint=DAMAGED)
        texts, content = np.empty(len(places), object), memoryview(self.content)  # type: ignore[arg-type]
        try:
            texts[:] = [
                str(content[start:end], "utf-8", "surrogatepass")
                for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
            ]
        except UnicodeDecodeError as error:
            raise InvalidFile(f"damaged: a text is no UTF-8 ({error.reason})", path=self.path, hint=DAMAGED) from None
        return texts


def column_arrays(name: str, values: Array) -> dict[str, Array]:
    """File name -> array, of a column of numbers, or of texts as objects."""
    if values.dtype != object:
        return {f"{name}.npy": values}
    places: dict[str, int] = {}
    codes = np.fromiter((places.setdefault(text, len(places)) for text in values), np.int32, len(values))
    repeated = 2 * len(places) <= len(values)
    encoded = [text.encode("utf-8", "surrogatepass") for text in (places if repeated else values)]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    arrays: dict[str, Array] = {
        _OFFSETS.format(name): offsets,
        _BYTES.format(name): np.frombuffer(b"".join(encoded), np.uint8),
    }
    return {**arrays, _CODES.format(name): codes} if repeated else arrays


def key_arrays(ids: Ids) -> dict[str, Array]:
    """Two columns that find an id by bisection: sorted keys, and the row of each."""
    keys = id_keys(ids)
    order = np.argsort(keys, kind="stable")
    return {"id.keys.npy": keys[order], "id.order.npy": order.astype(np.uint32)}


def id_keys(ids: Ids) -> npt.NDArray[np.uint64]:
    """A number per id: the id itself, or of a text a hash, which two texts might share."""
    if ids.dtype != object:
        return ids.view(np.uint64)
    hashes = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in ids)
    return np.frombuffer(b"".join(hashes), "<u8").astype(np.uint64)


def write_array(path: Path, array: Array) -> StoredFile:
    """Write a .npy file and see that it is on the disk. Raises OSError."""
    array = np.ascontiguousarray(array)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    content: Any = array.reshape(-1).view(np.uint8)
    digest = hashlib.sha256(header.getvalue())
    path.unlink(missing_ok=True)  # of a killed writer; nor is a link followed
    with path.open("xb") as file:
        file.write(header.getvalue())
        for start in range(0, len(content), _BLOCK):  # not ndarray.tofile, whose errors do not say why
            block = content[start : start + _BLOCK]
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
        return StoredFile(size=file.tell(), sha256=digest.hexdigest())


class HeldFolder:
    """A folder that stays the one that it was when this object was made, whatever takes its place. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._handle: int | None = None
        self.path, self._handle = path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def size(self, name: str) -> int:
        """Bytes of the file of this relative path. Raises OSError."""
        return os.stat(name, dir_fd=self._handle).st_size

    def open(self, path: Path) -> IO[bytes]:
        """A file below the folder. Raises OSError."""
        name = path.relative_to(self.path)
        return open(name, "rb", opener=lambda file, flags: os.open(file, flags, dir_fd=self._handle))


def map_array(
    path: Path, stored: StoredFile, dtype: npt.DTypeLike, shape: tuple[int, ...], folder: HeldFolder | None = None
) -> Array:
    """The memory-mapped array in `path`, which lies below `folder`; a -1 in `shape` stands for any length.

    Raises InvalidFile if the file is not what was written, as far as its size and header tell.
    """
    try:
        with folder.open(path) if folder else path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != stored.size:
                raise ValueError(f"{os.fstat(file.fileno()).st_size} bytes, not {stored.size}")
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("of another version of .npy")
            found, fortran, kind = np.lib.format.read_array_header_1_0(file)
            size = kind.itemsize * int(np.prod(found, dtype=object))
            fits = len(found) == len(shape) and all(b in (-1, a) for a, b in zip(found, shape, strict=True))
            if fortran or kind != np.dtype(dtype) or not fits or file.tell() + size != stored.size:
                raise ValueError(f"{kind} {list(found)}, not {np.dtype(dtype)} {list(shape)}")
            if size <= _SMALL:
                return np.frombuffer(file.read(), kind).reshape(found)
            return np.memmap(file, kind, "r", file.tell(), found).view(np.ndarray)
    except FileNotFoundError:
        raise InvalidFile("it is missing", path=path, expected="a column of the gallery", hint=DAMAGED) from None
    except OSError as error:
        hint = TOO_MANY_FILES if error.errno == errno.EMFILE else ""
        raise InvalidFile(f"it cannot be read ({error.strerror})", path=path, hint=hint) from error
    except _BAD_HEADER as error:
        raise InvalidFile(f"damaged: {reason_of(error)}", path=path, hint=DAMAGED) from error
