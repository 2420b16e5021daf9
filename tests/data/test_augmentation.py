import numpy as np

from pmm.data.augmentation import draw_augmentation
from pmm.recipe import RecipeConfig


def test_every_shift_happens_and_cutout_half_the_time():
    how = draw_augmentation(
        RecipeConfig(flip=0.5, shift=2, cutout=0.5, cutout_size=(4, 3)), 12, 8, 400, np.random.default_rng(0)
    )
    moves = set(zip(how.down.tolist(), how.right.tolist(), strict=True))
    assert moves == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    cut = how.cutouts.any(1)
    assert 160 < how.mirrored.sum() < 240
    assert 160 < cut.sum() < 240
    assert 70 < (how.mirrored & cut).sum() < 130  # the one has nothing to do with the other
    assert set(how.cutouts[cut, 0].tolist()) == set(range(9))
    assert set(how.cutouts[cut, 1].tolist()) == set(range(6))
    whole = draw_augmentation(RecipeConfig(cutout=1.0, cutout_size=(50, 50)), 12, 8, 3, np.random.default_rng(0))
    assert whole.cutouts.tolist() == [[0, 0, 12, 8]] * 3
