"""Engines: built for real by TensorRT-RTX, which needs no GPU; the same code through the names of other versions."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pmm.artifacts.artifact import manifest_path, read_manifest
from pmm.artifacts.batch_profiles import BatchProfile, BatchProfiles
from pmm.artifacts.onnx_file import read_onnx
from pmm.export import engine_build
from pmm.export import trt as module
from pmm.export.engine_description import describe_engine
from pmm.export.engine_precision import network_precision
from pmm.export.options import MIN_COSINE, EngineOptions, ExportOptions, VerifyOptions
from pmm.export.parity_check import ParityCheck, ParityFailed
from pmm.export.trt import choose_flavor, engine_from_onnx
from pmm.runtime import trt_variant
from pmm.utils.errors import BackendUnavailable, ConflictingOptions, InvalidFile
from pmm.utils.files import sha256
from pmm.utils.hardware import Gpu
from tests.conftest import assert_one_line_error, run_here, run_without_torch
from tests.export.narrow import Narrow, narrow
from tests.refusals import refuses
from tests.runtime.standin import LISTS

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
traced_once = pytest.mark.usefixtures("traced_once")


def left(folder):
    """Names of the files in `folder`, but for those of selftests."""
    return {path.name for path in folder.iterdir() if ".selftest." not in path.name}


@pytest.fixture(scope="module")
def files(shared):
    """The four precisions as ONNX files; read only."""
    return {p: shared.onnx(ExportOptions(precision=p)) for p in ("fp32", "fp16", "bf16", "int8")}


@traced_once
def test_the_engine_is_built_and_its_manifest_written(trained, tmp_path):
    done = run_here("export/to_trt.py", trained, "-o", tmp_path / "model.plan", "--batch", "1", "4", "16")
    assert done.returncode == 0, done.stderr
    engine = tmp_path / "model.plan"
    assert engine.stat().st_size > 100_000
    manifest = read_manifest(engine, sha256(engine))
    contract = manifest.engine
    assert contract.batch == BatchProfiles((BatchProfile(least=1, best=4, most=16),))
    assert contract.onnx_sha256 == sha256(tmp_path / "model.onnx")
    assert contract.flavor in ("rtx", "tensorrt")
    assert contract.precision_read_from.startswith("parsed network")
    assert {"TF32 off", "images: batch 1 4 16"} <= set(contract.flags)
    assert manifest.checkpoint_sha256 == sha256(trained)
    assert "fp32 (100.00% of its MACs" in done.stdout
    if not contract.gpu:
        assert manifest.parity is None
        assert "NOT run here: its embeddings are not verified" in done.stdout
    of_selftests = {f"model.{kind}.selftest.{end}" for kind in ("onnx", "plan") for end in ("json", "npz")}
    assert {p.name for p in tmp_path.iterdir()} == {
        f"model.{s}" for s in ("onnx", "onnx.json", "plan", "plan.json", "plan.log")
    } | of_selftests


@pytest.mark.parametrize("precision", ["int8", *(pytest.param(p, marks=pytest.mark.slow) for p in ("fp16", "bf16"))])
def test_from_an_onnx_file_no_torch_is_needed(files, precision, tmp_path):
    done = run_without_torch("export/to_trt.py", files[precision], "-o", tmp_path / "m.plan", "--precision", precision)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "m.plan", sha256(tmp_path / "m.plan"))
    assert manifest.precision_found == precision
    assert manifest.precision_share[precision] > 0.98


def test_the_precision_asked_for_must_be_the_files(files, tmp_path):
    command = ("export/to_trt.py", files["fp16"], "-o", tmp_path / "m.plan")
    done = run_here(*command, "--precision", "fp32")
    assert_one_line_error(done, str(files["fp16"]), "fp16", "expected fp32", "--precision fp32")
    done = run_here(*command, "--flip-tta", "--input", "float")
    assert_one_line_error(done, "--flip-tta, --input", "the ONNX file")
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_lies_about_the_precision_is_found_out(files, tmp_path):
    file = read_onnx(files["fp32"])
    lying = dataclasses.replace(file, stored_manifest=dataclasses.replace(file.manifest, precision="fp16"))
    with refuses(InvalidFile, "rtx parsed", "100.0% fp32", path=files["fp32"], expected="in fp16"):
        engine_from_onnx(lying, tmp_path / "m.plan", EngineOptions(flavor="rtx"))
    assert left(tmp_path) == {"m.plan.log"}


@pytest.mark.parametrize("version", sorted(LISTS))
def test_the_builder_uses_no_name_that_a_version_lacks(files, version, tmp_path, monkeypatch):
    seen = narrow(rtx, version)
    monkeypatch.setattr(module, "load_flavor", lambda flavor: seen)
    monkeypatch.setattr(module, "choose_flavor", lambda flavor, file, device: ("tensorrt", seen))
    options = EngineOptions(workspace=0.5, opt_level=2, timing_cache=tmp_path / "times.cache")
    for precision in ("fp32", "int8"):
        engine = engine_from_onnx(read_onnx(files[precision]), tmp_path / f"{precision}.plan", options)
        assert engine.manifest.precision_found == precision
        assert options.timing_cache.stat().st_size > 0  # which the next build takes up
    with pytest.raises(AttributeError, match="IBuilderConfig has no int8_calibrator"):
        _ = narrow(rtx, "tensorrt-11.4.0.106").Builder(_logger()).create_builder_config().int8_calibrator


def _logger():
    class Logger(rtx.ILogger):
        def __init__(self):
            rtx.ILogger.__init__(self)

        def log(self, severity, message):
            pass

    return Logger()


def test_options_are_in_the_manifest(files, tmp_path):
    file, plan = read_onnx(files["fp32"]), tmp_path / "m.plan"
    options = EngineOptions(flavor="rtx", batch=((1, 2, 4),), workspace=1.5, opt_level=1)
    other = engine_from_onnx(file, plan, options).manifest.engine
    assert {"workspace 1.5 GiB", "optimization level 1", "images: batch 1 2 4"} <= set(other.flags)
    for level in ("WARNING", "ERROR"):  # TensorRT-RTX warns of calls that it does not have
        assert f"{level}] " not in plan.with_name("m.plan.log").read_text()
    with refuses(ConflictingOptions, "rtx", options=("--timing-cache",)):
        engine_from_onnx(file, plan, EngineOptions(flavor="rtx", timing_cache=tmp_path / "times.cache"))


def test_tf32_is_asked_for_and_said(files, tmp_path):
    file = read_onnx(files["fp32"])
    plain = engine_from_onnx(file, tmp_path / "a.plan", EngineOptions(flavor="rtx"))
    fast = engine_from_onnx(file, tmp_path / "b.plan", EngineOptions(flavor="rtx", tf32=True))
    assert "TF32 on" in fast.manifest.engine.flags
    assert "TF32 off" in plain.manifest.engine.flags
    # of the file it is: the products' inputs are fp32 numbers
    assert (fast.manifest.precision, fast.manifest.precision_found) == ("fp32", "fp32")
    assert "fp32 with TF32 (100.00% of its MACs" in describe_engine(fast)
    assert "fp32 (100.00% of its MACs" in describe_engine(plain)
    done = run_here("export/to_trt.py", files["fp32"], "-o", tmp_path / "c.plan", "--flavor", "rtx", "--tf32")
    assert done.returncode == 0, done.stderr
    assert "fp32 with TF32" in done.stdout


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_tf32_is_for_fp32_files(files, precision, tmp_path):
    with refuses(ConflictingOptions, files[precision], f"in {precision}", options=("--tf32",)):
        engine_from_onnx(read_onnx(files[precision]), tmp_path / "m.plan", EngineOptions(flavor="rtx", tf32=True))
    assert left(tmp_path) == {"m.plan.log"}


@pytest.mark.parametrize(("capability", "has"), [("7.5", False), ("8.0", True), ("12.0", True)])
def test_tf32_needs_a_gpu_that_has_it_if_one_is_here(files, tmp_path, monkeypatch, with_gpu, capability, has):
    monkeypatch.setattr(trt_variant, "nvidia_gpus", lambda: (Gpu("a GPU", capability),))
    file, options = read_onnx(files["fp32"]), EngineOptions(flavor="rtx", tf32=True)
    if has:
        assert "TF32 on" in engine_from_onnx(file, tmp_path / "m.plan", options).manifest.engine.flags
        return
    with refuses(BackendUnavailable, "a GPU", "--tf32", path=files["fp32"]):
        engine_from_onnx(file, tmp_path / "m.plan", options)
    engine_from_onnx(file, tmp_path / "m.plan", EngineOptions(flavor="rtx"))


class Caching:
    """A builder configuration that takes, or refuses, a timing cache."""

    def __init__(self, accepts):
        self.accepts, self.read = accepts, None

    def create_timing_cache(self, content):
        self.read = content
        return self

    def set_timing_cache(self, cache, ignore_mismatch):
        return self.accepts and not ignore_mismatch

    def get_timing_cache(self):
        return self

    def serialize(self):
        return b"measured"


def test_a_timing_cache_of_another_builder_is_refused_and_left_alone(tmp_path):
    cache = tmp_path / "times.cache"
    cache.write_bytes(b"of another GPU")
    refused = engine_build._timing_cache(Caching(False), cache, "x")
    with refuses(InvalidFile, "timing cache of x", path=cache, hint="--timing-cache"), refused:
        pytest.fail("it was built with a cache that was refused")
    assert cache.read_bytes() == b"of another GPU"
    config = Caching(True)
    with engine_build._timing_cache(config, cache, "x"):
        assert config.read == b"of another GPU"
    assert cache.read_bytes() == b"measured"


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (("--batch", "0", "1", "2"), ("--batch", "0 1 2", "1 <= min <= best <= max")),
        (("--batch", "4", "2", "8"), ("--batch", "4 2 8")),
        (("--batch", "1", "9", "8"), ("--batch", "1 9 8")),
        (("--workspace", "0"), ("--workspace is 0.0", "GiB")),
        (("--workspace", "nan"), ("--workspace", "nan")),
        (("--workspace", "inf"), ("--workspace", "inf")),
        (("--batch", "1", "8", "99999"), ("--batch", "1 8 99999", "4096")),
        (("--timing-cache", "best.pth"), ("--timing-cache is best.pth", ".cache")),
        (("--target", "cpu", "--precision", "int8"), ("--target cpu", "ONNX Runtime")),
        (("--target", "cpu"), ("--target", "--precision int8", "fp32")),
        (("--no-manifest",), ("--no-manifest", "ONNX files", "checkpoint")),
        (("--opt-level", "6"), ("--opt-level is 6", "0 to 5")),
        (("--precision", "fp8"), ("fp8",)),
        (("--flavor", "trt"), ("trt",)),
    ],
)
def test_impossible_options(trained, tmp_path, options, facts):
    done = run_here("export/to_trt.py", trained, "-o", tmp_path / "model.plan", *options)
    assert_one_line_error(done, *facts)
    assert not list(tmp_path.iterdir())


def test_without_a_builder_it_says_what_to_install_and_where_the_onnx_file_is(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with refuses(BackendUnavailable, "tensorrt_rtx", "pip install tensorrt-rtx", hint=str(files["fp32"])):
        engine_from_onnx(read_onnx(files["fp32"]), tmp_path / "model.plan", EngineOptions(flavor="rtx"))
    assert not list(tmp_path.iterdir())


def test_tensorrt_is_preferred_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "load_flavor", lambda flavor: flavor.upper())
    monkeypatch.setattr(trt_variant, "nvidia_gpus", lambda: (Gpu("a GPU", "8.9"),))
    assert choose_flavor("auto", Path("x.onnx")) == ("tensorrt", "TENSORRT")
    assert choose_flavor("rtx", Path("x.onnx")) == ("rtx", "RTX")
    monkeypatch.setattr(trt_variant, "nvidia_gpus", tuple)
    assert choose_flavor("auto", Path("x.onnx")) == ("rtx", "RTX")
    with refuses(BackendUnavailable, "NVIDIA GPU", "--flavor rtx", "x.onnx"):
        choose_flavor("tensorrt", Path("x.onnx"))


def test_a_builder_that_is_installed_but_broken_is_told(tmp_path, monkeypatch, caplog):
    (tmp_path / "broken_tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trt_variant.FLAVORS, "tensorrt", "broken_tensorrt")
    monkeypatch.setattr(trt_variant, "nvidia_gpus", lambda: (Gpu("a GPU", "8.9"),))
    assert choose_flavor("auto", Path("x.onnx"))[0] == "rtx"
    assert "broken_tensorrt" in caplog.text
    assert "(libnvinfer.so.11: " in caplog.text
    with refuses(BackendUnavailable, "broken_tensorrt", "libnvinfer.so.11", "x.onnx"):
        choose_flavor("tensorrt", Path("x.onnx"))


def test_where_the_gpu_does_not_run_rtx_engines_they_are_built_as_without_one(files, tmp_path, monkeypatch):
    """On an H100, say: NVIDIA's own library refuses the engine there."""
    from pmm.export import reference

    monkeypatch.setattr(trt_variant, "nvidia_gpus", lambda: (Gpu("NVIDIA H100", "9.0"),))
    file = read_onnx(files["fp32"])
    assert reference.engine_parity_check(file, None, VerifyOptions(), "rtx") is None  # which asks for no crops either
    artifact = engine_from_onnx(file, tmp_path / "m.plan", EngineOptions(flavor="rtx"))
    assert artifact.manifest.parity is None
    assert artifact.manifest.engine.precision_read_from == "parsed network"
    assert "built on NVIDIA H100, NOT run here: its embeddings are not verified" in describe_engine(artifact)


