"""What is asked of the builder, what it is told, and what is said of a build that fails: see whole.py."""

import gc
import json
import sys
from pathlib import Path

import pytest

from pmm.artifacts.onnx_file import read_onnx
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.build_log import BuildLog
from pmm.export.engine_description import describe_engine
from pmm.export.options import EngineOptions, ExportOptions
from pmm.export.parity_check import ParityCheck
from pmm.export.trt import engine_from_onnx
from pmm.runtime import trt_variant
from pmm.runtime.open import open_runner
from pmm.utils import hardware
from pmm.utils.errors import BackendUnavailable, CannotWrite, ConflictingOptions, InvalidValue, OutOfMemory, UserError
from pmm.utils.hardware import Gpu
from tests.runtime.standin import LISTS

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
from tests.export.narrow import Narrow
from tests.export.whole import DEATHS, NEWEST, built
from tests.refusals import refuses


@pytest.mark.parametrize("version", sorted(LISTS))
def test_several_profiles_are_built_proved_and_run(machine, shared, parity_check, tmp_path, version):
    world, flavor = machine(version)
    batch = ((2, 8, 16), (1, 1, 1))  # in any order
    artifact = built(shared, tmp_path / "m.plan", parity_check=parity_check, batch=batch, flavor=flavor)
    assert str(artifact.manifest.engine.batch) == "1 1 1, 2 8 16"
    assert {"images: batch 1 1 1", "images: batch 2 8 16"} <= set(artifact.manifest.engine.flags)
    assert "batch profiles 1 1 1, 2 8 16" in describe_engine(artifact)
    assert set(artifact.manifest.parity["batches"]) >= {1, 8}
    with open_runner(artifact.path) as runner:
        for count in (1, 2, 16, 17):
            assert numeric_parity(parity_check.expected[:count], runner(parity_check.crops[:count])).min_cosine > 0.999
    assert {context._profile for context in world.contexts} <= {0, 1}


def test_the_machine_of_another_test_is_another_module(machine):
    """Else the process's logger would be collected with that one, in the middle of a build."""
    first, second = ((machine(NEWEST), sys.modules["tensorrt"])[1] for _ in range(2))
    assert first != second
    mine = trt_variant.error_logger(second).native
    del first
    gc.collect()
    assert trt_variant.error_logger(second).native is mine


def test_each_profile_is_proved_at_its_best_batch(machine, shared, parity_check, tmp_path, monkeypatch):
    machine(NEWEST)
    shared.onnx(ExportOptions(precision="fp16"))  # whose export has a parity check too
    asked = []
    monkeypatch.setattr(ParityCheck, "check", lambda self, *args: asked.append(args[-1]))
    built(shared, tmp_path / "m.plan", parity_check=parity_check, batch=((1, 1, 1), (1, 4, 8), (1, 6, 8)))
    assert asked == [[1, 4, 6]]


@pytest.mark.parametrize("version", sorted(LISTS))
def test_all_that_the_builder_and_the_runtime_say_is_in_the_log(machine, shared, tmp_path, version, capfd):
    _, flavor = machine(version)
    plan, log = tmp_path / "m.plan", tmp_path / "m.plan.log"
    log.write_text("of an earlier build")
    built(shared, plan, flavor=flavor)
    text = log.read_text()
    assert "of an earlier build" not in text
    for level in ("VERBOSE", "INFO"):
        assert f"\n[{level}] " in text
    assert "[VERBOSE]" not in capfd.readouterr().err
    built(shared, plan, flavor=flavor, verbose=True)
    said = capfd.readouterr().err
    assert all(line in said for line in log.read_text().splitlines() if line.startswith("["))
    assert "building the engine" not in said  # a progress bar between the lines


def test_a_build_beside_an_open_runner_hears_its_own_messages(machine, shared, tmp_path):
    machine(NEWEST)
    with open_runner(built(shared, tmp_path / "a.plan").path):
        built(shared, tmp_path / "b.plan")
        assert "[VERBOSE]" in (tmp_path / "b.plan.log").read_text()


