"""MLPerf's LoadGen as the oracle: our percentiles of its samples are its percentiles."""

import json
import random
import re
import time

import mlperf_loadgen as loadgen
import pytest

from pmm.bench.statistics import percentile

LOGGED = re.compile(r'"ph":"b".*"sample_seq":(\d+),.*"complete_ns":(\d+)')
PERCENTS = ("50.00", "90.00", "95.00", "97.00", "99.00", "99.90")


def single_stream(seconds, folder):
    """Let LoadGen ask for one sample after another, which take `seconds`: what it measured and what it says of it."""
    left = iter(seconds)

    def issue(queries):
        for query in queries:
            time.sleep(next(left))
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query.id, 0, 0)])

    settings = loadgen.TestSettings()
    settings.scenario, settings.mode = loadgen.TestScenario.SingleStream, loadgen.TestMode.PerformanceOnly
    settings.min_query_count = settings.max_query_count = len(seconds)
    settings.min_duration_ms = 0
    logs = loadgen.LogSettings()
    logs.enable_trace, logs.log_output.outdir = True, str(folder)
    system = loadgen.ConstructSUT(issue, lambda: None)
    library = loadgen.ConstructQSL(4, 4, lambda samples: None, lambda samples: None)
    loadgen.StartTestWithLogSettings(system, library, settings, logs)
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(system)

    trace = (folder / "mlperf_log_trace.json").read_text()
    samples = dict(map(int, found.groups()) for line in trace.splitlines() if (found := LOGGED.search(line)))
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    said = {entry["key"]: entry["value"] for entry in (json.loads(line.partition(" ")[2]) for line in lines)}
    return [samples[index] for index in sorted(samples)], said


@pytest.mark.parametrize("queries", [1, 2, 7, 100, 299, 1000])
def test_our_percentiles_are_those_of_loadgen(queries, tmp_path):
    """Of few and of many samples, and where a percentile falls between two samples (100, 1000) or on one."""
    draw = random.Random(queries)
    seconds = [0.0002 * draw.paretovariate(3) for _ in range(queries)]
    samples, said = single_stream(seconds, tmp_path)
    assert len(samples) == said["result_query_count"] == queries
    assert all(sample >= 1e9 * slept for sample, slept in zip(samples, seconds, strict=True))
    assert (min(samples), max(samples)) == (said["result_min_latency_ns"], said["result_max_latency_ns"])
    for percent in PERCENTS:
        assert percentile(samples, float(percent)) == said[f"result_{percent}_percentile_latency_ns"]
