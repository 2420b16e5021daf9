import dataclasses
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmm.config import RecipeConfig, preset
from pmm.data.augmentation import draw_augmentation, shift_into
from pmm.data.batches import TrainBatch, _scale_and_offset, _to_images_at_once, to_images
from pmm.data.crops import load_crop, preprocessing_of
from pmm.data.loader import TrainSet, train_batches
from pmm.data.readers import read_dataset
from pmm.data.sampler import PKSampler
from pmm.data.samples import class_indices
from pmm.errors import UserError
from tests.conftest import ROOT


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


def reference(crops, recipe, rng):
    """The augmentation in plain numpy on float images [B, 3, H, W], which the batches on the device must equal."""
    height, width = crops.shape[1:3]
    mirrored = rng.random(len(crops)) < recipe.flip
    down, right = rng.integers(-recipe.shift, recipe.shift + 1, (2, len(crops)))
    cut = rng.random(len(crops)) < recipe.cutout
    rows, columns = (min(size, side) for size, side in zip(recipe.cutout_size, (height, width), strict=True))
    top, left = (rng.integers(0, side + 1, len(crops)) for side in (height - rows, width - columns))
    images = []
    for k, crop in enumerate(crops):
        border = ((recipe.shift, recipe.shift), (recipe.shift, recipe.shift), (0, 0))
        moved = np.pad(crop[:, ::-1] if mirrored[k] else crop, border, mode="edge")
        moved = moved[recipe.shift + down[k] :, recipe.shift + right[k] :][:height, :width]
        image = PREPROCESSING.normalise(moved[None])[0]
        if cut[k]:
            image[:, top[k] : top[k] + rows, left[k] : left[k] + columns] = 0
        images.append(image)
    return np.stack(images)


def augmented(crops, recipe, rng, make=to_images):
    """As `reference` [B, 3, H, W], by the functions of the loader."""
    how = draw_augmentation(recipe, *crops.shape[1:3], len(crops), rng)
    out = np.full_like(crops, 77)
    for place, mirrored in enumerate(how.mirrored):
        right = how.right[place]
        shift_into(out[place], crops[place], how.down[place], -right if mirrored else right)
    nothing = torch.zeros(len(crops), dtype=torch.int64)
    batch = TrainBatch(
        crops=torch.from_numpy(out),
        mirrored=torch.from_numpy(how.mirrored),
        cutouts=torch.from_numpy(how.cutouts),
        labels=nothing,
        camids=nothing,
        indices=nothing,
    )
    return make(batch, PREPROCESSING, CPU)


def at_once(batch, preprocessing, device):
    """`to_images` as on a GPU."""
    return _to_images_at_once(batch, *_scale_and_offset(preprocessing, device), device).permute(0, 3, 1, 2)


@pytest.mark.parametrize("make", [to_images, at_once])
@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    cutout_size=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    shift=st.integers(0, 20),
    chances=st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_a_batch_is_augmented_as_each_crop_would_be(make, size, cutout_size, shift, chances, batch, seed):
    how = recipe(flip=chances[0], shift=shift, cutout=chances[1], cutout_size=cutout_size)
    crops = np.random.default_rng(seed).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
    mine, theirs = (np.random.default_rng([seed, 3, 1]) for _ in range(2))
    found = augmented(crops, how, mine, make)
    expected = reference(crops, how, theirs)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    assert np.array_equal(found.numpy() == 0, expected == 0)
    assert mine.random() == theirs.random()  # as many values were drawn


def test_images_are_float_channels_last_and_the_batch_is_not_changed():
    crops = torch.from_numpy(np.stack([CROP, CROP]))
    zeros = torch.zeros(2, dtype=torch.int64)
    cutouts = torch.tensor([[0, 0, 0, 0], [2, 1, 5, 4]])
    batch = TrainBatch(crops.clone(), torch.tensor([False, True]), cutouts, zeros, zeros, zeros)
    images = to_images(batch, PREPROCESSING, CPU)
    assert (images.shape, images.dtype) == ((2, 3, 12, 8), torch.float32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.crops, crops)
    assert np.array_equal(images[0].numpy(), PREPROCESSING.normalise(CROP[None])[0])  # as in evaluation, to the bit
    assert (images[1] == 0).all(0).nonzero().tolist() == [[row, column] for row in (2, 3, 4) for column in (1, 2, 3)]