def foreign(path, *, batch="n", height=8, external=None):
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 3, 3, 3], np.ones(108, np.float32))
    if external:
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=external)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, height, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )
    return path


def test_a_file_that_is_not_ours_is_explained_and_built_if_asked(tmp_path):
    path, plan = foreign(tmp_path / "x.onnx"), tmp_path / "x.plan"
    assert_one_line_error(run_here("export/to_trt.py", path), "an ONNX file without a manifest", "pmm export onnx")
    assert not plan.exists()
    manifest_path(plan).write_text("of an engine that was here before")
    done = run_here("export/to_trt.py", path, "--no-manifest", "--flavor", "rtx")
    assert done.returncode == 0, done.stderr
    assert "without a manifest" in done.stdout
    assert plan.stat().st_size > 1000
    assert not manifest_path(plan).exists()
    foreign(path, height="h")
    done = run_here("export/to_trt.py", path, "--no-manifest", "--flavor", "rtx")
    assert_one_line_error(done, str(path), "input x is (-1, 3, -1, 8)")


def test_a_file_of_a_static_batch_is_built_for_that_batch_alone(tmp_path):
    path, plan = foreign(tmp_path / "x.onnx", batch=2), tmp_path / "x.plan"
    command = ("export/to_trt.py", path, "--no-manifest", "--flavor", "rtx")
    for batch in ((), ("--batch", "2", "2", "2")):
        plan.unlink(missing_ok=True)
        done = run_here(*command, *batch)
        assert done.returncode == 0, done.stderr
        assert plan.stat().st_size > 1000
    done = run_here(*command, "--batch", "1", "2", "4")
    assert_one_line_error(done, "static batch 2", "--batch is 1 2 4", "--static-batch")
    done = run_here(*command, "--batch", "2", "2", "2", "--batch", "1", "2", "4")
    assert_one_line_error(done, "--batch", "1 2 4")
    foreign(path, batch=5000)
    assert_one_line_error(run_here(*command), "5000 5000 5000", "4096")


