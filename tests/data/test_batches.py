import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmm.data.augmentation import draw_augmentation, shift_into
from pmm.data.batches import TrainBatch, _normalize_at_once, _scale_and_offset, normalize_batch
from pmm.recipe import RecipeConfig
from tests.conftest import examples
from tests.data.plain_augmentation import PREPROCESSING, reference

CPU = torch.device("cpu")
CROP = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)


def augmented(crops, recipe, rng, make=normalize_batch, device=CPU):
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
        indices=nothing,
    )
    return make(batch, PREPROCESSING, device)


def at_once(batch, preprocessing, device):
    """`normalize_batch` as on a GPU."""
    return _normalize_at_once(batch, *_scale_and_offset(preprocessing, device), device).permute(0, 3, 1, 2)


@pytest.mark.parametrize("make", [normalize_batch, at_once])
@examples(150)
@given(
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    cutout_size=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    shift=st.integers(0, 20),
    chances=st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_a_batch_is_augmented_as_each_crop_would_be(make, size, cutout_size, shift, chances, batch, seed):
    how = RecipeConfig(flip=chances[0], shift=shift, cutout=chances[1], cutout_size=cutout_size)
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
    batch = TrainBatch(crops.clone(), torch.tensor([False, True]), cutouts, zeros, zeros)
    images = normalize_batch(batch, PREPROCESSING, CPU)
    assert (images.shape, images.dtype) == ((2, 3, 12, 8), torch.float32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.crops, crops)
    assert np.array_equal(images[0].numpy(), PREPROCESSING.normalise(CROP[None])[0])  # as in evaluation, to the bit
    assert (images[1] == 0).all(0).nonzero().tolist() == [[row, column] for row in (2, 3, 4) for column in (1, 2, 3)]


def test_the_number_of_threads_is_as_before():
    before, zeros = torch.get_num_threads(), torch.zeros(1, dtype=torch.int64)
    batch = TrainBatch(torch.from_numpy(CROP[None]), zeros.bool(), torch.zeros(1, 4, dtype=torch.int64), zeros, zeros)
    torch.set_num_threads(3)
    try:
        normalize_batch(batch, PREPROCESSING, CPU)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_images():
    crops = np.random.default_rng(1).integers(0, 256, (8, 128, 64, 3), dtype=np.uint8)
    how = RecipeConfig(flip=0.5, shift=4, cutout=0.5, cutout_size=(32, 21))
    found, expected = (
        augmented(crops, how, np.random.default_rng(2), device=torch.device(name)) for name in ("cuda", "cpu")
    )
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)
