"""Unfinished galleries: their folder says which command makes them, so that the same command can continue."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pmm.gallery.creation import check_new
from pmm.gallery.storage.manifest import is_gallery
from pmm.gallery.storage.writer import writing
from pmm.utils.errors import CannotWrite
from pmm.utils.files import claimed, write_file

JOB_FILE = ".embedding.json"
"""In a gallery that a run has not finished: the options of that run."""
WORK_FOLDER = ".upgrade"
"""In a gallery that is upgraded in place: the new one, until it is complete."""


def check_new_gallery(out: Path) -> None:
    """Raise CannotWrite unless a gallery can be made at `out`."""
    if out.suffix.lower() == ".npz":
        raise CannotWrite("a gallery is a folder", path=out, hint=f"name it {out.stem}/")
    check_new(out)
    with claimed(out):  # whether it can be written
        pass


@contextlib.contextmanager
def begun_job(gallery: Path, facts: Mapping[str, str]) -> Iterator[None]:
    """Write into a new gallery's folder what makes it; if making it fails, nothing is left behind."""
    check_new(gallery)
    new = not gallery.exists()
    try:
        write_file(gallery / JOB_FILE, json.dumps(facts, indent=1) + "\n")
        yield
    except BaseException:
        if not is_gallery(gallery):
            (gallery / JOB_FILE).unlink(missing_ok=True)
            if new:
                shutil.rmtree(gallery, ignore_errors=True)
        raise


def facts_of_begun(gallery: Path) -> dict[str, Any] | None:
    """The options that an unfinished gallery was begun with; empty if they cannot be read, None for a finished one."""
    try:
        facts = json.loads((gallery / JOB_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def give_up_unfinished(gallery: Path) -> None:
    """Remove from a locked gallery the mark of an unfinished run, and what an unfinished upgrade has embedded.

    Raises CannotWrite if an upgrade is running.
    """
    work = gallery / WORK_FOLDER
    with writing(work) if is_gallery(work) else contextlib.nullcontext():
        shutil.rmtree(work, ignore_errors=True)
    (gallery / JOB_FILE).unlink(missing_ok=True)
