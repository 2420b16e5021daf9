import numpy as np
import pytest

from pmm.adoption.probes import BATCHES, ROUNDING_IN_HALF, alike, check_batches, check_numbers
from pmm.utils.errors import InvalidFile
from tests.refusals import refuses

ROWS = np.random.default_rng(0).normal(0, 1, (8, 16)).astype(np.float32)


def run(network, **given):
    check_batches(network(ROWS), [network(ROWS[:count]) for count in BATCHES], InvalidFile, **given)


@pytest.mark.parametrize("common", [0, 1, 3000, 30000])
def test_what_all_embeddings_have_in_common_hides_no_dependence_on_the_batch(common):
    with refuses(InvalidFile, "depend on the batch", expected="0.01%", hint="batch-norm"):
        run(lambda rows: common + (rows - rows.mean(0)))
    with refuses(InvalidFile, "depend on the batch"):  # of the others alone, as one image has no difference
        run(lambda rows: common + rows * (1 if len(rows) == 1 else 1 / len(rows)))
    run(lambda rows: common + rows)


def test_nan_of_one_image_is_no_embedding_and_rounding_is_none():
    with refuses(InvalidFile, "depend on the batch"):
        run(lambda rows: rows / (len(rows) > 1 or np.nan))
    with np.errstate(all="ignore"), refuses(InvalidFile, "NaN or Inf in its output"):
        check_numbers(ROWS / np.float32(0), "its output", InvalidFile)
    run(lambda rows: 3000 + rows + np.float32(0.003) * len(rows))
    with refuses(InvalidFile, "depend on the batch"):
        run(lambda rows: rows * (1 + len(rows) / 1000))
    run(lambda rows: rows * (1 + len(rows) / 1000), rounding=ROUNDING_IN_HALF)


def test_embeddings_that_tell_nothing_apart_are_noticed():
    assert alike(ROWS) == ""
    assert "0.0" in alike(ROWS / 1e5 + 1)
    assert alike(np.zeros((8, 4), np.float32))
