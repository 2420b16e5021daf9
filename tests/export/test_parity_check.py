"""The parity check, with runners that are wrong in one way each."""

import dataclasses

import numpy as np
import pytest

from pmm.artifacts.manifest import EmbeddingContract
from pmm.export.options import MAX_NORM_ERROR
from pmm.export.parity_check import ParityCheck, ParityFailed
from pmm.utils.errors import InvalidInput
from tests.refusals import refuses

CROPS = np.random.default_rng(0).integers(0, 256, (20, 2, 2, 3), dtype=np.uint8)
PLAIN = EmbeddingContract(dim=12)


def exact(images):
    return images.reshape(len(images), -1).astype(np.float32)


def test_an_equal_runner_passes_and_its_figures_say_how_it_was_asked():
    seen = []

    def counting(images):
        seen.append(len(images))
        return exact(images)

    figures = ParityCheck.of(exact, CROPS, PLAIN).check(counting, "fp32", "x", "a backend")
    assert figures["min_cosine"] == figures["batch_min_cosine"] == 1.0
    assert (figures["rows"], figures["batches"], figures["ran_on"]) == (20, [1, 3, 16], "a backend")
    assert seen == [1, 3, 16, 1, 1, 20]


def test_rows_that_depend_on_their_batch():
    def last_row_wrong(images):
        rows = exact(images)
        if len(images) == 20:
            rows[-1, :6] *= -1
        return rows

    with refuses(ParityFailed, "row 19 ", "in another batch"):
        ParityCheck.of(exact, CROPS, PLAIN).check(last_row_wrong, "fp32", "x", "")


@pytest.mark.parametrize("size", [8, 50])
def test_batches_that_other_kernels_run_in(size):
    def wrong(images):
        rows = exact(images)
        rows[-1, :6] *= -1 if len(images) == size else 1
        return rows

    parity_check = ParityCheck.of(exact, CROPS, PLAIN)
    assert parity_check.check(wrong, "fp32", "x", "")["batches"] == [1, 3, 16]
    assert parity_check.check(exact, "fp32", "x", "", [8, 50])["batches"] == [1, 3, 16, 8, 50]
    with refuses(ParityFailed, f"row {(size - 1) % 20} ", "in another batch"):
        parity_check.check(wrong, "fp32", "x", "", [8, 50])


@pytest.mark.parametrize(("factor", "fact"), [(1.0015, "norm"), (np.where(np.arange(12) < 6, 1, 1.023), "cosine")])
def test_an_allowance_leaves_that_share_of_the_error(factor, fact, monkeypatch):
    monkeypatch.setitem(MAX_NORM_ERROR, "fp16", 0.002 if fact == "norm" else 1)
    parity_check = ParityCheck.of(exact, CROPS, PLAIN)
    parity_check.check(lambda images: exact(images) * factor, "fp16", "x", "")
    with refuses(ParityFailed, fact):
        half = dataclasses.replace(parity_check, allowance=0.5)
        half.sample(16).check(lambda images: exact(images) * factor, "fp16", "x", "")


@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_batch_size_that_goes_wrong(size):
    def wrong(images):
        return exact(images) * ([-1] + [1] * 11 if len(images) == size else 1)

    with refuses(ParityFailed, "the torch checkpoint's", expected="0.9999 or more for fp16", path="x"):
        ParityCheck.of(exact, CROPS, PLAIN).check(wrong, "fp16", "x", "")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("factor", [10.0, 0.85, 1.2])
def test_lengths_count_as_distances_are_euclidean(precision, factor):
    parity_check = ParityCheck.of(exact, CROPS, PLAIN)
    with refuses(ParityFailed, "norm differs", f"for {precision}"):
        parity_check.check(lambda images: exact(images) * np.float32(factor), precision, "x", "")
    some = lambda images: exact(images) * np.where(exact(images)[:, :1] > 128, np.float32(factor), 1)  # noqa: E731
    with refuses(ParityFailed, "norm differs", f"for {precision}"):
        parity_check.check(some, precision, "x", "")


def test_what_a_row_is_without_the_mean_is_told():
    offset = np.float32(10_000)  # all rows nearly alike, as a random network's
    noise = np.random.default_rng(2).normal(size=12).astype(np.float32) * 60
    figures = ParityCheck.of(lambda images: exact(images) + offset, CROPS, PLAIN).check(
        lambda images: exact(images) + offset + noise * np.sign(exact(images)[:, :1] - 128), "bf16", "x", ""
    )
    assert figures["min_cosine"] > 0.9999
    assert figures["centred_min_cosine"] < 0.98


def test_every_precision_has_its_own_least_cosine():
    parity_check = ParityCheck.of(exact, CROPS, PLAIN)
    noise = np.random.default_rng(1).normal(size=(256, 12)) * 2

    def noisy(images):
        return exact(images) + np.array([noise[int(row.sum()) % 256] for row in images]).astype(np.float32)

    with pytest.raises(ParityFailed):
        parity_check.check(noisy, "fp32", "x", "")
    with pytest.raises(ParityFailed):
        parity_check.check(noisy, "fp16", "x", "")
    assert 0.99 < parity_check.check(noisy, "int8", "x", "")["min_cosine"] < 0.9999


def test_mirrors_and_lengths_are_in_the_reference():
    mirrored = ParityCheck.of(exact, CROPS, EmbeddingContract(dim=12, flip_tta=True)).expected
    np.testing.assert_allclose(mirrored, (exact(CROPS) + exact(CROPS[:, :, ::-1])) / 2)
    unit = ParityCheck.of(exact, CROPS, EmbeddingContract(dim=12, normalised=True)).expected
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)


def test_nan_is_no_embedding():
    def holes(images):
        rows = exact(images)
        rows[0, 0] = np.nan
        return rows

    with refuses(InvalidInput, "NaN or Inf"):
        ParityCheck.of(exact, CROPS, PLAIN).check(holes, "int8", "x", "")


def test_few_crops_are_enough_to_be_judged():
    for count in (1, 2, 4, 5):
        assert ParityCheck.of(exact, CROPS[:count], PLAIN).check(exact, "fp32", "x", "")["rows"] == count
