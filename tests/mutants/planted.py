"""The list of faults that a user would suffer from, and how one is planted into a copy of the tree."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

LISTS = Path(__file__).with_name("planted")
AREAS = (
    "adoption", "backbones", "bench", "branches", "calibration", "chain", "commands", "engines", "files", "foreign",
    "galleries", "gates", "gpus", "losses", "manifest", "metrics", "occlusions", "ops", "parity", "parts",
    "pictures", "precision", "ranks", "readers", "recipe", "reproduction", "reranking", "resizing", "resume",
    "sampler", "search", "selftest", "shipping", "statistics",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One change of one file that the suite has to notice."""

    id: str
    """AREA-WHAT-GOES-WRONG."""
    area: str
    file: str
    """From the root of the tree."""
    find: str
    """What stands in the file, once."""
    replace: str
    """What is planted in its place."""
    killers: tuple[str, ...]
    """Test files, or tests where a file takes long, that are expected to fail: the fewest and quickest."""
    why: str
    """What it would do to a user."""

    @property
    def digest(self) -> str:
        """Of the whole entry: a result is of one wording only."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def planted(self, tree: Path) -> str:
        """The text of the file with the fault in it. Raises ValueError if what it replaces is not there once."""
        path = tree / self.file
        text = path.read_text() if path.is_file() else ""
        if (found := text.count(self.find)) != 1:
            raise ValueError(f"{self.id}: its text is {found} times in {self.file}; expected once")
        return text.replace(self.find, self.replace)


def read_faults(folder: Path = LISTS) -> list[Fault]:
    """All of `folder`, an area per file. Raises TypeError for a field that is missing or unknown."""
    faults = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["fault"]:
            faults.append(Fault(area=path.stem, **{**entry, "killers": tuple(entry["killers"])}))
    return faults


def mistakes(faults: Sequence[Fault], tree: Path, *, killers: bool = True) -> Iterator[str]:
    """What is wrong with the list, a line each; with `killers`, those that `tree` has not too."""
    for fault in faults:
        try:
            if fault.planted(tree) == (tree / fault.file).read_text():
                yield f"{fault.id}: it changes nothing"
        except ValueError as error:
            yield str(error)
        if not fault.killers:
            yield f"{fault.id}: it names no killer"
        for killer in fault.killers:
            if killers and nearest(killer, tree) != killer:
                yield f"{fault.id}: there is no {killer}"


def nearest(killer: str, tree: Path) -> str:
    """`killer` if `tree` has it, else its whole file, else nothing."""
    file, _, test = killer.partition("::")
    path = tree / file
    if not path.is_file():
        return ""
    return killer if not test or f"def {test.partition('[')[0]}(" in path.read_text() else file
