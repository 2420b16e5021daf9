import dataclasses
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmm.config import RecipeConfig, preset
from pmm.data.crops import load_crop, preprocessing_of
from pmm.data.loader import PKSampler, TrainBatch, draw_augmentation, shift_into, to_images, train_batches
from pmm.data.readers import read_dataset
from pmm.data.samples import class_indices
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
CPU = torch.device("cpu")
CROP = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)


def reference(crop, recipe, rng):
    """The augmentation in plain numpy on the float image [3, H, W], which the batches on the device must equal."""
    if rng.random() < recipe.flip:
        crop = crop[:, ::-1]
    if recipe.shift:
        down, right = rng.integers(0, 2 * recipe.shift + 1, size=2)
        border = ((recipe.shift, recipe.shift), (recipe.shift, recipe.shift), (0, 0))
        crop = np.pad(crop, border, mode="edge")[down : down + crop.shape[0], right : right + crop.shape[1]]
    image = PREPROCESSING.normalise(crop[None])[0]
    if rng.random() < recipe.cutout:
        height, width = (min(size, side) for size, side in zip(recipe.cutout_size, image.shape[1:], strict=True))
        top, left = rng.integers(0, [image.shape[1] - height + 1, image.shape[2] - width + 1])
        image[:, top : top + height, left : left + width] = 0
    return image


def augmented(crops, recipe, rngs):
    """As `reference` [B, 3, H, W], by the functions of the loader."""
    drawn = [draw_augmentation(recipe, *crop.shape[:2], rng) for crop, rng in zip(crops, rngs, strict=True)]
    out = np.full_like(crops, 77)
    for place, how in enumerate(drawn):
        shift_into(out[place], crops[place], how.down, -how.right if how.mirrored else how.right)
    nothing = torch.zeros(len(crops), dtype=torch.int64)
    batch = TrainBatch(
        crops=torch.from_numpy(out),
        mirrored=torch.tensor([how.mirrored for how in drawn]),
        cutouts=torch.tensor([how.cutout for how in drawn]),
        labels=nothing,
        camids=nothing,
    )
    return to_images(batch, PREPROCESSING, CPU)


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    cutout_size=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    shift=st.integers(0, 20),
    chances=st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_a_batch_is_augmented_as_each_crop_would_be(size, cutout_size, shift, chances, batch, seed):
    how = recipe(flip=chances[0], shift=shift, cutout=chances[1], cutout_size=cutout_size)
    crops = np.random.default_rng(seed).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
    mine, theirs = ([np.random.default_rng([seed, 3, 1, k]) for k in range(batch)] for _ in range(2))
    found = augmented(crops, how, mine)
    expected = np.stack([reference(crop, how, rng) for crop, rng in zip(crops, theirs, strict=True)])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    assert np.array_equal(found.numpy() == 0, expected == 0)
    assert [rng.random() for rng in mine] == [rng.random() for rng in theirs]  # as many values were drawn


def test_images_are_float_channels_last_and_the_batch_is_not_changed():
    crops = torch.from_numpy(np.stack([CROP, CROP]))
    zeros = torch.zeros(2, dtype=torch.int64)
    cutouts = torch.tensor([[0, 0, 0, 0], [2, 1, 5, 4]])
    batch = TrainBatch(crops.clone(), torch.tensor([False, True]), cutouts, zeros, zeros)
    images = to_images(batch, PREPROCESSING, CPU)
    assert (images.shape, images.dtype) == ((2, 3, 12, 8), torch.float32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.crops, crops)
    assert np.array_equal(images[0].numpy(), PREPROCESSING.normalise(CROP[None])[0])  # as in evaluation, to the bit
    assert (images[1] == 0).all(0).nonzero().tolist() == [[row, column] for row in (2, 3, 4) for column in (1, 2, 3)]


def test_every_shift_happens_and_cutout_half_the_time():
    drawn = [draw_augmentation(recipe(shift=2, cutout=0.5), 12, 8, np.random.default_rng(s)) for s in range(400)]
    assert {(how.down, how.right) for how in drawn} == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    assert 160 < sum(any(how.cutout) for how in drawn) < 240
    assert {how.cutout[0] for how in drawn if any(how.cutout)} == set(range(9))
    whole = draw_augmentation(recipe(cutout=1.0, cutout_size=(50, 50)), 12, 8, np.random.default_rng(0))
    assert whole.cutout == (0, 0, 12, 8)


