"""Crops on disk -> embeddings: with a flip test the mean of two."""

import numpy as np

from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.embedding.embed import embed_samples
from pmm.runtime.open import open_runner


def test_a_flip_test_is_the_mean_of_both(trained, people):
    samples = read_dataset("market1501", people).query[:3]
    with open_runner(trained) as runner:
        plain = embed_samples(runner, samples)
        found = embed_samples(runner, samples, flip=True)
        crops = load_crops([sample.path for sample in samples], runner.preprocessing)
        mirrored = runner(np.ascontiguousarray(crops[:, :, ::-1]))
    np.testing.assert_allclose(found, (plain + mirrored) / 2, rtol=1e-6)