@pytest.mark.parametrize(
    ("dies", "kind", "facts"),
    [
        (
            "GPU memory, 10.3",
            OutOfMemory,
            ("out of GPU memory", "14.42 GiB", "(out of memory)", "--workspace", "8 images", "--batch"),
        ),
        ("GPU memory, 10.9", OutOfMemory, ("out of GPU memory", "2.64 GiB", "OutOfMemory", "--workspace", "--batch")),
        (
            "workspace",
            UserError,
            ("--workspace 0.25 is too small", "node conv1 due to insufficient workspace", "give more"),
        ),
        (
            "another reason, with little memory",
            UserError,
            ("built no engine (Error Code 4: Internal Error (a reason))",),
        ),
        ("another reason", UserError, ("no engine (Error Code 4: Internal Error (a reason))",)),
    ],
)
def test_a_build_that_fails_is_one_line_with_its_reason_and_the_way_out(machine, shared, tmp_path, dies, kind, facts):
    machine(NEWEST, dies=dies)
    with refuses(kind, *facts, hint=str(tmp_path / "m.plan.log")):
        built(shared, tmp_path / "m.plan", workspace=0.25)
    assert DEATHS[dies][-1][1] in (tmp_path / "m.plan.log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["m.plan.log"]


def test_an_engine_that_does_not_open_is_called_by_its_own_name(machine, shared, tmp_path):
    """It is opened before it has it."""
    world, _ = machine(NEWEST)
    world.failing.add("create_execution_context")
    with refuses(UserError, "tensorrt", "create_execution_context", path=tmp_path / "m.plan"):
        built(shared, tmp_path / "m.plan")
    assert [path.name for path in tmp_path.iterdir()] == ["m.plan.log"]


def test_a_log_that_cannot_be_written_is_said_before_the_build(machine, shared, tmp_path):
    machine(NEWEST)
    (tmp_path / "m.plan.log").mkdir()
    with refuses(CannotWrite, "folder", path=tmp_path / "m.plan.log"):
        built(shared, tmp_path / "m.plan")


def test_a_full_disk_costs_the_rest_of_the_log_alone(caplog):
    log = BuildLog(Path("/dev/full"), False)
    for at in range(3):
        log.write("INFO", f"line {at}")
    assert caplog.text.count("/dev/full ends early: No space left on device") == 1


@pytest.mark.parametrize("version", [NEWEST, "tensorrt_rtx-1.7.1.116"])
def test_an_engine_of_a_static_batch_is_built_proved_and_run(machine, shared, parity_check, tmp_path, version):
    _, flavor = machine(version)
    file = read_onnx(shared.onnx(ExportOptions(precision="fp16", static_batch=4)))
    for batch in ((), ((4, 4, 4),)):
        options = EngineOptions(flavor=flavor, batch=batch)
        artifact = engine_from_onnx(file, tmp_path / "m.plan", options, parity_check=parity_check)
        assert str(artifact.manifest.engine.batch) == "4 4 4"
        assert artifact.manifest.parity["rows"] == len(parity_check.crops)
    with open_runner(artifact.path) as runner:
        assert numeric_parity(parity_check.expected[:7], runner(parity_check.crops[:7])).min_cosine > 0.999
    with refuses(ConflictingOptions, "static batch 4", "1 8 64", "--static-batch", options=("--batch",)):
        engine_from_onnx(file, tmp_path / "n.plan", EngineOptions(flavor=flavor, batch=((1, 8, 64),)))
    assert {path.name for path in tmp_path.iterdir() if ".selftest." not in path.name} == {
        "m.plan", "m.plan.json", "m.plan.log", "n.plan.log",
    }  # fmt: skip


FACTS = {
    InvalidValue: ("same-compute-capability", "tensorrt 10.0.1", "10.9"),
    BackendUnavailable: ("compute capability 8.0 or more", "NVIDIA One", "7.5"),
    ConflictingOptions: ("ampere-plus", "rtx 1.7.1"),
}
COMPATIBILITY = [
    ("ampere-plus", "tensorrt-10.0.1", "8.9", None),
    ("same-compute-capability", "tensorrt-10.16.1.11", "8.9", None),
    ("same-compute-capability", NEWEST, "7.5", None),
    ("same-compute-capability", "tensorrt-10.0.1", "8.9", InvalidValue),
    ("ampere-plus", NEWEST, "7.5", BackendUnavailable),
    ("ampere-plus", "tensorrt_rtx-1.7.1.116", "8.9", ConflictingOptions),
]


@pytest.mark.parametrize(("asked", "version", "capability", "refused"), COMPATIBILITY)
def test_what_an_engine_is_compatible_with(
    machine, shared, tmp_path, caplog, monkeypatch, asked, version, capability, refused
):
    _, flavor = machine(version, gpus=(Gpu("NVIDIA One", capability),))
    told, plain = {}, Narrow.__setattr__
    monkeypatch.setattr(Narrow, "__setattr__", lambda self, *pair: (told.update([pair]), plain(self, *pair))[1])
    if refused:
        with refuses(refused, "--hardware-compatibility", *FACTS[refused]):
            built(shared, tmp_path / "m.plan", hardware_compatibility=asked, flavor=flavor)
        assert not list(tmp_path.iterdir())  # no log either: nothing was asked of the builder
        return
    artifact = built(shared, tmp_path / "m.plan", hardware_compatibility=asked, flavor=flavor)
    assert told["hardware_compatibility_level"].name == asked.replace("-", "_").upper()
    assert artifact.manifest.engine.hardware_compatibility == asked
    assert any(flag.startswith("hardware compatibility ") for flag in artifact.manifest.engine.flags)
    monkeypatch.setattr(trt_variant, "nvidia_gpus", lambda: (Gpu("NVIDIA Other", capability),))
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: (Gpu("NVIDIA Other", capability),))
    caplog.clear()
    with open_runner(artifact.path):
        assert "NVIDIA Other" not in caplog.text  # it was built for it


