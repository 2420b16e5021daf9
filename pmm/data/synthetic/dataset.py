"""Writes a synthetic re-identification data set to disk in the folders and file names of Market-1501.

Every crop has a random generator of its own, seeded by the data set's seed and by what the crop is (part, identity,
camera, number). So the files are the same byte for byte whatever the number of worker processes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from pmm.config import fast_mode
from pmm.data.synthetic.camera import Camera, sample_cameras
from pmm.data.synthetic.draw import draw_crop, draw_junk
from pmm.data.synthetic.identity import Identity, sample_identities
from pmm.utils.errors import CannotWrite, InvalidValue
from pmm.utils.files import cannot_write, make_folder
from pmm.utils.hardware import usable_cores

FAST_IDS = 12
FORMAT = 1
"""Raised whenever the same arguments draw other pictures."""
TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
MAX_IDS = 4999
"""Train and test identities share the four digits of a file name."""
MAX_CAMERAS = 9
"""A camera is one digit of a file name."""
JUNK_SHARE = 0.03

_TRAIN_CROPS = 2
_GALLERY_CROPS = 2
_CHUNK = 64  # crops per task: small enough for an even load and a lively progress bar
# What a crop is; first word of its seed. New values go to the end, else every picture changes.
_KINDS = ("world", TRAIN, QUERY, GALLERY, "distractor", "junk", "cameras")


@dataclass(frozen=True, kw_only=True)
class _CropFile:
    """One file to write."""

    kind: str
    person: int
    """Index into the identities of the crop's kind; for junk and distractors, not the pid."""
    camera: int
    """Zero-based, as everywhere but in file names."""
    index: int
    file: str
    """Path below the data set's folder."""


@dataclass(frozen=True, kw_only=True)
class _World:
    """What all crops of a data set share; small enough to be sent to each worker process."""

    seed: int
    cameras: Sequence[Camera]
    train: Sequence[Identity]
    test: Sequence[Identity]
    distractors: Sequence[Identity]


