"""Splits: queries and a gallery drawn from crops, held-out identities, what can be evaluated. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable
from pathlib import Path

import numpy as np

from pmm.data.bad_images import unreadable_images
from pmm.data.samples import UNKNOWN_CAMERA, ReidDataset, Sample
from pmm.utils.errors import InvalidValue

PARTS_OF_SPLIT = ("train", "query", "gallery")
QUERY_CAMERA, GALLERY_CAMERA = 0, 1
"""Placeholders for unknown cameras. They differ, so that evaluation removes no crop as one of the query's camera."""


def draw_queries(samples: Iterable[Sample]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Query and gallery: the first crop of each identity and camera, and the others, both in the order of `samples`.

    Where cameras are unknown that is one query per identity.
    """
    query: list[Sample] = []
    gallery: list[Sample] = []
    seen: set[tuple[int, int]] = set()
    for sample in samples:
        key = (sample.pid, sample.camid)
        (gallery if key in seen else query).append(sample)
        seen.add(key)
    return with_cameras(query, QUERY_CAMERA), with_cameras(gallery, GALLERY_CAMERA)


def without_unreadable(split: ReidDataset) -> tuple[ReidDataset, list[str]]:
    """`split` without the queries and gallery crops that cannot be read, and why each cannot."""
    bad = unreadable_images([sample.path for sample in (*split.query, *split.gallery)])
    return without_images(split, bad), [f"{file}: {why}" for file, why in bad.items()]


def without_images(split: ReidDataset, files: Container[Path]) -> ReidDataset:
    """`split` without the crops in these files."""
    parts = {name: tuple(s for s in getattr(split, name) if s.path not in files) for name in PARTS_OF_SPLIT}
    return dataclasses.replace(split, **parts)  # type: ignore[arg-type]


def with_cameras(samples: Iterable[Sample], camid: int) -> tuple[Sample, ...]:
    """`samples`, those of unknown camera with `camid` instead."""
    return tuple(s._replace(camid=camid) if s.camid == UNKNOWN_CAMERA else s for s in samples)


def split_validation(train: tuple[Sample, ...], share: float, seed: int) -> ReidDataset:
    """Hold out `share` of the training identities, as query and gallery (see `draw_queries`); the rest is train.

    With share 0 query and gallery are empty. Raises InvalidValue if no query would have a match.
    """
    pids = sorted({sample.pid for sample in train})
    held_out = set(np.random.default_rng([seed, 1]).permutation(pids)[: round(share * len(pids))].tolist())
    if not held_out:
        return ReidDataset(train=train, query=(), gallery=())
    query, gallery = draw_queries(sample for sample in train if sample.pid in held_out)
    if not any(matchable(query, gallery)):
        problem = f"none of the {len(held_out)} identities that it holds out has crops of two cameras to match"
        hint = f"{problem} (or two crops, where cameras are unknown)"
        raise InvalidValue("--val-identities", share, "0 or a larger share", hint=hint)
    return ReidDataset(train=tuple(s for s in train if s.pid not in held_out), query=query, gallery=gallery)


def matchable(query: Iterable[Sample], gallery: Iterable[Sample]) -> list[bool]:
    """Per query, whether evaluation counts it: the gallery has a crop of its identity from another camera."""
    cameras: dict[int, set[int]] = {}
    for sample in gallery:
        cameras.setdefault(sample.pid, set()).add(sample.camid)
    return [bool(cameras.get(sample.pid, set()) - {sample.camid}) for sample in query]


def unrankable(query: Iterable[Sample], gallery: Iterable[Sample]) -> str:
    """Why metrics of this ranking would be meaningless; empty if they are not."""
    query, gallery = tuple(query), tuple(gallery)
    if not any(matchable(query, gallery)):
        return "no query has a gallery crop of its identity from another camera; nothing to evaluate"
    if len({sample.pid for sample in (*query, *gallery)}) == 1:
        return "all queries and gallery crops are of one identity, so any order is right; is the root too high?"
    return ""


def distractors(query: Iterable[Sample], gallery: Iterable[Sample]) -> int:
    """Number of gallery crops whose identity has no query."""
    pids = {sample.pid for sample in query}
    return sum(sample.pid not in pids for sample in gallery)