def test_weights_beside_a_foreign_file(tmp_path):
    path = foreign(tmp_path / "x.onnx", external="w.bin")
    (tmp_path / "w.bin").write_bytes(np.ones(108, np.float32).tobytes())
    assert_one_line_error(run_here("export/to_trt.py", path), "its weights lie in another file ('w.bin')")
    assert run_here("export/to_trt.py", path, "--no-manifest", "--flavor", "rtx").returncode == 0
    foreign(path, external="../w.bin")
    done = run_here("export/to_trt.py", path, "--no-manifest", "--flavor", "rtx")
    assert_one_line_error(done, "refused, its weights lie in '../w.bin', a path with '..'")


def test_a_file_the_parser_refuses(files, tmp_path):
    file = read_onnx(files["fp32"])
    proto = onnx.ModelProto()
    proto.CopyFrom(file.proto)
    proto.graph.node[5].op_type = "NoSuchOperator"
    broken = dataclasses.replace(file, content=proto.SerializeToString())
    with refuses(InvalidFile, "rtx 1", "parse", path=file.path, hint=str(tmp_path / "x.plan.log")):
        engine_from_onnx(broken, tmp_path / "x.plan", EngineOptions(flavor="rtx"))
    assert left(tmp_path) == {"x.plan.log"}


