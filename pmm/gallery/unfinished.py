"""Galleries that are being made: what makes them is said in their folder, so that the same command can go on."""

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
"""In a gallery that a run has not finished: what that run was told."""
WORK_FOLDER = ".upgrade"
"""In a gallery that is upgraded in its place: the new one, until it is complete."""


def check_new_gallery(out: Path) -> None:
    """Raise CannotWrite unless a gallery can be made at `out`."""
    if out.suffix.lower() == ".npz":
        raise CannotWrite("a gallery is a folder", path=out, hint=f"name it {out.stem}/")
    check_new(out)
    with claimed(out):  # whether it can be written
        pass


@contextlib.contextmanager
def begun_job(gallery: Path, facts: Mapping[str, str]) -> Iterator[None]:
    """Say in the folder of a gallery, before it is made, what makes it; if it is not made, nothing is left."""
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
    """What an unfinished gallery was begun with; empty if that cannot be read, None for a finished one."""
    try:
        facts = json.loads((gallery / JOB_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def give_up_unfinished(gallery: Path) -> None:
    """Remove what says that a run has not finished a gallery, which is held, and what an upgrade has embedded.

    Raises CannotWrite for an upgrade that runs.
    """
    work = gallery / WORK_FOLDER
    with writing(work) if is_gallery(work) else contextlib.nullcontext():
        shutil.rmtree(work, ignore_errors=True)
    (gallery / JOB_FILE).unlink(missing_ok=True)
