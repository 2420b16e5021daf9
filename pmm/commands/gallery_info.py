"""What a gallery holds: crops, dimensions, columns, thresholds, and the model that made it.

pmm gallery info GALLERY [--json]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.gallery.describe import describe_gallery
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.facts import aligned, plain


@dataclass(frozen=True, kw_only=True)
class GalleryInfoCommand:
    """`pmm gallery info GALLERY [--json]`"""

    gallery: Annotated[Path, Arg("GALLERY", positional=True)]
    """Gallery written by pmm embed."""
    json: bool = False
    """Print the facts as JSON."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(GalleryInfoCommand, prog=prog, description=__doc__ or "")
    facts = plain({"gallery": {"name": command.gallery.resolve().name, **describe_gallery(command.gallery)}})
    print(json.dumps(facts, indent=2) if command.json else "\n".join(aligned(facts)))
