"""The augmentation of a training batch in plain numpy, on float images."""

import numpy as np

from pmm.data.preprocessing import preprocessing_of
from pmm.presets import preset

PREPROCESSING = preprocessing_of(preset("tiny"))


def reference(crops, recipe, rng):
    """The augmentation [B, H, W, 3] uint8 -> [B, 3, H, W], normalised, which the batches on the device must equal."""
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
