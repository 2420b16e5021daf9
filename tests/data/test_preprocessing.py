import numpy as np

from pmm.data.preprocessing import preprocessing_of
from pmm.presets import preset


def test_normalisation_by_hand():
    preprocessing = preprocessing_of(preset("tiny"))
    crops = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    expected = (crops.astype(np.float64) / 255 - preprocessing.mean) / preprocessing.std
    found = preprocessing.normalise(crops)
    assert found.shape == (2, 3, 5, 4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), atol=2e-6)