def test_a_root_to_verify_on_is_not_answered_with_an_older_verification(trained, exported, tmp_path):
    for path in (exported, manifest_path(exported)):
        shutil.copyfile(path, tmp_path / path.name)
    done = run_here("export/to_trt.py", trained, "-o", tmp_path / "model.plan", "--verify-root", tmp_path / "none")
    assert_one_line_error(done, "to verify", str(tmp_path / "none"), "--no-verify")
    assert not (tmp_path / "model.plan").exists()


@pytest.mark.parametrize("tf32", [False, True])
def test_the_builder_is_told_what_the_manifest_says(files, tmp_path, monkeypatch, tf32):
    """What is set is seen on the configuration itself, also what TensorRT-RTX, which builds here, makes nothing of."""
    seen, told = {}, {}
    original, names = engine_build._flags, narrow(rtx, "tensorrt-11.4.0.106")
    plain = Narrow.__setattr__
    monkeypatch.setattr(Narrow, "__setattr__", lambda self, *pair: (told.update([pair]), plain(self, *pair))[1])

    def spy(trt, config, options):
        seen.update(
            tf32=config.get_flag(rtx.BuilderFlag.TF32),
            workspace=config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE),
            level=config.builder_optimization_level,
            verbosity=config.profiling_verbosity,
        )
        return original(trt, config, options)

    monkeypatch.setattr(engine_build, "_flags", spy)
    monkeypatch.setattr(module, "choose_flavor", lambda flavor, file, device: ("tensorrt", names))
    options = EngineOptions(
        workspace=0.25, opt_level=4, hardware_compatibility="ampere-plus", batch=((2, 3, 5),), tf32=tf32
    )
    engine = engine_from_onnx(read_onnx(files["fp32"]), tmp_path / "m.plan", options).manifest.engine
    assert seen == {
        "tf32": tf32,
        "workspace": 2**28,
        "level": 4,
        "verbosity": rtx.ProfilingVerbosity.DETAILED,
    }
    assert told["hardware_compatibility_level"] == rtx.HardwareCompatibilityLevel.AMPERE_PLUS
    said = {f"TF32 {'on' if tf32 else 'off'}", "workspace 0.25 GiB", "optimization level 4", "images: batch 2 3 5"}
    assert {flag for flag in engine.flags if not flag.startswith("hardware")} == said


