import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmm.config import RecipeConfig, preset
from pmm.data.crops import preprocessing_of
from pmm.data.loader import PKSampler, augment, train_batches
from pmm.data.readers import read_dataset
from pmm.errors import UserError


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=12), st.integers(2, 4), st.integers(2, 5), st.integers(0, 2**31)
)
def test_batches_are_p_by_k(counts, p, k, seed):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    if len(counts) < p:
        with pytest.raises(UserError, match=f"a batch needs {p} identities"):
            PKSampler(labels, p, k, seed)
        return
    sampler = PKSampler(labels, p, k, seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(counts) // p
    seen = []
    for batch in batches:
        of_batch = Counter(labels[index] for index, _, _ in batch)
        assert sorted(of_batch.values()) == [k] * p
        seen += of_batch
        for label in of_batch:
            images = [index for index, _, _ in batch if labels[index] == label]
            assert len(set(images)) == k or counts[label] < k
    assert len(seen) == len(set(seen))  # an identity comes once per epoch
    positions = [position for batch in batches for _, _, position in batch]
    assert positions == list(range(len(positions)))
    assert batches == list(sampler)


def test_epochs_and_seeds_differ():
    labels = [label for label in range(20) for _ in range(4)]
    sampler = PKSampler(labels, 4, 2, seed=0)
    first = list(sampler)
    sampler.epoch = 1
    assert [i for b in list(sampler) for i, _, _ in b] != [i for b in first for i, _, _ in b]
    assert list(PKSampler(labels, 4, 2, seed=1)) != first


def test_market_has_23_iterations_an_epoch():
    assert len(PKSampler([label for label in range(751) for _ in range(4)], 32, 4, 0)) == 23


def recipe(**changes):
    base = {"flip": 0.0, "shift": 0, "cutout": 0.0, "cutout_size": (4, 3)}
    return RecipeConfig(**{**base, **changes})


PREPROCESSING = preprocessing_of(preset("tiny"))
CROP = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)


def test_without_augmentation_it_is_the_evaluation_transform():
    assert np.array_equal(
        augment(CROP, recipe(), PREPROCESSING, np.random.default_rng(0)), PREPROCESSING.normalise(CROP[None])[0]
    )


def test_flip_shift_and_cutout():
    plain = PREPROCESSING.normalise(CROP[None])[0]
    flipped = augment(CROP, recipe(flip=1.0), PREPROCESSING, np.random.default_rng(0))
    assert np.array_equal(flipped, plain[:, :, ::-1])
    cut = augment(CROP, recipe(cutout=1.0), PREPROCESSING, np.random.default_rng(0))
    assert (cut == 0).all(0).sum() == 12
    assert np.array_equal(cut[:, (cut != 0).any(0)], plain[:, (cut != 0).any(0)])
    whole = augment(CROP, recipe(cutout=1.0, cutout_size=(50, 50)), PREPROCESSING, np.random.default_rng(0))
    assert not whole.any()
    shifted = {augment(CROP, recipe(shift=2), PREPROCESSING, np.random.default_rng(s)).tobytes() for s in range(200)}
    assert len(shifted) == 25
    assert plain.tobytes() in shifted


def test_cutout_happens_half_the_time():
    rng = np.random.default_rng(1)
    hits = sum((augment(CROP, recipe(cutout=0.5), PREPROCESSING, rng) == 0).all(0).any() for _ in range(400))
    assert 160 < hits < 240


def test_batches_do_not_depend_on_the_workers(small_config, people):
    samples = read_dataset("synthetic", people).train

    def batches(workers, epoch):
        config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=workers))
        loader, sampler = train_batches(samples, config)
        sampler.epoch = epoch
        return list(loader)

    alone, two, other = batches(0, 1), batches(2, 1), batches(0, 2)
    assert len(alone) == 4
    for a, b in zip(alone, two, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert alone[0].images.shape == (12, 3, 128, 64)
    assert alone[0].images.dtype == torch.float32
    assert not torch.equal(alone[0].images, other[0].images)


def test_a_bad_image_comes_as_its_error_with_workers_too(small_config, people, tmp_path):
    samples = list(read_dataset("synthetic", people).train)
    (tmp_path / "0001_c1.jpg").write_bytes(b"")
    samples = tuple(s._replace(path=tmp_path / "0001_c1.jpg") for s in samples)
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=1))
    loader, _ = train_batches(samples, config)
    batch = next(iter(loader))
    assert isinstance(batch, UserError)
    assert "0001_c1.jpg: not a readable image" in str(batch)
