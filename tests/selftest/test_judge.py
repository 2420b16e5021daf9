"""What embeddings say: each mistake, alone and together with others, by comparison and by nothing else."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.selftest.judge import judge
from pmm.selftest.vectors import Tolerance
from tests.selftest.made_up import DIM, NAMES, ROWS, made_up

SELFTEST = made_up()
EXPECTED = SELFTEST.vectors.expected.astype(np.float64)
UNIT = made_up(normalised=True)


def wrong(name, selftest=SELFTEST):
    return selftest.vectors.wrong(name).astype(np.float64)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_right_embeddings_pass():
    verdict = judge(SELFTEST, EXPECTED)
    assert verdict.passed
    assert verdict.exact
    assert (verdict.mistakes, verdict.undecidable, verdict.advice) == ((), (), ())
    assert verdict.min_cosine == pytest.approx(1)
    assert verdict.max_norm_error == pytest.approx(0)
    assert (verdict.precision, verdict.tolerance) == ("fp32", SELFTEST.tolerances["fp32"])


@given(st.sampled_from(sorted(NAMES)), st.integers(0, 2**32 - 1), st.booleans())
def test_each_mistake_is_named_through_the_noise_of_its_precision(name, seed, normalised):
    selftest = UNIT if normalised else SELFTEST
    rows = wrong(name, selftest)
    noise = np.random.default_rng(seed).normal(size=rows.shape)
    rows = (
        rows + noise / np.linalg.norm(noise, axis=1, keepdims=True) * np.linalg.norm(rows, axis=1, keepdims=True) * 5e-5
    )
    verdict = judge(selftest, rows)
    assert not verdict.passed
    assert (verdict.mistakes, verdict.or_one_of, verdict.exact) == ((name,), (), True)
    assert verdict.advice == (f"did {name}; mend {name}",)


def test_the_worst_row_decides():
    for row in range(ROWS):
        rows = EXPECTED.copy()
        rows[row] = wrong("bgr")[row]
        verdict = judge(SELFTEST, rows)
        assert not verdict.passed
        assert verdict.min_cosine < 0.9


def test_norms_alone():
    assert judge(SELFTEST, unit(EXPECTED)).mistakes == ("l2_added",)
    assert judge(UNIT, UNIT.vectors.expected * np.array([[2.0], [3], [0.5], [9]])).mistakes == ("l2_missing",)
    assert judge(SELFTEST, EXPECTED * 1.5).mistakes == ("norms",)
    assert judge(SELFTEST, EXPECTED * 1.00005).passed
    assert not judge(SELFTEST, EXPECTED * 1.0002).passed


def test_a_mistake_and_a_norm_that_was_added_or_left_out():
    assert judge(SELFTEST, unit(wrong("bgr"))).mistakes == ("bgr", "l2_added")
    assert judge(UNIT, wrong("bgr", UNIT) * 7).mistakes == ("bgr", "l2_missing")
    assert len(judge(SELFTEST, unit(wrong("bgr"))).advice) == 2


@given(st.permutations(range(ROWS)))
def test_rows_in_another_order(order):
    verdict = judge(SELFTEST, EXPECTED[order])
    assert verdict.mistakes == (() if order == sorted(order) else ("rows",))
    assert verdict.passed == (order == sorted(order))


def test_one_embedding_for_all():
    assert judge(SELFTEST, np.repeat(EXPECTED[:1], ROWS, 0)).mistakes == ("repeated",)


def test_another_resize_that_is_not_known_and_a_mistake_beside_it():
    noise = 0.1 * np.random.default_rng(5).normal(size=(ROWS, DIM))
    noise[:2] = 0
    verdict = judge(SELFTEST, EXPECTED + noise)
    assert (verdict.mistakes, verdict.exact) == (("other_resize",), False)
    assert "mend nearest" in verdict.advice[0]
    verdict = judge(SELFTEST, wrong("bgr") + noise)
    assert (verdict.mistakes, verdict.exact) == (("bgr", "other_resize"), False)


def test_crops_that_are_wrong_where_they_are_resized_are_no_other_resize_without_evidence():
    def resized(*rows):
        return np.concatenate([EXPECTED[:2], np.stack(rows)])

    random = np.random.default_rng(5).normal(size=(2, DIM))
    for rows, name, exact in (
        (random, "only_resized", False),
        (np.zeros((2, DIM)), "zeros", True),
        (EXPECTED[[3, 2]], "rows", True),
        (EXPECTED[[2, 2]], "repeated", True),
        (EXPECTED[[1, 1]], "repeated", True),
    ):
        verdict = judge(SELFTEST, resized(*rows))
        assert (verdict.passed, verdict.mistakes, verdict.exact) == (False, (name,), exact)
    assert judge(SELFTEST, np.concatenate([wrong("bgr")[:2], random])).mistakes == ()


def test_rows_that_are_resized_have_the_tolerance_of_rounding_and_no_others():
    rounding = Tolerance(min_cosine=0.999, max_norm_error=0.01)
    selftest = made_up(rounding=rounding)
    noise = np.random.default_rng(5).normal(size=(ROWS, DIM))
    noise *= 0.005 * np.linalg.norm(EXPECTED, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    resized = noise.copy()
    resized[:2] = 0
    verdict = judge(selftest, EXPECTED + resized)
    assert (verdict.passed, len(verdict.advice)) == (True, 1)
    assert judge(selftest, EXPECTED).advice == ()
    assert not judge(selftest, EXPECTED + noise).passed
    assert not judge(selftest, EXPECTED + 10 * resized).passed
    assert not judge(SELFTEST, EXPECTED + resized).passed


def test_norms_are_named_beside_rows_in_another_order_and_rows_that_are_the_same():
    assert judge(SELFTEST, unit(EXPECTED)[[1, 0, 2, 3]]).mistakes == ("rows", "l2_added")
    assert judge(UNIT, np.repeat(UNIT.vectors.expected[:1], ROWS, 0) * 3).mistakes == ("repeated", "l2_missing")


def test_what_is_undecidable_is_decided_by_the_rule_that_judges():
    """A mistake within the tolerance is undecidable between it and the right ones, and not where one is far nearer."""
    noise = 0.1 * np.random.default_rng(3).normal(size=(ROWS, DIM))
    close = made_up(bgr=EXPECTED + noise)
    for share, passed, undecidable in ((0, True, ()), (0.5, True, ("bgr",)), (0.9, False, ())):
        verdict = judge(close, EXPECTED + share * noise, "int8")
        assert (verdict.passed, verdict.undecidable) == (passed, undecidable)


def test_a_mistake_that_was_made_a_little_otherwise_is_the_nearest():
    other = wrong("nearest") + 0.05 * np.random.default_rng(5).normal(size=(ROWS, DIM))
    other[:2] = EXPECTED[:2]
    verdict = judge(SELFTEST, other)
    assert (verdict.passed, verdict.mistakes, verdict.exact) == (False, ("nearest",), False)


def test_what_nothing_explains_has_no_name():
    verdict = judge(SELFTEST, np.random.default_rng(9).normal(size=(ROWS, DIM)))
    assert (verdict.passed, verdict.mistakes, verdict.exact) == (False, (), False)
    assert not judge(SELFTEST, np.zeros((ROWS, DIM))).passed


def test_mistakes_that_cannot_be_told_apart_are_both_named():
    alike = made_up(raw=wrong("bgr") + 1e-5)
    verdict = judge(alike, wrong("bgr") + 5e-6)
    assert {verdict.mistakes[0], *verdict.or_one_of} == {"bgr", "raw"}


def test_a_mistake_within_the_tolerance_is_undecidable_and_never_named():
    """In the precision where it does not show alone; the embeddings between both are right."""
    noise = 0.1 * np.random.default_rng(3).normal(size=(ROWS, DIM))
    close = made_up(bgr=EXPECTED + noise)
    assert judge(close, EXPECTED, "fp32").undecidable == ()
    assert judge(close, EXPECTED + noise, "fp32").mistakes == ("bgr",)
    verdict = judge(close, EXPECTED + noise / 2, "int8")
    assert verdict.passed
    assert verdict.undecidable == ("bgr",)
    assert judge(close, EXPECTED - noise, "int8").passed


def test_a_file_in_int8_is_told_from_its_mistakes_by_its_own_embeddings():
    """Which are further from the expected ones than one of its mistakes is."""
    random = np.random.default_rng(3)
    rounding = 0.1 * random.normal(size=(ROWS, DIM))
    small = 0.02 * random.normal(size=(ROWS, DIM))
    plain = made_up(bgr=EXPECTED + rounding + small)
    arrays = {**plain.vectors.arrays, "own": (EXPECTED + rounding).astype(np.float32)}
    vectors = dataclasses.replace(plain.vectors, has_own=True, arrays=arrays)
    selftest = dataclasses.replace(plain, vectors=vectors)
    assert judge(selftest, EXPECTED + rounding, "int8").passed
    assert judge(selftest, EXPECTED + rounding + small / 4, "int8").passed
    assert judge(selftest, EXPECTED + rounding + small, "int8").mistakes == ("bgr",)