def test_ctrl_c_ends_a_build(files, tmp_path, monkeypatch):
    """As a real interrupt: a signal in the middle of the build, and no engine."""
    real = engine_build._progress

    @contextlib.contextmanager
    def interrupted(trt, config, release, *, show):
        with real(trt, config, release, show=show):
            step = config.progress_monitor.step_complete

            def then_interrupt(phase_name, number):
                os.kill(os.getpid(), signal.SIGINT)
                return step(phase_name, number)

            config.progress_monitor.step_complete = then_interrupt
            yield

    monkeypatch.setattr(engine_build, "_progress", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run_here("export/to_trt.py", files["fp32"], "-o", tmp_path / "m.plan", "--flavor", "rtx")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert left(tmp_path) == {"m.plan.log"}


@traced_once
def test_the_command_hands_the_checkpoint_to_the_parity_check(files, trained, people, tmp_path, monkeypatch):
    """The script's own wiring: what the engine is judged by."""
    asked, given = [], []
    monkeypatch.setattr(module, "engine_parity_check", lambda *args: asked.append(args) or "the parity check")
    original = module.engine_from_onnx

    def build(file, out, options, *, parity_check):
        given.append(parity_check)
        return original(file, out, options)

    monkeypatch.setattr(module, "engine_from_onnx", build)
    run_here("export/to_trt.py", trained, "-o", tmp_path / "a.plan")
    run_here("export/to_trt.py", files["fp16"], "-o", tmp_path / "b.plan", "--verify-root", people)
    assert given == ["the parity check", "the parity check"]
    assert [(file.path.name, checkpoint) for file, checkpoint, *_ in asked] == [
        ("a.onnx", trained),
        ("model.onnx", None),
    ]
    assert asked[1][2:] == (VerifyOptions(verify_root=str(people)), "rtx", "auto")


class Engine:
    """Stands for a runner: this machine may have no GPU to run the engine on."""

    inspector = json.dumps({"Layers": [{"Inputs": [{"Format/Datatype": "Float"}], "Outputs": []}]})
    precision = "fp32"

    def __init__(self, path, device="auto", warn=True, log=None):
        assert read_manifest(path, sha256(path)) is not None, "opened without its manifest"
        self.info = type("Info", (), {"provider": "a runtime", "precision": self.precision})
        Engine.opened = path

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def inspect(self):
        return self.inspector

    def __call__(self, images):
        return images.reshape(len(images), -1)[:, :384].astype(np.float32)


@pytest.fixture
def with_gpu(monkeypatch):
    import pmm.runtime.trt as runtime

    monkeypatch.setattr(trt_variant, "nvidia_gpus", lambda: (Gpu("a GPU", "8.9"),))
    monkeypatch.setattr(runtime, "TrtRunner", Engine)


def test_where_there_is_a_gpu_the_engine_itself_is_inspected_and_judged(files, tmp_path, with_gpu, monkeypatch):
    file, plan = read_onnx(files["fp32"]), tmp_path / "m.plan"
    crops = np.random.default_rng(0).integers(0, 256, (8, 128, 64, 3), dtype=np.uint8)
    right = crops.reshape(8, -1)[:, :384].astype(np.float32)
    options = EngineOptions(flavor="rtx")
    artifact = engine_from_onnx(file, plan, options, parity_check=ParityCheck(crops, right))
    assert artifact.manifest.engine.precision_read_from == "parsed network and engine inspector"
    assert artifact.manifest.parity["ran_on"] == "a runtime"
    assert artifact.manifest.engine.gpu == "a GPU"
    assert "parity on 8 crops: min cosine 1.0000000" in describe_engine(artifact)
    assert left(tmp_path) == {"m.plan", "m.plan.json", "m.plan.log"}
    before = plan.read_bytes()
    with refuses(ParityFailed, path=plan):
        engine_from_onnx(file, plan, options, parity_check=ParityCheck(crops, right[::-1]))
    assert plan.read_bytes() == before
    monkeypatch.setattr(Engine, "inspector", Engine.inspector.replace("Float", "Half"))
    with refuses(InvalidFile, "inspector", "fp16", path=tmp_path / "n.plan", expected="fp32"):
        engine_from_onnx(file, tmp_path / "n.plan", options, parity_check=ParityCheck(crops, right))
    assert left(tmp_path) == {"m.plan", "m.plan.json", "m.plan.log", "n.plan.log"}


def test_an_engine_that_runs_in_tf32_is_judged_as_one(files, tmp_path, with_gpu, monkeypatch):
    crops = np.random.default_rng(0).integers(0, 256, (8, 128, 64, 3), dtype=np.uint8)
    right = crops.reshape(8, -1)[:, :384].astype(np.float32)
    rounded = right * np.float32(1.0015)  # further off than fp32 may be, not than TF32
    file, parity_check = read_onnx(files["fp32"]), ParityCheck(crops, rounded)
    with refuses(ParityFailed, expected="0.01% or less for fp32"):
        engine_from_onnx(file, tmp_path / "m.plan", EngineOptions(flavor="rtx"), parity_check=parity_check)
    monkeypatch.setattr(Engine, "precision", "tf32")
    parity = engine_from_onnx(
        file, tmp_path / "m.plan", EngineOptions(flavor="rtx", tf32=True), parity_check=parity_check
    ).manifest.parity
    assert parity["least_allowed"] == MIN_COSINE["tf32"] < MIN_COSINE["fp32"]
    far = ParityCheck(crops, right * np.float32(1.003))
    with refuses(ParityFailed, expected="0.20% or less for tf32"):
        engine_from_onnx(file, tmp_path / "m.plan", EngineOptions(flavor="rtx", tf32=True), parity_check=far)


def test_where_there_is_a_gpu_an_engine_needs_crops_to_be_judged_by(files, people, monkeypatch, tmp_path):
    from pmm.export import reference

    monkeypatch.setattr(trt_variant, "nvidia_gpus", lambda: (Gpu("a GPU", "8.9"),))
    file = read_onnx(files["bf16"])
    unverified = dataclasses.replace(file, stored_manifest=dataclasses.replace(file.manifest, parity=None))
    with refuses(InvalidFile, "not verified", path=file.path, hint="--no-verify"):
        reference.engine_parity_check(unverified, None, VerifyOptions(verify_root=str(people)), "rtx")
    with refuses(InvalidFile, "to verify", hint="--verify-root"):
        reference.engine_parity_check(file, None, VerifyOptions(), "rtx")
    with refuses(InvalidFile, "not a folder", path="/nonexistent", hint="--verify-root"):
        reference.engine_parity_check(file, None, VerifyOptions(verify_root="/nonexistent"), "rtx")
    assert reference.engine_parity_check(file, None, VerifyOptions(no_verify=True), "rtx") is None
    parity_check = reference.engine_parity_check(file, None, VerifyOptions(verify_root=str(people)), "rtx")
    assert parity_check.expected.shape == (64, 384)
    assert parity_check.against == f"the verified ONNX file's ({file.sha256[:12]})"


def test_the_reference_of_an_engine_from_a_checkpoint_is_the_checkpoint(files, trained, people, monkeypatch):
    from pmm.export import reference
    from pmm.runtime.open import open_runner

    monkeypatch.setattr(trt_variant, "nvidia_gpus", lambda: (Gpu("a GPU", "8.9"),))
    parity_check = reference.engine_parity_check(read_onnx(files["int8"]), trained, VerifyOptions(), "rtx")
    with open_runner(trained) as runner:
        np.testing.assert_allclose(parity_check.expected, runner(parity_check.crops), rtol=1e-4, atol=1e-4)


def test_multiplications_of_the_network_are_those_of_the_file(files):
    for precision in ("fp32", "fp16", "int8"):
        file = read_onnx(files[precision])
        logger = _logger()
        builder = rtx.Builder(logger)
        network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        assert rtx.OnnxParser(network, logger).parse(file.content)
        assert network_precision(rtx, network).total == file.manifest.macs
