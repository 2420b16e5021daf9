"""Data sets on disk -> `Split`. Loads no torch."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from pmm.config import SYNTHETIC
from pmm.data.samples import Sample, Split
from pmm.errors import UserError

# Folders below the root in which a data set is looked for, first match wins.
PLACES: dict[str, tuple[str, ...]] = {
    "market1501": ("", "market1501", "Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15"),
    SYNTHETIC: ("",),
}
DEFAULT_LAYOUT = "market1501"
"""Of a root that nothing else says the layout of."""
PARTS = ("bounding_box_train", "query", "bounding_box_test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
JUNK = -1
_NAME = re.compile(r"([-\d]+)_c(\d+)")


def read_dataset(name: str, root: str | Path) -> Split:
    """The data set `name` under `root`: junk (pid -1) dropped, distractors (pid 0) kept, cameras zero-based.

    Synthetic people are on disk as Market-1501 and are read by the same code. Raises UserError for an unknown name, a
    missing folder, another layout (saying what was found), an empty part or a file name without identity and camera.
    """
    if name not in PLACES:
        raise UserError(f"unknown data set '{name}'; known: {', '.join(PLACES)}")
    folder = _locate(name, Path(root))
    train, query, gallery = (_read_folder(folder / part) for part in PARTS)
    for part, samples in zip(PARTS, (train, query, gallery), strict=True):
        if not samples:
            raise UserError(f"{folder / part} holds no usable image; expected names like 0002_c1s1_000451_03.jpg")
    return Split(train=train, query=query, gallery=gallery)


def split_validation(train: tuple[Sample, ...], share: float, seed: int) -> Split:
    """Hold `share` of the training identities out: the rest is train, one crop per held-out identity and camera is
    query, their other crops are gallery. With share 0 query and gallery are empty."""
    pids = sorted({sample.pid for sample in train})
    held = set(np.random.default_rng([seed, 1]).permutation(pids)[: round(share * len(pids))].tolist())
    if not held:
        return Split(train=train, query=(), gallery=())
    query: list[Sample] = []
    gallery: list[Sample] = []
    seen: set[tuple[int, int]] = set()
    for sample in train:
        if sample.pid in held:
            first = (sample.pid, sample.camid) not in seen
            seen.add((sample.pid, sample.camid))
            (query if first else gallery).append(sample)
    kept = tuple(sample for sample in train if sample.pid not in held)
    if not any(q.pid == g.pid and q.camid != g.camid for q in query for g in gallery):
        raise UserError(
            f"val_identities={share} holds out {len(held)} identities, but none has crops of two cameras to match; "
            "use --val-identities 0 or a larger share"
        )
    return Split(train=kept, query=tuple(query), gallery=tuple(gallery))


def _locate(name: str, root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected the root of {name}")
    for place in PLACES[name]:
        if all((root / place / part).is_dir() for part in PARTS):
            return root / place
    found = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in root.iterdir())
    listed = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "") if found else "nothing"
    raise UserError(f"{root} has not the layout of {name}: expected the folders {', '.join(PARTS)}; found {listed}")


def _read_folder(folder: Path) -> tuple[Sample, ...]:
    samples = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        match = _NAME.match(path.name)
        if match is None or not re.fullmatch(r"-?\d+", match[1]) or int(match[2]) < 1:
            raise UserError(f"{path}: no identity and camera in the name; expected names like 0002_c1s1_000451_03.jpg")
        if int(match[1]) != JUNK:
            samples.append(Sample(path, int(match[1]), int(match[2]) - 1))
    return tuple(samples)
