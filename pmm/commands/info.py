"""What a file is (checkpoint, ONNX file, engine, package, gallery), and what this machine has: facts for a bug report.

pmm info [FILE] [--json]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pmm.artifacts.describe import describe_artifact, in_words
from pmm.artifacts.kinds import KNOWN_KINDS, kind_of
from pmm.gallery.describe import describe_gallery, describe_npz
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.build_info import describe_build, describe_search_build
from pmm.utils.environment import describe_environment
from pmm.utils.errors import InvalidFile
from pmm.utils.facts import aligned, plain
from pmm.utils.files import existing_file


@dataclass(frozen=True, kw_only=True)
class InfoCommand:
    """`pmm info [FILE] [--json]`"""

    file: Annotated[Path | None, Arg("FILE", positional=True)] = None
    """Checkpoint, ONNX file, engine, AOTInductor package or gallery; without one, this machine."""
    json: bool = False
    """Print the facts as JSON."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(InfoCommand, prog=prog, description=__doc__ or "")
    facts = {"file": describe_file(command.file)} if command.file else {}
    facts["environment"] = describe_environment()
    if not command.json:
        facts = {name: in_words(part) for name, part in facts.items()}
        here = facts["environment"]
        here["kernels"] = describe_build(here["kernels"])
        here["search_kernel"] = describe_search_build(here["search_kernel"])
    facts = plain(facts)
    print(json.dumps(facts, indent=2) if command.json else "\n".join(aligned(facts)))


def describe_file(path: Path) -> dict[str, Any]:
    """What the file or gallery at `path` is, as plain values; its name alone, as folders name people.

    Raises InvalidFile if it is missing, damaged, or of no kind known here.
    """
    if path.is_dir():
        return {"name": path.resolve().name, **describe_gallery(path)}
    size = existing_file(path, KNOWN_KINDS).stat().st_size
    if size == 0:
        raise InvalidFile("it is empty", path=path, expected=KNOWN_KINDS)
    kind = kind_of(path)
    facts = describe_npz(path) if kind == "index" else describe_artifact(path, kind)
    return {"name": path.name, "size_mb": round(size / 1e6, 3), **facts}