def draw_dataset(
    out: Path,
    *,
    ids: int,
    seed: int,
    cameras: int = 6,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw `ids` train identities and `ids` others to test on, and return what `synthetic.json` then holds.

    Train: 2 crops per identity and camera. Test: 1 query and 2 gallery crops per identity and camera; one crop in five
    of the gallery shows a distractor (pid 0), and 3 % more are junk (pid -1). No file is there twice.

    `workers` processes draw (default: one per CPU core; 1 draws in this process). `progress(done, total)` is called in
    this process with numbers of crops. `out` appears complete or not at all.

    Raises InvalidValue for a number out of range, CannotWrite if `out` is not empty or cannot be written.
    """
    out = Path(out)
    _check(out, ids=ids, seed=seed, cameras=cameras, workers=workers)
    cores = usable_cores()
    world = _create_world(ids=ids, seed=seed, cameras=cameras)
    crops = _plan(world)
    counts = {folder: sum(crop.file.startswith(folder + "/") for crop in crops) for folder in (TRAIN, QUERY, GALLERY)}
    summary = {
        "format": FORMAT,
        "ids": ids,
        "seed": seed,
        "cameras": cameras,
        "counts": counts
        | {kind: sum(crop.kind == kind for crop in crops) for kind in ("distractor", "junk")}
        | {"distractor_ids": len(world.distractors)},
        "versions": {"numpy": np.__version__, "pillow": PIL.__version__},
    }
    make_folder(out.parent)
    # Beside `out`, thus on the same file system: the last step is one rename.
    unfinished = out.parent / f".{out.name}.drawing-{os.getpid()}"
    try:
        for folder in counts:
            (unfinished / folder).mkdir(parents=True)
        _draw_all(world, crops, unfinished, min(workers or cores, cores), progress)
        (unfinished / "synthetic.json").write_text(json.dumps(summary, indent=2) + "\n")
        if out.exists():
            out.rmdir()  # empty, as checked above
        unfinished.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return summary


def _check(out: Path, *, ids: int, seed: int, cameras: int, workers: int | None) -> None:
    if not 2 <= ids <= MAX_IDS:
        raise InvalidValue("ids", ids, f"2 to {MAX_IDS} train identities")
    if seed < 0:
        raise InvalidValue("seed", seed, "0 or more")
    if not 2 <= cameras <= MAX_CAMERAS:
        raise InvalidValue("cameras", cameras, f"2 to {MAX_CAMERAS}", hint="a match needs two cameras")
    if workers is not None and workers < 1:
        raise InvalidValue("workers", workers, "1 or more", hint="leave it out for one per CPU core")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CannotWrite(
            "it exists and is not empty", path=out, expected="a new folder", hint="delete it or choose another one"
        )


def _create_world(*, ids: int, seed: int, cameras: int) -> _World:
    rng = _generator(seed, "world", 0, 0, 0)
    train = sample_identities(rng, ids)
    test = sample_identities(rng, ids, forbidden=train)
    # One crop per camera of half as many people as are tested: 0.5 of 0.5 + 2, that is 20 % of the gallery.
    distractors = sample_identities(rng, (ids + 1) // 2, forbidden=[*train, *test])
    # Cameras of their own generator: one seed has the same cameras, however many people walk past them.
    views = sample_cameras(_generator(seed, "cameras", 0, 0, 0), cameras)
    return _World(seed=seed, cameras=views, train=train, test=test, distractors=distractors)


def _plan(world: _World) -> list[_CropFile]:
    """All files of the data set, in a fixed order."""
    crops = []
    for camera in range(len(world.cameras)):
        for person in range(len(world.train)):
            for index in range(_TRAIN_CROPS):
                crops.append(_crop(TRAIN, TRAIN, person, camera, index, pid=1 + person))
        for person in range(len(world.test)):
            pid = 1 + len(world.train) + person
            crops.append(_crop(QUERY, QUERY, person, camera, 0, pid=pid))
            for index in range(_GALLERY_CROPS):
                # Frames of the gallery follow the query's, as in one walk past the camera.
                crops.append(_crop(GALLERY, GALLERY, person, camera, index, pid=pid, frame=pid * 100 + 1 + index))
        for person in range(len(world.distractors)):
            crops.append(_crop("distractor", GALLERY, person, camera, 0, pid=0, frame=person + 1))
    gallery = sum(crop.kind in (GALLERY, "distractor") for crop in crops)
    for number in range(max(1, round(JUNK_SHARE * gallery))):
        crops.append(_crop("junk", GALLERY, number, number % len(world.cameras), 0, pid=-1, frame=number + 1))
    return crops


def _crop(
    kind: str, folder: str, person: int, camera: int, index: int, *, pid: int, frame: int | None = None
) -> _CropFile:
    """`frame` (six digits) makes the name unique within its folder, pid and camera."""
    name = "-1" if pid < 0 else f"{pid:04d}"
    frame = pid * 100 + index if frame is None else frame
    file = f"{folder}/{name}_c{camera + 1}s1_{frame:06d}_{index:02d}.jpg"
    return _CropFile(kind=kind, person=person, camera=camera, index=index, file=file)


def _draw_all(
    world: _World,
    crops: Sequence[_CropFile],
    folder: Path,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    chunks = [crops[start : start + _CHUNK] for start in range(0, len(crops), _CHUNK)]
    done = 0
    if workers == 1:
        for number in (_draw_chunk(world, folder, chunk) for chunk in chunks):
            done = _report(done + number, len(crops), progress)
        return
    with ProcessPoolExecutor(min(workers, len(chunks)), initializer=_start_worker, initargs=(world, folder)) as pool:
        try:
            for future in as_completed([pool.submit(_draw_in_worker, chunk) for chunk in chunks]):
                done = _report(done + future.result(), len(crops), progress)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else an interrupt would first draw all that is queued
            raise


def _report(done: int, total: int, progress: Callable[[int, int], None] | None) -> int:
    if progress is not None:
        progress(done, total)
    return done


# A worker process receives the world once, not with every chunk.
_worker_task: tuple[_World, Path] | None = None


def _start_worker(world: _World, folder: Path) -> None:
    global _worker_task
    _worker_task = (world, folder)


def _draw_in_worker(crops: Sequence[_CropFile]) -> int:
    assert _worker_task is not None
    return _draw_chunk(*_worker_task, crops)


def _draw_chunk(world: _World, folder: Path, crops: Iterable[_CropFile]) -> int:
    """Draw and write some crops; return how many."""
    number = 0
    for crop in crops:
        pixels = _draw(world, crop)
        # Every encoder setting that could change with a library's default is given.
        Image.fromarray(pixels).save(folder / crop.file, "JPEG", quality=85, subsampling="4:2:0", optimize=False)
        number += 1
    return number


def _draw(world: _World, crop: _CropFile) -> np.ndarray:
    rng = _generator(world.seed, crop.kind, crop.person, crop.camera, crop.index)
    camera = world.cameras[crop.camera]
    # Passers-by of the test are people of the test: no test appearance is ever seen in training.
    if crop.kind == TRAIN:
        return draw_crop(world.train[crop.person], camera, rng, world.train)
    if crop.kind == "junk":
        return draw_junk(camera, rng, [*world.test, *world.distractors])
    people = world.distractors if crop.kind == "distractor" else world.test
    return draw_crop(people[crop.person], camera, rng, world.test)


def _generator(seed: int, kind: str, person: int, camera: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, _KINDS.index(kind), person, camera, index])


def draw_people(out: Path, *, ids: int, seed: int, cameras: int = 6, workers: int = 0) -> None:
    """Draw with a progress bar; at most a few identities if PMM_FAST=1."""
    from tqdm import tqdm

    if fast_mode():
        ids = min(ids, FAST_IDS)
    with tqdm(desc=f"drawing synthetic identities into {out}", unit="img", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        drawn = draw_dataset(out, ids=ids, seed=seed, cameras=cameras, workers=workers or None, progress=progress)
    counts = ", ".join(f"{count} {name}" for name, count in drawn["counts"].items())
    print(f"{out}: {ids} + {ids} synthetic identities, seed {seed} ({counts})")
