import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.bench.gates import GateFlags, failures
from pmm.bench.result_schema import Result, Timing
from pmm.bench.sample_size import MOST, queries_for_drop, queries_for_flips
from pmm.bench.schema import Gates
from pmm.evaluation.parity.retrieval import paired_bootstrap
from pmm.utils.errors import InvalidValue
from tests.refusals import refuses

OK = Result(
    name="ort-cpu fp32", backend="ort-cpu", device="cpu", precision="fp32", cuda_graph=None, status="ok", reason="",
    mAP=0.7, map_delta=-0.001, rank1_lost=1, rank1_gained=1, min_cosine=0.999999, batch_min_cosine=0.999999,
    max_norm_error=0.0001, worst_crop="people/query/7.jpg",
)  # fmt: skip
TIMING = Timing(
    batch=1, samples_ms=(1.0, 2.0), block=1, turns_s=(0.0, 1.0), warmup_s=1.0, steady=True, p50_ms=1.0,
    p50_interval_ms=None, p90_ms=None, p90_interval_ms=None, p95_ms=9.0, p95_interval_ms=(8.0, 10.0), p99_ms=None,
    p99_interval_ms=None, speedup=None, images_per_s=1.0, in_flight=1, device_ms=None, upload_ms=None,
    download_ms=None, end_to_end_ms=None, decode_ms=None, flags=(),
)  # fmt: skip


def gates(**flags: str) -> Gates:
    return GateFlags(**flags).parsed()


def broken(
    *results: Result, required: tuple[str, ...] = (), any_precision: bool = False, **flags: str
) -> list[tuple[str, str, str]]:
    limits = gates(**flags)
    found = failures(
        results, limits, reference="torch fp32", queries=100, required=required, any_precision=any_precision
    )
    return [(failure.result, failure.gate, failure.message) for failure in found]


def change(**fields) -> Result:
    return dataclasses.replace(OK, **fields)


def test_what_keeps_every_gate_passes():
    assert broken(OK) == []
    assert broken(change(map_delta=-0.005, rank1_lost=1, rank1_gained=1, min_cosine=0.99999)) == []  # bounds belong


@pytest.mark.parametrize(
    ("fields", "gate", "words"),
    [
        ({"map_delta": -0.0051}, "--max-map-drop", "0.51 points; at most 0.5 "),
        ({"map_delta": None}, "--max-map-drop", "could not be compared"),
        ({"rank1_lost": 2, "rank1_gained": 1}, "--max-rank1-flips", "3 of 100 queries (3.00%); at most 2.00%"),
        ({"rank1_lost": 0, "rank1_gained": 3}, "--max-rank1-flips", "3 of 100"),
        ({"rank1_lost": None}, "--max-rank1-flips", "not counted"),
        ({"rank1_gained": None}, "--max-rank1-flips", "not counted"),
        (
            {"min_cosine": 0.99998},
            "--min-cosine",
            "(people/query/7.jpg) has cosine 0.999980 with the reference's; at least 0.99999 ",
        ),
        ({"min_cosine": None}, "--min-cosine", "was not measured"),
        ({"batch_min_cosine": 0.5}, "--min-cosine", "0.500000 with the same crop's in another batch; at least"),
        ({"batch_min_cosine": None}, "--min-cosine", "was not measured"),
        (
            {"max_norm_error": 0.00011},
            "--max-norm-error",
            "0.01% from the reference's or from that in another batch; at most 0.01%",
        ),
        ({"max_norm_error": None}, "--max-norm-error", "were not compared"),
    ],
)
def test_each_gate_fails_alone(fields, gate, words):
    ((name, found, said),) = broken(change(**fields))
    assert (name, found) == ("ort-cpu fp32", gate)
    assert words in said


@pytest.mark.parametrize(
    ("fields", "gate"),
    [
        (
            {"map_delta": -0.007, "map_delta_interval": (-0.02, -0.003), "rank1_lost": 0, "rank1_gained": 0},
            "--max-map-drop",
        ),
        ({"rank1_lost": 1, "rank1_gained": 0}, "--max-rank1-flips"),
    ],
)
def test_what_a_few_queries_break_by_chance_is_undecided_and_still_no_pass(fields, gate):
    few, many = (
        list(failures([change(**fields)], gates(), reference="torch fp32", queries=queries, required=()))
        for queries in (20, 400)
    )
    ((failure,),) = (few,)
    assert (failure.gate, failure.undecided) == (gate, True)
    assert "too few queries" in failure.message
    assert re.search(r"about [\d,]+ would", failure.message)
    assert [each.undecided for each in many] == ([True] if gate == "--max-map-drop" else [])
    certain = change(map_delta=-0.007, map_delta_interval=(-0.009, -0.006), rank1_lost=12)
    found = failures([certain], gates(), reference="torch fp32", queries=200, required=())
    assert [each.undecided for each in found] == [False, False]


@given(st.integers(20, 500), st.integers(1, 10), st.sampled_from([0.0, 0.01, 0.02, 0.1]))
def test_as_many_queries_as_are_named_would_tell(queries, flips, allowed):
    needed = queries_for_flips(flips, queries, allowed)
    share = flips / queries
    if share > allowed and needed is not None:
        assert queries < needed
        assert needed == MOST or queries_for_flips(math.ceil(share * needed), needed, allowed) is None


