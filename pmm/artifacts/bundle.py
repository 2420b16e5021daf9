"""A folder that is handed over: an exported file with all that belongs to it, sealed by the hash of each. Loads no
torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pmm.utils.errors import InvalidFile
from pmm.utils.files import sha256, write_file
from pmm.utils.from_dict import from_dict

SEAL = "bundle.json"
SCHEMA = "pmm-bundle-1"
AGAIN = "copy the folder again, or make it anew with pmm ship"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What `SEAL` says of its folder."""

    artifact: str
    """Name of the exported file."""
    backend: str
    """What runs it, as --backend names it."""
    precision: Literal["fp32", "tf32", "fp16", "bf16", "int8"]
    """In which."""
    files: dict[str, str]
    """Name of each file in the folder, with / between, and its SHA-256."""
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema[:60]!r}; expected {SCHEMA!r}")
        for name in self.files:
            parts = PurePosixPath(name).parts
            if not parts or name != "/".join(parts) or "\\" in name or ".." in parts or name.startswith("/"):
                raise ValueError(f"the file name {name[:60]!r}")
        if self.artifact not in self.files:
            raise ValueError(f"no file {self.artifact[:60]!r}")


def is_bundle(path: Path) -> bool:
    """Whether `path` is a folder with something that is named as a seal."""
    return path.is_dir() and (path / SEAL).exists()


def only_sealed(folder: Path) -> bool:
    """Whether `folder` holds a readable seal that lists every file in it."""
    try:
        bundle = _read_seal(folder)
    except InvalidFile:
        return False
    return not _added(folder, bundle)


def _added(folder: Path, bundle: Bundle) -> list[Path]:
    """What lies in `folder` and `bundle` does not name, links to folders too; in the order of the names."""
    names = {*bundle.files, SEAL}
    inside = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [path for path in inside if path.relative_to(folder).as_posix() not in names]


def seal(folder: Path, *, artifact: str, backend: str, precision: str) -> Bundle:
    """Write `SEAL`, the hashes of all files in `folder`, into it: the last step of making a bundle."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
    values = {"artifact": artifact, "backend": backend, "precision": precision, "files": files}
    bundle = from_dict(Bundle, {**values, "schema": SCHEMA})
    write_file(folder / SEAL, json.dumps(dataclasses.asdict(bundle), indent=2) + "\n")
    return bundle


def read_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`, whose files are those that were sealed, and no others.

    Raises InvalidFile for a folder without a readable seal, and for a file that is missing, was changed or added, or is
    a link.
    """
    bundle = _read_seal(folder)
    for name, digest in bundle.files.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise InvalidFile("it is missing", path=file, expected=f"a file, as {SEAL} says", hint=AGAIN)
        if (found := sha256(file)) != digest:
            problem = f"its SHA-256 is {found[:12]}..., not {digest[:12]}... as {SEAL} says: another file, or changed"
            raise InvalidFile(problem, path=file, hint=AGAIN)
    for file in _added(folder, bundle)[:1]:
        raise InvalidFile(f"it was added later: {SEAL} does not list it", path=file, hint="move it out of the folder")
    return bundle


def _read_seal(folder: Path) -> Bundle:
    path = folder / SEAL
    try:
        return from_dict(Bundle, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InvalidFile(f"it holds no {SEAL}", path=folder, expected="a folder of pmm ship") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"it is not a seal of pmm ship ({type(error).__name__}: {str(error)[:120]})"
        raise InvalidFile(problem, path=path, hint=AGAIN) from error
