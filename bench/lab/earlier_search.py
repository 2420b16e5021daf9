"""The search before short codes, out of the history of this repository: what others are compared with."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "cd0e28bf2562b58d03e3ab8651af286a93702f56"
PACKAGE = "pmm_before_short_codes"


class EarlierSearch(NamedTuple):
    """Its two modules."""

    distances: Any
    nearest: Any


def earlier_search(folder: Path) -> EarlierSearch | None:
    """The modules as they were, written to `folder` first; None where there is no git or not all of the history."""
    package = folder / PACKAGE
    package.mkdir()
    for name in EarlierSearch._fields:
        command = ["git", "-C", str(ROOT), "show", f"{COMMIT}:pmm/{name}.py"]
        try:
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None
        text = re.sub(
            r"from pmm\.errors", "from pmm.utils.errors", re.sub(r"from pmm\.distances", "from .distances", text)
        )
        (package / f"{name}.py").write_text(text)
    sys.path.insert(0, str(folder))
    try:
        return EarlierSearch(*(importlib.import_module(f"{PACKAGE}.{name}") for name in EarlierSearch._fields))
    finally:
        sys.path.remove(str(folder))