def test_a_wider_interval_needs_more_queries():
    assert queries_for_drop(0.01, 0.005, (-0.03, -0.006), 50) is None
    assert queries_for_drop(0.01, 0.005, None, 50) is None
    # half the width is four times as much as the drop is beyond the bound: sixteen times as many
    assert queries_for_drop(0.01, 0.005, (-0.03, 0.01), 50) == 800
    assert queries_for_drop(0.01, 0.005, (-0.011, -0.0049), 50) == 75


@pytest.mark.parametrize(("changed", "queries"), [(1, 20), (2, 20), (1, 50), (3, 100)])
def test_of_a_few_changed_queries_more_are_asked_for(changed, queries):
    deltas = np.zeros((1, queries))
    deltas[0, :changed] = -0.5
    ((low, high),) = paired_bootstrap(deltas)
    drop = 0.5 * changed / queries
    needed = queries_for_drop(drop, 0.005, (low, high), queries)
    assert needed is None or needed >= 1.5 * queries
    assert needed is not None or changed > 2


def test_the_least_cosine_goes_by_precision():
    assert broken(change(precision="int8", min_cosine=0.99)) == []
    assert broken(change(precision="bf16", min_cosine=0.99)) != []
    assert broken(change(precision="bf16", min_cosine=0.99), min_cosine="bf16=0.9") == []
    assert broken(change(min_cosine=0.99), min_cosine="bf16=0.9") != []  # the others keep their bounds
    assert broken(change(min_cosine=0.99, batch_min_cosine=0.99), min_cosine="0.9") == []


def test_gates_can_be_turned_off():
    bad = change(map_delta=-1.0, rank1_lost=100, min_cosine=-1.0, batch_min_cosine=None, max_norm_error=9.0)
    assert broken(bad, max_map_drop="off", max_rank1_flips="off", min_cosine="off", max_norm_error="off") == []


def test_latency_is_a_gate_when_asked():
    slow = change(batches=(dataclasses.replace(TIMING, batch=8, p95_ms=90.0), TIMING))
    assert broken(slow) == []
    assert broken(slow, max_p95_ms="9") == []
    ((_, gate, said),) = broken(slow, max_p95_ms="8.9")
    assert gate == "--max-p95-ms"
    assert "p95 at batch 1 is 9 ms; at most 8.9 ms" in said
    for unmeasured in (OK, change(batches=(dataclasses.replace(TIMING, p95_ms=None),))):
        assert "not measured" in broken(unmeasured, max_p95_ms="8")[0][2]


def test_the_reference_is_not_judged_by_itself():
    assert broken(change(name="torch fp32", map_delta=-1.0, batches=(TIMING,)), max_p95_ms="1") == []


def test_a_reference_that_could_not_be_timed_fails():
    line = "batch 8 could not be timed: out of memory"
    assert broken(change(name="torch fp32", untimed=(line,))) == [("torch fp32", "--batches", line)]


def test_a_backend_that_failed_fails_and_one_that_is_unavailable_only_if_it_is_required():
    failed, absent = change(status="failed", reason="crashed"), change(status="unavailable", reason="no GPU")
    assert broken(failed)[0][1:] == ("--backends", "failed: crashed; none of its figures could be measured")
    assert broken(absent) == []
    assert broken(absent, required=("ort-cpu",))[0][2].startswith("unavailable: no GPU")


def test_of_all_precisions_one_that_runs_is_enough_and_none_fails():
    absent = change(name="ort-cpu bf16", precision="bf16", status="unavailable", reason="no bf16 here")
    required = {"required": ("ort-cpu",), "any_precision": True}
    assert [name for name, *_ in broken(absent, **required)] == ["ort-cpu bf16"]
    assert broken(OK, absent, **required) == []
    assert [name for name, *_ in broken(OK, absent, required=("ort-cpu",))] == ["ort-cpu bf16"]


def test_all_that_could_not_be_timed_fails_and_no_note_does():
    untimed = ("batch 256: out of memory", "the tracker load: no forty crops")
    assert broken(change(untimed=untimed)) == [("ort-cpu fp32", "--batches", line) for line in untimed]
    assert broken(change(notes=("batch 256 could not be timed: out of memory",))) == []


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_map_drop", "1.5", "from 0 to 1, or off"),
        ("max_map_drop", "-0.1", "from 0 to 1"),
        ("max_map_drop", "nan", "from 0 to 1"),
        ("max_rank1_flips", "two", "from 0 to 1"),
        ("max_p95_ms", "inf", "at least 0, or off"),
        ("max_p95_ms", "-1", "at least 0"),
        ("min_cosine", "2", "from -1 to 1, or off"),
        ("min_cosine", "fp8=0.9", "fp32, tf32, fp16, bf16 or int8"),
        ("max_norm_error", "-1", "at least 0"),
    ],
)
def test_a_bound_out_of_range_is_refused(field, value, expected):
    flag = f"--{field.replace('_', '-')}"
    with refuses(InvalidValue, flag, f"'{value}'", name=flag, value=value, expected=expected):
        gates(**{field: value})
    with refuses(InvalidValue, "--min-cosine", "''"):
        gates(min_cosine="fp16=")


def test_the_defaults_are_the_exports_own():
    found = gates()
    assert (found.max_map_drop, found.max_rank1_flips, found.max_p95_ms) == (0.005, 0.02, None)
    assert found.min_cosine == {"fp32": 0.99999, "tf32": 0.9999, "fp16": 0.9999, "bf16": 0.999, "int8": 0.98}


def test_a_drop_that_is_the_next_number_above_the_allowed_one_takes_the_most():
    assert queries_for_drop(5e-324, 0.0, (-0.01, 0.01), 1000) == MOST
