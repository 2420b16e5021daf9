"""Times per layer, of a library that calls its profiler as its headers say: see whole.py."""

import dataclasses
import json

import pytest

from pmm.export.layer_profile import LayerTime, profile_layers, table
from pmm.utils.errors import UserError
from tests.conftest import assert_one_line_error, run_here
from tests.runtime.standin import LISTS

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
from tests.export.whole import GPU, NEWEST, built
from tests.refusals import refuses


@pytest.mark.parametrize(
    ("version", "inspector"), [*((version, "whole") for version in sorted(LISTS)), (NEWEST, "names")]
)
def test_layers_are_timed_without_graphs_at_each_profiles_best_batch(machine, shared, tmp_path, version, inspector):
    _, flavor = machine(version, inspector=inspector)
    artifact = built(shared, tmp_path / "m.plan", flavor=flavor, batch=((1, 1, 1), (1, 4, 8)))
    rows = profile_layers(artifact, runs=4)
    told = json.loads((tmp_path / "m.plan.layers.json").read_text())
    assert told["layers"] == [dataclasses.asdict(row) for row in rows]
    assert (told["gpu"], told["sha256"], told["runs"]) == (GPU.name, artifact.manifest.sha256, 4)
    assert {row.batch for row in rows} == {1, 4}
    one = [row for row in rows if row.batch == 4]
    assert [row.ms for row in one] == pytest.approx(
        [1.005 * (at + 1) / 100 for at in range(len(one))]
    )  # none of the first
    assert sum(row.share for row in one) == pytest.approx(1)
    if inspector == "whole":
        assert {(row.type, row.precision) for row in rows} == {("CaskConvolution", "fp16")}
        assert all("hannel % 8 == 0" in row.format for row in rows)


def test_the_table_is_sorted_by_time_and_sums_the_rest():
    def layer(at, batch):
        return LayerTime(f"conv{at}" + 200 * "x", "CaskConvolution", "fp16", "", batch, at / 100, at / 300)

    shown = table([layer(at, batch) for batch in (1, 8) for at in range(25)]).splitlines()
    assert len(shown) == 2 * (1 + 1 + 20 + 1)
    assert [line.split()[:3] for line in (shown[0], shown[23])] == [["batch", "1:", "3.000"], ["batch", "8:", "3.000"]]
    assert shown[2].split()[:4] == ["0.2400", "8.0%", "CaskConvolution", "fp16"]
    assert [line.split()[4].partition("x")[0] for line in shown[2:22]] == [f"conv{at}" for at in range(24, 4, -1)]
    assert shown[22].split() == ["0.1000", "3.3%", "5", "other", "layers"]
    assert max(map(len, shown)) < 160


def test_layers_whose_times_the_library_does_not_tell(machine, shared, tmp_path):
    world, _ = machine(NEWEST)
    artifact = built(shared, tmp_path / "m.plan")
    world.failing.add("report_to_profiler")
    with refuses(UserError, "report_to_profiler"):
        profile_layers(artifact)
    assert not (tmp_path / "m.plan.layers.json").exists()


def test_without_a_gpu_it_is_said_before_the_build(exported, tmp_path, monkeypatch):
    from pmm.runtime import trt_variant

    monkeypatch.setattr(trt_variant, "nvidia_gpus", tuple)
    command = ("export/to_trt.py", exported, "-o", tmp_path / "m.plan", "--profile-layers")
    assert_one_line_error(run_here(*command), "--profile-layers", "no NVIDIA GPU")
    assert_one_line_error(run_here(*command, "--no-manifest"), "--profile-layers", "without a manifest")
    assert not list(tmp_path.iterdir())
