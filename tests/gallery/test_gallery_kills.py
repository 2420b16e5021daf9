"""A writer that is killed: what it reported is there, nothing is half, and the next writer goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pmm.gallery.gallery import Gallery
from pmm.gallery.storage import changes, short_codes
from tests.conftest import ROOT

DIM, ROWS = 16, 40
WRITER = """
import sys
from pathlib import Path
from tests.gallery.test_gallery_kills import take_step
path, step = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    take_step(path, step)
    step += 1
    print(step, flush=True)
"""


def step_of(number: int) -> tuple[str, np.ndarray]:
    """What is done in a step, and of which ids."""
    kind = ("create", "add", "add", "remove", "compact")[number % 5 if number else 0]
    kind = "add" if kind == "create" and number else kind
    return kind, np.arange(number * ROWS, number * ROWS + ROWS)


def rows_of(ids: np.ndarray) -> tuple[np.ndarray, dict[str, list[str]]]:
    """The embeddings and columns of some ids."""
    embeddings = np.sin(ids[:, None] * np.arange(1, DIM + 1)).astype(np.float32)
    return embeddings, {"camera": [f"c{each % 3}" for each in ids], "path": [f"{each}.jpg" for each in ids]}


def take_step(path: Path, number: int) -> None:
    kind, ids = step_of(number)
    if kind == "create":
        embeddings, columns = rows_of(ids)
        Gallery.create(path, embeddings, ids, columns=columns)
    elif kind == "add":
        Gallery.open(path).add(rows_of(ids)[0], ids, rows_of(ids)[1])
    elif kind == "remove":
        Gallery.open(path).remove(ids - ROWS)
    else:
        Gallery.open(path).compact()


def ids_after(steps: int) -> list[int]:
    """The ids that are there after so many steps."""
    held: dict[int, None] = {}
    for number in range(steps):
        kind, ids = step_of(number)
        if kind in ("create", "add"):
            held |= dict.fromkeys(ids.tolist())
        elif kind == "remove":
            held = {each: None for each in held if each not in (ids - ROWS)}
    return list(held)


def check(path: Path, reported: int) -> int:
    """The gallery is what it was after the steps that were reported, or one more; how many these are."""
    if not reported and not (path / "manifest.json").exists():
        return 0
    gallery = Gallery.open(path)
    ids = gallery.column("id").tolist()
    assert gallery.verify() == []
    assert ids in (ids_after(reported), ids_after(reported + 1))
    embeddings, columns = rows_of(np.array(ids))
    assert np.array_equal(gallery.embeddings(), embeddings)
    assert gallery.column("camera").tolist() == columns["camera"]
    # equal ids after either: it was done if the manifest says so
    return reported + (ids != ids_after(reported))


def files_below(path: Path) -> set[str]:
    return {each.relative_to(path).as_posix() for each in path.rglob("*.npy")}


def named_files(gallery: Gallery) -> set[str]:
    return {f"{place}/{name}" for place, folder in gallery.manifest.folders().items() for name in folder.files}


def killed_at(path: Path, number: int, event: int) -> bool:
    """Take a step in a process that is killed just before it opens, renames or removes a file for the so manieth time;
    whether it was killed, and had not ended."""
    child = os.fork()
    if not child:
        left = [event]

        def watch(name: str, _: object) -> None:
            if name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            take_step(path, number)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("stride", [47, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_file(tmp_path, monkeypatch, stride):
    """Each step is tried until it is not killed: at its first file, its next, and so on."""
    monkeypatch.setattr(changes, "CHUNK_BYTES", 64 * DIM * 4)
    monkeypatch.setattr(short_codes, "MAX_GROWTH", 2)
    monkeypatch.setattr(changes, "FOLD", 2)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the machine goes on
    path, kills = tmp_path / "people", 0
    for number in range(6):
        event = number % stride
        while killed_at(path, number, event):
            done = check(path, number)
            kills += 1
            if done > number:
                break
            event += stride
        assert check(path, number) == number + (ids_after(number) != ids_after(number + 1))
    gallery = Gallery.open(path)
    gallery.add(np.ones((1, DIM)), [-1], {"camera": ["x"], "path": [""]})
    assert files_below(path) == named_files(gallery)
    assert kills > 150 / stride


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    """Twenty times, by a signal from outside."""
    path, steps, moments = tmp_path / "people", 0, random.Random(0)
    for _ in range(20):
        words = [sys.executable, "-c", WRITER, str(path), str(steps)]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout
            assert writer.stdout.readline() == "ready\n"
            time.sleep(moments.random() * 0.6)
            writer.kill()
            reported = [int(line) for line in writer.stdout.read().splitlines()]
        steps = check(path, max(reported, default=steps))
        if steps and step_of(steps)[0] == "compact":  # whether it was done shows nowhere else
            Gallery.open(path).compact()
            steps += 1
    assert steps > 20
