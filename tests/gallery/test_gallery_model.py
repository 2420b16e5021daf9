"""Any sequence of changes of a gallery, against a dictionary: what is in it, and what every search finds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.exact_search.rotation import Rotation
from pmm.gallery.filters import RowFilter
from pmm.gallery.gallery import Gallery
from pmm.gallery.storage import changes, short_codes
from pmm.utils.errors import InvalidInput
from tests.conftest import examples

DIM = 6
CAMERAS = ["gate", "yard", ""]

steps = st.lists(
    st.tuples(st.sampled_from(["add", "add", "remove", "compact", "open"]), st.integers(0, 1 << 30)), max_size=7
)


@dataclass
class DictGallery:
    """id -> embedding and camera, in the order of the rows."""

    rows: dict[object, tuple[np.ndarray, str]] = field(default_factory=dict)

    def nearest(self, queries: np.ndarray, k: int, metric: str, cameras: list[str], not_camera: list[str] | None):
        """Ids and half squared distances of each query, by brute force."""
        ids = [each for each, (_, camera) in self.rows.items() if camera in cameras]
        stored = np.array([self.rows[each][0] for each in ids])
        between = EmbeddingDistances(EmbeddingMatrix(queries, metric=metric), EmbeddingMatrix(stored, metric=metric))
        pairs = np.divmod(np.arange(len(queries) * len(ids)), len(ids))
        distances = between.exact_pairs(*pairs).reshape(len(queries), len(ids)) * between.factor
        for query, row in enumerate(distances):
            keep = [i for i in range(len(ids)) if not_camera is None or self.rows[ids[i]][1] != not_camera[query]]
            order = sorted(keep, key=lambda item: row[item])[:k]
            yield [ids[item] for item in order], row[order]


@given(
    seed=st.integers(0, 1 << 30),
    steps=steps,
    metric=st.sampled_from(["euclidean", "cosine"]),
    precision=st.sampled_from(["fp32", "fp16"]),
    text=st.booleans(),
)
@examples(60)
def test_it_holds_and_finds_what_a_dictionary_does(tmp_path_factory, seed, steps, metric, precision, text):
    path = tmp_path_factory.mktemp("gallery") / "people"
    rng = np.random.default_rng(seed)
    model = DictGallery()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(changes, "best_rotation", lambda sample, metric, _: Rotation.fit(sample, 3, metric))
        patch.setattr(short_codes, "SAMPLE", 4)
        patch.setattr(changes, "FOLD", 3)
        patch.setattr(changes, "CHUNK_BYTES", 8 * DIM * 4)
        gallery = Gallery.create(path, *new_rows(rng, model, metric, precision, text, 3), metric, precision=precision,
                                 columns={"camera": cameras_of(model, 3)})  # fmt: skip
        for step, number in steps:
            rng = np.random.default_rng(number)
            if step == "add":
                count = int(rng.integers(0, 9))
                rows = new_rows(rng, model, metric, precision, text, count)
                gallery.add(*rows, {"camera": cameras_of(model, count)})
            elif step == "remove" and model.rows:
                known = [each for each in model.rows if rng.random() < 0.4]
                strange = [each for each in ([name(text, 1000)]) if rng.random() < 0.5]
                assert gallery.remove([*known, *strange]) == len(known)
                for each in known:
                    del model.rows[each]
            elif step == "compact":
                gallery.compact()
            else:
                gallery = Gallery.open(path)
            check(gallery, model, rng, metric)
        assert gallery.verify() == []


def check(gallery: Gallery, model: DictGallery, rng: np.random.Generator, metric: str) -> None:
    assert len(gallery) == len(model.rows)
    assert gallery.column("id").tolist() == list(model.rows)
    assert gallery.column("camera").tolist() == [camera for _, camera in model.rows.values()]
    assert np.array_equal(gallery.embeddings(), np.array([row for row, _ in model.rows.values()]).reshape(-1, DIM))
    queries = rng.integers(1, 4, (2, DIM)).astype(np.float32)
    k = int(rng.integers(1, 12))
    kept = [CAMERAS[0], CAMERAS[2]] if rng.random() < 0.5 else CAMERAS
    own = rng.choice(CAMERAS, 2).tolist() if rng.random() < 0.5 else None
    where = RowFilter(cameras=kept) if len(kept) < 3 else None
    if not any(camera in kept for _, camera in model.rows.values()):
        if where:
            with pytest.raises(InvalidInput):
                gallery.search(queries, k, where=where, not_camera=own)
        return
    expected = list(model.nearest(queries, k, metric, kept, own))
    found = gallery.search(queries, k, where=where, not_camera=own)
    if not any(ids for ids, _ in expected):
        assert found.ids.size == 0
        return
    limit = float(np.median(found.distances[np.isfinite(found.distances)]))
    near = gallery.within(queries, limit, where=where, not_camera=own)
    for query, (ids, halves) in enumerate(expected):
        distances = halves if metric == "cosine" else np.sqrt(2 * halves)
        there = found.rows[query] >= 0
        assert found.ids[query][there].tolist() == ids
        assert np.array_equal(found.distances[query][there], distances)
        assert np.isinf(found.distances[query][~there]).all()
    for near_query, (ids, halves) in zip(near, model.nearest(queries, 99, metric, kept, own), strict=True):
        inside = (halves if metric == "cosine" else np.sqrt(2 * halves)) <= limit
        assert near_query.ids.tolist() == [each for each, is_in in zip(ids, inside, strict=True) if is_in]


def new_rows(rng, model, metric, precision, text, count):
    """Few different embeddings: many ties. Ids that were removed come back."""
    free = [each for each in (name(text, number) for number in rng.permutation(80).tolist()) if each not in model.rows]
    ids = free[:count]
    embeddings = rng.integers(1, 4, (count, DIM)) / 3
    stored = embeddings.astype(np.float16 if precision == "fp16" else np.float32).astype(np.float32)
    for each, row in zip(ids, stored, strict=True):
        model.rows[each] = (row, str(rng.choice(CAMERAS)))
    return embeddings, ids


def cameras_of(model: DictGallery, count: int) -> list[str]:
    return [camera for _, camera in model.rows.values()][len(model.rows) - count :]


def name(text: bool, number: int) -> object:
    return f"cröp\n{number}" if text else number - 40
