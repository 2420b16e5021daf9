"""MSMT17: folders of crops and four lists of `path pid`, whose lines are all checked. Loads no torch.

Train is list_train and list_val; identities of train and of test are both numbered from 0, but are different people.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pmm.data.dataset_specs import DatasetSpec
from pmm.data.left_out import is_image_name
from pmm.data.samples import Sample
from pmm.data.scan import Scan, fault_of
from pmm.utils.errors import printable

_PID = re.compile(r"\d{1,9}", re.ASCII)
_CAMERA = re.compile(r"\d{1,4}", re.ASCII)
_LONGEST_QUOTE = 60


def camera_of_msmt17(name: str) -> int | None:
    """Zero-based camera in a file name as 0000_000_01_0303morning_0015_0.jpg (its third field, from 01); or None."""
    fields = name.split("_")
    if len(fields) < 4 or not _CAMERA.fullmatch(fields[2]) or int(fields[2]) < 1:
        return None
    return int(fields[2]) - 1


def parse_line(line: str) -> tuple[str, int] | None:
    """Path (which may still lead anywhere) and identity of a list's line; None if it is not `path pid`."""
    path, _, pid = line.strip().replace("\t", " ").rpartition(" ")
    path = path.rstrip().removeprefix("./")
    if not path.isprintable() or not is_image_name(path.rpartition("/")[2]) or not _PID.fullmatch(pid):
        return None
    return path, int(pid)


def leaves_folder(path: str) -> bool:
    """Whether a listed path is absolute or has parts, such as `..`, that may lead out of its folder."""
    return any(part in ("", ".", "..") for part in path.split("/"))


def scan_msmt17(spec: DatasetSpec, folder: Path) -> Scan:
    """The crops that the lists name, in their order."""
    scan = Scan(spec, folder, f"folders {', '.join(spec.folders)}; {', '.join(spec.lists)}")
    train, test = (_Images(folder / name, scan) for name in spec.folders)
    of_train, of_val, of_query, of_gallery = (folder / name for name in spec.lists)
    scan.train = (*train.named_in(of_train), *train.named_in(of_val))
    scan.query, scan.gallery = tuple(test.named_in(of_query)), tuple(test.named_in(of_gallery))
    for part, lists in (("train", (of_train,)), ("query", (of_query,)), ("gallery", (of_gallery,))):
        if not scan.parts()[part]:
            scan.add_problem("names no usable image", f"expected lines like '0000/{spec.example} 0'", lists[0])
    return scan


class _Images:
    """The crops below one folder. Each folder is listed once: 126,000 calls to the file system would take minutes."""

    def __init__(self, root: Path, scan: Scan) -> None:
        self.root, self.scan = root, scan
        self.faults: dict[str, dict[str, str | None]] = {}
        self.named: dict[str, tuple[str, str]] = {}

    def named_in(self, file: Path) -> Iterator[Sample]:
        for number, raw in enumerate(file.read_bytes().splitlines(), 1):
            if not raw.strip():
                continue
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                line = raw.decode("utf-8", "surrogateescape")
                self.scan.add_problem("bytes that are no UTF-8", f"found {_quoted(line)}", file, number)
                continue
            parsed = parse_line(line)
            if parsed is None:
                self.scan.add_problem("not a line of 'path pid'", f"found {_quoted(line)}", file, number)
                continue
            path, pid = parsed
            camid = camera_of_msmt17(path.rpartition("/")[2])
            if fault := self._fault(path, f"{file.name}:{number}"):
                self.scan.add_problem(*fault, file, number)
            elif camid is None:
                expected = f"expected its number from 01 in the third field, as in {self.scan.spec.example}"
                self.scan.add_problem("no camera in the name", f"found {_quoted(path)}, {expected}", file, number)
            else:
                yield Sample(self.root / path, pid, camid)

    def _fault(self, path: str, where: str) -> tuple[str, str] | None:
        """Kind and detail of what is wrong with a listed path, if anything is."""
        quoted = _quoted(path)
        if "\\" in path:
            return "a path with \\", f"found {quoted}, expected /"
        if leaves_folder(path):
            return "a path that leaves the folder", f"found {quoted}, expected a path below {printable(self.root)}"
        stem = os.path.splitext(path)[0]
        first, seen = self.named.setdefault(stem, (path, where))
        if seen != where:
            if first == path:
                return "the same file twice", f"{quoted} is named by {seen} already; remove one of the lines"
            return "duplicate names", f"{quoted} differs in the suffix only from {_quoted(first)} of {seen}; remove one"
        folder, _, name = path.rpartition("/")
        if folder not in self.faults:
            self.faults[folder] = self._list(folder)
        fault = self.faults[folder].get(name, "a file that is missing")
        if not fault:
            return None
        prefix = f"{self.root.name}/"
        if path.startswith(prefix) and (self.root / path.removeprefix(prefix)).is_file():
            return "a path that is not relative to its folder", f"found {quoted}, expected it without {prefix}"
        return fault, f"{quoted} is not in {printable(self.root)}; restore the file, or remove the line"

    def _list(self, folder: str) -> dict[str, str | None]:
        try:
            with os.scandir(self.root / folder) as entries:
                return {entry.name: fault_of(entry) for entry in entries if is_image_name(entry.name)}
        except PermissionError:
            raise
        except OSError:  # no such folder, a name too long for one
            return {}


def _quoted(text: str) -> str:
    text = printable(text)
    return f"'{text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + '...'}'"
