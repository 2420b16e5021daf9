"""Camera, time and free columns of crops, from their file names or from a CSV table. Loads no torch."""

from __future__ import annotations

import csv
import logging
import math
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.gallery.storage.manifest import COLUMN_NAME, ColumnKind
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue, printable
from pmm.utils.facts import how_many
from pmm.utils.files import existing_file

Column = npt.NDArray[Any]
"""Values [N] of N crops: int64, float64, or texts as objects."""
NAME_PATTERNS = {
    "market1501": r"(?:^|/)(?P<pid>-?\d+)_c(?P<camera>\d+)s(?P<time>\d+_\d+)_",
    "dukemtmc-reid": r"(?:^|/)(?P<pid>-?\d+)_c(?P<camera>\d+)_f(?P<time>\d+)",
}
"""Data set -> what its file names say. Their times count frames, Market-1501's with the sequence before the frame."""
FILLED = ("id", "embeddings", "path", "file_size", "file_modified_ns")
"""Columns that `pmm embed` fills itself."""
NO_KINDS: Mapping[str, ColumnKind] = {}
TIME_EXPECTED = "seconds as a number, or a date as 2026-05-01T14:30:00 (UTC where it names no zone)"
TABLE_EXPECTED = "a CSV table with a column path, and any of camera, time and columns of your own"


def parse_time(text: str) -> float:
    """Seconds: a number as it is (1_000451 is 1000451), or those since 1970 of an ISO 8601 date, in UTC where it names
    no zone. Raises ValueError for anything else."""
    text = text.strip()
    try:
        seconds = float(text)
    except ValueError:
        date = datetime.fromisoformat(text)
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(text)
    return seconds


def name_pattern(text: str) -> re.Pattern[str]:
    """The expression that `--names` is: a name of `NAME_PATTERNS`, or a regular expression with named groups.

    Raises InvalidValue.
    """
    expected = "market1501, dukemtmc-reid, or a regular expression with named groups, as 'c(?P<camera>\\d+)_(?P<time>"
    expected += "\\d+)'"
    try:
        pattern = re.compile(NAME_PATTERNS.get(text, text))
    except re.error as error:
        raise InvalidValue("--names", text, expected, hint=f"it is no regular expression: {error}") from error
    if not pattern.groupindex:
        raise InvalidValue("--names", text, expected)
    for name in pattern.groupindex:
        if fault := _fault_of_name(name):
            raise InvalidValue("--names", text, hint=f"rename the group {name}: {fault}")
    return pattern


def columns_of_names(
    pattern: re.Pattern[str], paths: Sequence[str], where: Path, kinds: Mapping[str, ColumnKind] = NO_KINDS
) -> dict[str, Column]:
    """A column for each named group of `pattern`, searched in each of `paths`, relative to the folder `where`; of the
    kind that `kinds` has for it, if any.

    Raises InvalidFile for names without a match, or with a time that is none.
    """
    matches = [pattern.search(path) for path in paths]
    _refuse_some(
        [path for path, match in zip(paths, matches, strict=True) if match is None],
        len(paths), "file names do not match --names", where, f"names that match {pattern.pattern}",
    )  # fmt: skip
    groups = {name: [match[name] or "" for match in matches if match] for name in pattern.groupindex}
    return {
        name: _typed(name, values, lambda row: str(where / paths[row]), kinds.get(name))
        for name, values in groups.items()
    }


def columns_of_table(
    table: Path, paths: Sequence[str], folder: Path, kinds: Mapping[str, ColumnKind] = NO_KINDS
) -> dict[str, Column]:
    """The columns of the CSV `table` but for path, in the order of `paths`, which are relative to `folder`.

    Lines about other files are passed over, and counted in a warning (logger "pmm"). Raises InvalidFile for a table
    that is none, a path twice, an image without a line, or a time that is none.
    """
    lines = _lines_by_path(table, folder)
    _refuse_some([path for path in paths if path not in lines], len(paths), "images have no line in it", table)
    known = set(paths)
    if unused := [path for path in lines if path not in known]:
        text = f"{table}: {how_many(len(unused), 'line')} of no image in {folder}, the first of {unused[0]}"
        logging.getLogger("pmm").warning("%s", printable(text))
    rows = [lines[path] for path in paths]
    names = next(iter(lines.values()))[1].keys()
    where = lambda row: f"{table}, line {rows[row][0]}"  # noqa: E731
    return {name: _typed(name, [values[name] for _, values in rows], where, kinds.get(name)) for name in names}