@pytest.mark.parametrize("version", [NEWEST, "tensorrt_rtx-1.7.1.116"])
def test_an_engine_is_built_for_and_proved_on_the_gpu_asked_for(machine, shared, parity_check, tmp_path, version):
    two = (Gpu("NVIDIA One", "8.0"), Gpu("NVIDIA Two", "8.9"))
    world, flavor = machine(version, gpus=two)
    first = built(shared, tmp_path / "a.plan", parity_check=parity_check, flavor=flavor)
    second = built(shared, tmp_path / "b.plan", parity_check=parity_check, flavor=flavor, device="cuda:1")
    assert (first.manifest.engine.gpu, second.manifest.engine.gpu) == ("NVIDIA One", "NVIDIA Two")
    assert (first.manifest.engine.compute_capability, second.manifest.engine.compute_capability) == ("8.0", "8.9")
    assert [json.loads(made.path.read_bytes())["gpu"] for made in (first, second)] == [0, 1]
    assert world.opened == [0, 1]
    assert not sys.modules[trt_variant.FLAVORS[flavor]].driver.stack  # as it was before
    machine(version, gpus=())
    with refuses(BackendUnavailable, "--device cuda:0", "no NVIDIA GPU", "--flavor rtx"):
        built(shared, tmp_path / "c.plan", flavor=flavor, device="cuda:0")
    machine(version, gpus=two)
    with refuses(BackendUnavailable, "GPU 2", "0 NVIDIA One, 1 NVIDIA Two"):
        built(shared, tmp_path / "c.plan", flavor=flavor, device="cuda:2")


@pytest.mark.parametrize("device", ["cpu", "gpu", "cuda:x"])
def test_a_device_that_builds_no_engine(device):
    with refuses(InvalidValue, value=device, expected="cuda:N"):
        EngineOptions(device=device)