def test_the_number_of_threads_is_as_before():
    before, zeros = torch.get_num_threads(), torch.zeros(1, dtype=torch.int64)
    batch = TrainBatch(
        torch.from_numpy(CROP[None]), zeros.bool(), torch.zeros(1, 4, dtype=torch.int64), zeros, zeros, zeros
    )
    torch.set_num_threads(3)
    try:
        to_images(batch, PREPROCESSING, CPU)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_every_shift_happens_and_cutout_half_the_time():
    how = draw_augmentation(recipe(flip=0.5, shift=2, cutout=0.5), 12, 8, 400, np.random.default_rng(0))
    moves = set(zip(how.down.tolist(), how.right.tolist(), strict=True))
    assert moves == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    cut = how.cutouts.any(1)
    assert 160 < how.mirrored.sum() < 240
    assert 160 < cut.sum() < 240
    assert 70 < (how.mirrored & cut).sum() < 130  # the one has nothing to do with the other
    assert set(how.cutouts[cut, 0].tolist()) == set(range(9))
    assert set(how.cutouts[cut, 1].tolist()) == set(range(6))
    whole = draw_augmentation(recipe(cutout=1.0, cutout_size=(50, 50)), 12, 8, 3, np.random.default_rng(0))
    assert whole.cutouts.tolist() == [[0, 0, 12, 8]] * 3


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
    for number, (keys, batch) in enumerate(zip(list(sampler), loader, strict=True)):
        images = to_images(batch, PREPROCESSING, CPU)
        rng = np.random.default_rng([5, 3, 3, number])
        crops = np.stack([load_crop(samples[index].path, 128, 64) for index, _, _ in keys])
        np.testing.assert_allclose(images.numpy(), reference(crops, config.recipe, rng), rtol=0, atol=1e-6)
        assert batch.labels.tolist() == [labels[samples[index].pid] for index, _, _ in keys]
        assert batch.camids.tolist() == [samples[index].camid for index, _, _ in keys]


def test_a_part_of_a_batch_is_what_it_is_in_the_whole(small_config, people):
    train_set = TrainSet(read_dataset("synthetic", people).train, small_config)
    keys = [(index, 2, 3 * small_config.recipe.batch_size + index) for index in range(small_config.recipe.batch_size)]
    whole = train_set[keys]
    for part in (slice(0, 3), slice(5, None, 2), slice(7, 8)):
        for alone, together in zip(train_set[keys[part]][:6], whole[:6], strict=True):
            assert np.array_equal(alone, together[part])


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


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_batches_of_one(small_config, people, world):
    samples = read_dataset("synthetic", people).train
    config = dataclasses.replace(small_config, recipe=dataclasses.replace(small_config.recipe, batch_size=32))
    whole = list(train_batches(samples, config)[0])
    shares = [list(train_batches(samples, config, rank=rank, world=world)[0]) for rank in range(world)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert all(len(set(part.labels.tolist())) == 8 // world for part in parts)
        for value, *pieces in zip(batch, *parts, strict=True):
            assert torch.equal(torch.cat(pieces), value)
    with pytest.raises(UserError, match="3 processes x accumulate=1 cannot share"):
        train_batches(samples, config, world=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_can_begin_in_its_middle(small_config, people, workers):
    samples = read_dataset("synthetic", people).train
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=workers))
    loader, sampler = train_batches(samples, config)
    sampler.epoch = 2
    whole = [TrainBatch(*(part.clone() for part in batch)) for batch in loader]
    for first in (1, len(whole) - 1, len(whole)):
        sampler.first = first
        rest = [TrainBatch(*(part.clone() for part in batch)) for batch in loader]
        assert len(rest) == len(whole) - first
        assert equal(rest, whole[first:])


def test_a_bad_image_is_skipped_for_the_next_of_its_identity(small_config, people, tmp_path):
    samples = list(read_dataset("synthetic", people).train)
    bad = [index for index, sample in enumerate(samples) if sample.pid == samples[0].pid][:-1]
    (tmp_path / "bad.jpg").write_bytes(b"")
    for index in bad:
        samples[index] = samples[index]._replace(path=tmp_path / "bad.jpg")
    loader, _ = train_batches(tuple(samples), small_config, skip_bad=True)
    batches = list(loader)
    assert all(isinstance(batch, TrainBatch) for batch in batches)
    used = {int(index) for batch in batches for index in batch.indices if samples[index].pid == samples[0].pid}
    assert used == {bad[-1] + 1}
    assert loader.skipped
    assert set(loader.skipped) <= set(bad)
    assert all("bad.jpg: not a readable image" in why for why in loader.skipped.values())
    samples[bad[-1] + 1] = samples[0]
    loader, _ = train_batches(tuple(samples), small_config, skip_bad=True)
    errors = [str(batch) for batch in loader if isinstance(batch, UserError)]
    assert len(errors) == 1
    assert f"no image of identity {samples[0].pid} can be read: " in errors[0]


def test_workers_outlive_a_sigterm_but_not_the_process_that_uses_them(people):
    script = (
        "import dataclasses, multiprocessing, os, signal, sys, time; from pmm.config import preset\n"
        "from pmm.data.loader import train_batches; from pmm.data.readers import read_dataset\n"
        "config = preset('tiny'); recipe = dataclasses.replace(config.recipe, batch_size=8)\n"
        "loader, _ = train_batches(read_dataset('synthetic', sys.argv[1]).train, "
        "dataclasses.replace(config, recipe=recipe))\n"
        "batches = iter(loader); next(batches)\n"
        "for worker in multiprocessing.active_children(): os.kill(worker.pid, signal.SIGTERM)\n"
        "time.sleep(0.5); print(len(list(batches)), len(multiprocessing.active_children()))\n"
        "raise RuntimeError('the end')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(people)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.stdout.split() == ["5", "1"]
    assert done.stderr.strip().endswith("RuntimeError: the end")
