"""The embeddings that a client wrote, as .csv or .npy. Runs nothing of the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.utils.errors import InvalidFile, reason_of
from pmm.utils.files import existing_file

EXPECTED = "a .csv file with one line of numbers for each crop, or a .npy file [N, D]"
NAME = re.compile(r"[A-Za-z_][\w .-]*")
"""In a header."""
MOST_BYTES = 1 << 28


def read_client_embeddings(path: Path) -> npt.NDArray[np.float64]:
    """The embeddings [N, D] in `path`: a .npy file, or text with commas, semicolons, tabs or spaces between numbers, of
    which a first line and a first column of names are passed over.

    Raises InvalidFile for files that hold something else.
    """
    path = existing_file(path, EXPECTED)
    if path.stat().st_size > MOST_BYTES:
        raise InvalidFile(f"it has {path.stat().st_size / 1e6:.0f} MB", path=path, expected=EXPECTED)
    with path.open("rb") as file:
        is_npy = file.read(6) == b"\x93NUMPY"
    return _of_npy(path) if is_npy else _of_text(path)


def _of_npy(path: Path) -> npt.NDArray[np.float64]:
    try:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy raises several types on a damaged file
        reason = "it holds Python objects" if "allow_pickle" in str(error) else reason_of(error)
        raise InvalidFile(f"it cannot be read ({reason})", path=path, expected=EXPECTED) from error
    if array.ndim == 4 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InvalidFile(f"it is {array.dtype} {list(array.shape)}", path=path, expected="numbers [N, D]")
    return array.astype(np.float64)


def _of_text(path: Path) -> npt.NDArray[np.float64]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InvalidFile("it is neither text nor a .npy file", path=path, expected=EXPECTED) from error
    if "\0" in "".join(lines[:1]):
        raise InvalidFile("it is neither text nor a .npy file", path=path, expected=EXPECTED)
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    rows = [(number, _words(line)) for number, line in numbered]
    if rows and (kind := _of_a_library(rows[0][1], rows[0][0], lines)):
        raise InvalidFile(f"it is {kind}", path=path, expected=EXPECTED, hint="write numbers and commas alone")
    if len(rows) > 1 and all(NAME.fullmatch(word) and not _is_number(word) for word in rows[0][1]):
        rows = rows[1:]
    if rows and all(len(words) > 1 and not _is_number(words[0]) for _, words in rows):
        rows = [(number, words[1:]) for number, words in rows]
    if not rows:
        raise InvalidFile("it holds no numbers", path=path, expected=EXPECTED)
    length = len(rows[0][1])
    for number, words in rows:
        if (text := next((word for word in words if not _is_number(word)), None)) is not None:
            raise InvalidFile(f"line {number} holds {text[:40]!r}, which is no number", path=path, expected=EXPECTED)
        if len(words) != length:
            problem = f"line {number} has {len(words)} numbers, line {rows[0][0]} has {length}"
            raise InvalidFile(problem, path=path, expected=EXPECTED)
    return np.array([list(map(float, words)) for _, words in rows])


def _of_a_library(words: list[str], number: int, lines: list[str]) -> str:
    """What text it is whose first line of numbers has these words; empty if it is plain."""
    first = lines[number - 1]
    if re.match(r"\[\s*\[|\{|\[$", first):
        return "JSON, or an array as it is printed"
    if first.startswith("[") and first.endswith(";"):
        return "a Mat as OpenCV prints it"
    names = words[1:] if not words[0] else words
    if len(names) > 1 and names == [str(place) for place in range(len(names))]:
        return "a table with a header of numbers: to_csv(..., header=False, index=False) of pandas leaves it out"
    return ""


def _words(line: str) -> list[str]:
    """With semicolons between, commas are those of decimals."""
    if ";" in line:
        return [word.strip().strip('"').replace(",", ".") for word in line.strip(";").split(";")]
    split = line.rstrip(",").split(",") if "," in line else re.split(r"\s+", line)
    return [word.strip().strip('"[]') for word in split]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return "_" not in word