@pytest.fixture(scope="module")
def batches_of(small_config, people):
    """Batches of an epoch on the small data set, loaded by so many workers."""
    samples = read_dataset("synthetic", people).train

    def batches(workers, *epochs):
        config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=workers))
        config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, batch_size=8))
        loader, sampler = train_batches(samples, config)
        found = []
        for epoch in epochs:
            sampler.epoch = epoch
            found.append([TrainBatch(*(part.clone() for part in batch)) for batch in loader])
        return found

    return batches


def equal(batches, others):
    return all(
        torch.equal(a, b) for x, y in zip(batches, others, strict=True) for a, b in zip(x, y, strict=True)
    )  # fmt: skip


def test_batches_do_not_depend_on_the_workers(batches_of):
    alone, other = batches_of(0, 1, 2)
    for workers in (1, 2):
        found, others = batches_of(workers, 1, 2)
        assert equal(found, alone)
        assert equal(others, other)
    assert len(alone) == 6
    batch = alone[0]
    assert (batch.crops.shape, batch.crops.dtype) == ((8, 128, 64, 3), torch.uint8)
    assert (batch.mirrored.shape, batch.mirrored.dtype) == ((8,), torch.bool)
    assert (batch.cutouts.shape, batch.cutouts.dtype) == ((8, 4), torch.int64)
    assert batch.labels.dtype == batch.camids.dtype == torch.int64
    assert not torch.equal(batch.crops, other[0].crops)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(small_config, people, workers):
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=workers))
    loader, _ = train_batches(read_dataset("synthetic", people).train, config)
    for batch in loader:
        before = batch.crops.clone()
        time.sleep(0.15)  # in which the workers have done all that they may
        assert torch.equal(batch.crops, before)


@pytest.mark.gpu
def test_batches_are_pinned_where_a_gpu_is(small_config, people):
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=1))
    for batch in train_batches(read_dataset("synthetic", people).train, config)[0]:
        assert all(part.is_pinned() for part in batch)


def test_batches_are_those_of_the_files(small_config, people):
    """The loader's images equal the plain augmentation of what `load_crop` gives, with the run's random stream."""
    samples = read_dataset("synthetic", people).train
    config = dataclasses.replace(small_config, seed=5)
    loader, sampler = train_batches(samples, config)
    sampler.epoch = 3
    labels = class_indices(samples)
    for keys, batch in zip(list(sampler), loader, strict=True):
        images = to_images(batch, PREPROCESSING, CPU)
        for place, (index, epoch, position) in enumerate(keys):
            sample = samples[index]
            rng = np.random.default_rng([5, 3, epoch, position])
            expected = reference(load_crop(sample.path, 128, 64), config.recipe, rng)
            np.testing.assert_allclose(images[place].numpy(), expected, rtol=0, atol=1e-6)
            assert (int(batch.labels[place]), int(batch.camids[place])) == (labels[sample.pid], sample.camid)


def test_an_epoch_left_early_leaves_nothing_behind(small_config, people):
    samples = read_dataset("synthetic", people).train
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=2))
    loader, sampler = train_batches(samples, config)
    sampler.epoch = 1
    whole = list(loader)
    for _ in range(2):
        next(iter(loader))
    assert equal(list(loader), whole)


def test_too_little_shared_memory_is_one_line(small_config, people, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file: No space left on device (28)\nmore")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=2))
    with pytest.raises(UserError, match=r"share 1 MB.*No space left on device \(28\)\); use fewer --workers"):
        train_batches(read_dataset("synthetic", people).train, config)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_images(batches_of):
    for batch in batches_of(1, 1)[0]:
        found = to_images(batch, PREPROCESSING, torch.device("cuda"))
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.cpu(), to_images(batch, PREPROCESSING, CPU), rtol=0, atol=1e-6)


def test_a_bad_image_comes_as_its_error_with_workers_too(small_config, people, tmp_path):
    samples = list(read_dataset("synthetic", people).train)
    (tmp_path / "0001_c1.jpg").write_bytes(b"")
    samples = tuple(s._replace(path=tmp_path / "0001_c1.jpg") for s in samples)
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=1))
    loader, _ = train_batches(samples, config)
    batch = next(iter(loader))
    assert isinstance(batch, UserError)
    assert "0001_c1.jpg: not a readable image" in str(batch)