def crop_columns(
    folder: Path,
    paths: Sequence[str],
    *,
    names: re.Pattern[str] | None = None,
    table: Path | None = None,
    kinds: Mapping[str, ColumnKind] = NO_KINDS,
) -> dict[str, Column]:
    """What file names and a table say together. Raises InvalidFile, ConflictingOptions if both give one column."""
    by_name = columns_of_names(names, paths, folder, kinds) if names else {}
    by_table = columns_of_table(table, paths, folder, kinds) if table else {}
    if both := by_name.keys() & by_table.keys():
        problem = f"--names and --metadata both give the column {', '.join(sorted(both))}"
        raise ConflictingOptions(problem, "--names", "--metadata", hint="leave it out of one")
    return {**by_name, **by_table}


def _lines_by_path(table: Path, folder: Path) -> dict[str, tuple[int, dict[str, str]]]:
    """Path relative to the folder -> number of its line, and its values by column."""
    existing_file(table, TABLE_EXPECTED)
    lines: dict[str, tuple[int, dict[str, str]]] = {}
    with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, table)
            for cells in filter(None, reader):
                if len(cells) != len(header):
                    problem = f"line {reader.line_num} has {how_many(len(cells), 'cell')}"
                    raise InvalidFile(problem, path=table, expected=f"{len(header)}, as its first line has")
                values = dict(zip(header, cells, strict=True))
                path = _relative(values.pop("path"), folder)
                if path in lines:
                    problem = f"lines {lines[path][0]} and {reader.line_num} are both of {path}"
                    raise InvalidFile(problem, path=table, hint="remove one")
                lines[path] = (reader.line_num, values)
        except csv.Error as error:
            raise InvalidFile(f"line {reader.line_num}: {error}", path=table, expected=TABLE_EXPECTED) from error
    if not lines:
        raise InvalidFile("it has no line below its header", path=table, expected=TABLE_EXPECTED)
    return lines


def _check_header(header: Sequence[str], table: Path) -> None:
    if "path" not in header:
        shown = f": it has {', '.join(header[:5])}" if any(header) else ""
        raise InvalidFile(f"no column path{shown}", path=table, expected=TABLE_EXPECTED)
    for place, name in enumerate(header):
        if not name or name in header[:place]:
            problem = f"column {place + 1} has no name" if not name else f"two columns are named {name}"
            raise InvalidFile(problem, path=table, expected="a name of its own for each column")
        if name != "path" and (fault := _fault_of_name(name)):
            raise InvalidFile(f"rename its column {name}: {fault}", path=table)


def _fault_of_name(name: str) -> str:
    if name in FILLED:
        return f"pmm embed fills {name} itself"
    return "" if COLUMN_NAME.fullmatch(name) else "names are of small letters, digits and _"


def _relative(path: str, folder: Path) -> str:
    """As `images_below` names it: relative to the folder, with / between."""
    path = posixpath.normpath(path.strip().replace("\\", "/"))
    for place in (folder, folder.resolve()):
        if Path(path).is_relative_to(place):
            return Path(path).relative_to(place).as_posix()
    return path


def _typed(name: str, values: Sequence[str], place: Callable[[int], str], kind: ColumnKind | None) -> Column:
    """Cameras are texts, times seconds; other columns whole numbers or numbers if all values are, else texts; unless a
    `kind` is wanted.

    Raises InvalidFile with the `place` of a value that cannot be.
    """
    wanted = kind or {"camera": "text", "time": "float64"}.get(name)
    if wanted == "text":
        return np.array([value.strip() for value in values] if name == "camera" else values, object)
    parse = parse_time if name == "time" else int if wanted == "int64" else float
    if wanted:
        numbers = np.empty(len(values), wanted)
        for row, value in enumerate(values):
            try:
                numbers[row] = parse(value)
            except (ValueError, OverflowError) as error:
                expected = TIME_EXPECTED if name == "time" else f"a {'whole ' * (wanted == 'int64')}number"
                raise InvalidFile(f"{name} is '{value}'", path=place(row), expected=expected) from error
        return numbers
    for number in (np.int64, np.float64):
        try:
            numbers = np.array([number(value) for value in values], number)
        except (ValueError, OverflowError):
            continue
        if np.isfinite(numbers).all():
            return numbers
    return np.array(values, object)


def _refuse_some(bad: Sequence[str], of: int, problem: str, where: Path, expected: str = "") -> None:
    """Raises InvalidFile with the first of what is `bad`, if anything is."""
    if bad:
        first = ", ".join(bad[:3]) + ", ..." * (len(bad) > 3)
        raise InvalidFile(f"{len(bad)} of {of} {problem}: {first}", path=where, expected=expected)
