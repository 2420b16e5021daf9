"""OpenVINO on this machine's CPU, against the checkpoint; what it cannot show here is played by stand-ins."""

import dataclasses
import json
import logging
import re
import shutil
import signal
import sys
import threading
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from pmm.artifacts.artifact import manifest_path
from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.options import MIN_COSINE, ExportOptions
from pmm.runtime import openvino as module
from pmm.runtime.open import open_runner
from pmm.runtime.openvino import OpenVinoRunner
from pmm.utils.errors import BackendUnavailable, InvalidFile, InvalidInput, InvalidValue, MissingLibrary, UserError
from pmm.utils.hardware import int8_overflows
from tests.conftest import run_python
from tests.refusals import refuses

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed (pip install openvino)")
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 instructions")
PRECISIONS = ["fp32", pytest.param("bf16", marks=bf16), "int8"]


CPU_INT8 = ExportOptions(precision="int8", target="cpu")


@pytest.fixture(scope="module")
def files(shared):
    """By precision of the file; read only."""
    return {"fp32": shared.onnx(), "int8": shared.onnx(CPU_INT8)}


@pytest.fixture
def unverified(files, tmp_path):
    """A copy of the fp32 file whose manifest says that nobody verified it."""
    path = tmp_path / "unverified.onnx"
    shutil.copyfile(files["fp32"], path)
    manifest = json.loads(manifest_path(files["fp32"]).read_text())
    manifest_path(path).write_text(json.dumps({**manifest, "parity": None}))
    return path


@pytest.fixture(scope="module")
def crops(people):
    return load_crops([s.path for s in read_dataset("synthetic", people).query[:10]], 128, 64)


@pytest.fixture(scope="module")
def expected(trained, crops):
    with open_runner(trained) as runner:
        return runner(crops)


def opened(files, precision, **options):
    return OpenVinoRunner(files["int8" if precision == "int8" else "fp32"], precision=precision, **options)


def refused(files, kind, *facts, file="fp32", **options):
    with refuses(kind, files[file], *facts):
        OpenVinoRunner(files[file], **options)


# --- results


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_batch_gives_the_checkpoints_embeddings(files, crops, expected, precision):
    with opened(files, precision) as runner:
        for count in (1, 2, 3, 7, 10, 3, 1):
            found = runner(crops[:count])
            assert (found.dtype, found.shape) == (np.float32, (count, expected.shape[1]))
            assert numeric_parity(expected[:count], found).min_cosine > MIN_COSINE[precision]
        assert runner(crops[:0]).shape == (0, expected.shape[1])
        alone = np.concatenate([runner(crops[i : i + 1]) for i in range(10)])
        assert numeric_parity(runner(crops), alone).min_cosine > MIN_COSINE[precision]


def test_fp32_is_fp32(files, crops, expected):
    with opened(files, "fp32") as runner:
        np.testing.assert_allclose(runner(crops), expected, rtol=1e-4, atol=1e-4)


@bf16
def test_bf16_rounds(files, crops, expected):
    with opened(files, "bf16") as runner:
        assert 1e-6 < 1 - numeric_parity(expected, runner(crops)).min_cosine < 1e-3


@pytest.mark.parametrize(
    "recipe",
    [
        ExportOptions(input="float", input_colour="bgr", flip_tta=True, normalize=True),
        ExportOptions(precision="int8", target="tensorrt"),
        pytest.param(ExportOptions(precision="int8", target="cpu", flip_tta=True), marks=pytest.mark.slow),
    ],
    ids=["float flip", "int8 for TensorRT", "int8 flip"],
)
def test_every_kind_of_file_runs_as_in_onnx_runtime(shared, crops, recipe):
    path = shared.onnx(recipe)
    if recipe.target == "tensorrt" and recipe.precision == "int8" and int8_overflows():
        refused({"int8": path}, InvalidFile, "VNNI", "--target cpu", file="int8")
        return
    with open_runner(path) as reference, OpenVinoRunner(path) as runner:
        assert runner.info.precision == recipe.precision
        assert numeric_parity(reference(crops), runner(crops)).min_cosine > MIN_COSINE[recipe.precision]


def test_weights_that_overflow_here_are_refused(shared, files, monkeypatch):
    monkeypatch.setattr(module, "int8_overflows", lambda: True)
    path = shared.onnx(ExportOptions(precision="int8"))
    refused({"int8": path}, InvalidFile, "TensorRT", "VNNI", "--target cpu", file="int8")
    with opened(files, "int8") as runner:
        assert runner.info.precision == "int8"


def test_a_result_does_not_change_with_later_calls(files, crops):
    with opened(files, "fp32") as runner:
        first = runner(crops[:3])
        before = first.copy()
        runner(crops[3:6])
        assert np.array_equal(first, before)


def test_images_are_read_where_they_are_and_read_only_ones_too(files, crops, expected):
    locked = crops[:4].copy()
    locked.flags.writeable = False
    with opened(files, "fp32") as runner:
        runner(crops[:4])
        request = runner._requests.request
        assert np.shares_memory(request.get_input_tensor().data, crops)
        np.testing.assert_allclose(runner(locked), expected[:4], rtol=1e-4, atol=1e-4)
        assert runner._requests.request is request
        runner.bind(locked)()


def test_wrong_crops_are_refused(files, crops):
    with opened(files, "fp32") as runner:
        for use in (runner, runner.bind):
            with refuses(InvalidInput, "float32", expected="uint8"):
                use(crops.astype(np.float32))
        with refuses(InvalidInput, "0 images"):
            runner.bind(crops[:0])


def test_threads_do_not_disturb_each_other(files, crops):
    with opened(files, "fp32") as runner:
        alone = {count: runner(crops[:count]) for count in range(1, 5)}
        together, wrong = threading.Barrier(4), []

        def work(count):
            together.wait(20)
            for _ in range(20):
                try:
                    np.testing.assert_allclose(runner(crops[:count]), alone[count], rtol=1e-5, atol=1e-5)
                except BaseException as error:
                    wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(count,)) for count in alone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_a_bound_step_runs_on_its_own_copy_of_the_images(files, crops, expected):
    with opened(files, "fp32") as runner:
        compiled, requests = runner._compiled, []
        runner._compiled = SimpleNamespace(
            create_infer_request=lambda: requests.append(compiled.create_infer_request()) or requests[-1]
        )
        images = crops[:4].copy()
        step = runner.bind(images)
        images[:] = 0
        runner(crops[5:9])
        for _ in range(2):
            step()
            np.testing.assert_allclose(requests[0].get_output_tensor().data, expected[:4], rtol=1e-4, atol=1e-4)
        step.enqueue()
        step.wait()
        assert step.device_ms() is None
        assert step.transfers_ms() is None


# --- what really runs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_runs_is_told(files, precision):
    with opened(files, precision) as runner:
        assert (runner.info.backend, runner.info.device, runner.info.precision) == ("openvino", "cpu", precision)
        version = re.escape(openvino.__version__.split("-")[0])
        said = rf"openvino {version} CPU \((\d+) of \1 convolutions in {precision}\)"
        assert re.fullmatch(said, runner.info.provider)
        assert runner.preprocessing == runner.manifest.preprocessing


def test_the_files_own_precision_is_the_default(files):
    assert [OpenVinoRunner(files[name]).info.precision for name in ("fp32", "int8")] == ["fp32", "int8"]


@bf16
@pytest.mark.parametrize(("asked", "hint", "runs"), [("fp32", "bf16", "bf16"), ("bf16", "f32", "fp32")])
def test_a_hint_that_is_not_heeded_is_found_out(files, monkeypatch, asked, hint, runs):
    monkeypatch.setitem(module._HINTS, asked, hint)
    refused(files, UserError, f"0.0% of its MACs in {asked}", f"100.0% in {runs}", precision=asked)


def test_layers_that_are_int8_in_the_file_only_are_found_out(files, monkeypatch):
    file = read_onnx(files["fp32"])
    lying = dataclasses.replace(file, stored_manifest=dataclasses.replace(file.manifest, precision_found="int8"))
    monkeypatch.setattr(module, "read_onnx", lambda path: lying)
    refused(files, UserError, "0.0% of its MACs in int8", "100.0% in fp32")


class Layer:
    """Of an executed graph; sizes of the output [N, C, ...] and of the weights."""

    def __init__(self, kind, precision, output=(1, 8, 5, 2), weights=(8, 3, 1, 1)):
        text = lambda value: SimpleNamespace(astype=lambda cls: cls(value))  # noqa: E731
        self.facts = {"layerType": text(kind), "runtimePrecision": text(precision)}
        self.sizes = output, weights

    def get_rt_info(self):
        return self.facts

    def output(self, index):
        assert index == 0
        return SimpleNamespace(get_partial_shape=lambda: openvino.PartialShape(list(self.sizes[0])))

    def input(self, index):
        assert index == 1
        return SimpleNamespace(get_partial_shape=lambda: openvino.PartialShape(list(self.sizes[1])))


def evidence(asked, *layers, macs=None):
    graph = SimpleNamespace(get_ops=lambda: layers)
    return module._verify_precision(graph, asked, 240 * len(layers) if macs is None else macs, "x")


def test_multiplications_count_not_layers():
    small, big = Layer("Convolution", "f32"), Layer("Convolution", "u8", weights=(8, 9, 1, 1))
    assert evidence("int8", small, small, big, macs=1200) == "1 of 3 convolutions in int8"
    half = Layer("Convolution", "i8", weights=(8, 6, 1, 1))
    with refuses(UserError, "50.0% of its MACs in int8", "50.0% in fp32", path="x", expected="int8"):
        evidence("int8", small, small, half, macs=960)
    # a linear layer has no positions; with a batch of two, as of an image and its mirror image, it has twice the work
    linear = Layer("FullyConnected", "bf16", output=(2, 8), weights=(8, 3))
    assert evidence("bf16", linear, macs=48) == "0 of 0 convolutions in bf16"
    with refuses(UserError, "2.0% in layers", expected="fp32"):
        evidence("fp32", Layer("FullyConnected", "f32", output=(2, 8), weights=(8, 3)), macs=49)


@pytest.mark.parametrize("other", ["bf16", "f16", "u8", "i4"])
def test_fp32_means_every_multiplication(other):
    plain = Layer("Convolution", "f32")
    ignored = Layer("Eltwise", other)
    assert evidence("fp32", plain, plain, ignored, macs=480) == "2 of 2 convolutions in fp32"
    name = {"f16": "fp16", "u8": "int8", "i4": "another type"}.get(other, other)
    with refuses(UserError, "66.7% of its MACs in fp32", f"33.3% in {name}", expected="fp32"):
        evidence("fp32", plain, plain, Layer("Convolution", other))


def test_what_the_graph_does_not_tell_of_is_not_taken_for_granted():
    plain = Layer("Convolution", "f32")
    with refuses(UserError, "50.0% of its MACs in fp32", "50.0% in layers", expected="fp32"):
        evidence("fp32", plain, Layer("Unheard of", "f32"))
    # sizes that stay open count as one
    assert evidence("fp32", Layer("Convolution", "f32", output=(-1, 8, 5, 2)), macs=240)


def test_it_is_set_up_for_latency(files):
    with opened(files, "fp32", threads=1) as runner:
        told = runner._compiled.get_property
        assert told("INFERENCE_NUM_THREADS") == 1
        assert str(told("PERFORMANCE_HINT")) == "LATENCY"
        assert told("ENABLE_CPU_PINNING") is False
        assert told("NUM_STREAMS") == 1
    with opened(files, "fp32") as runner:
        assert runner._compiled.get_property("INFERENCE_NUM_THREADS") >= 1


# --- what is refused


def test_impossible_requests(files, shared):
    refused(files, InvalidValue, "'fp64'", "fp32, bf16 or int8", precision="fp64")
    refused(files, InvalidFile, "in fp32", "--precision int8", precision="int8")
    for precision, fact in (("fp32", "a file in fp32; pmm"), ("bf16", "a file in fp32, to run in bf16")):
        refused(files, InvalidFile, "in int8", fact, "--precision fp32", file="int8", precision=precision)
    half = shared.onnx(ExportOptions(precision="fp16"))
    refused({"fp32": half}, InvalidValue, "'fp16'")
    refused({"fp32": half}, InvalidFile, "in fp16", "--precision fp32", precision="fp32")
    refused(files, InvalidFile, "Wrong value for property key INFERENCE_NUM_THREADS", threads=-1)


def test_bf16_needs_instructions(files, monkeypatch):
    class Core:
        def get_property(self, device, name):
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", "INT8", "BIN"]

    monkeypatch.setattr(module, "shared_core", Core)
    refused(files, BackendUnavailable, "AVX512-BF16", precision="bf16")


@pytest.mark.parametrize("problem", [None, OSError("libopenvino.so.2640: cannot open\nmore")])
def test_a_missing_library(files, monkeypatch, problem):
    if problem is None:
        monkeypatch.setitem(sys.modules, "openvino", None)
    else:

        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "openvino":
                    raise problem

        monkeypatch.delitem(sys.modules, "openvino")
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with refuses(MissingLibrary, library="openvino", hint="pip install openvino"):
        OpenVinoRunner(files["fp32"])


def test_foreign_and_changed_files(files, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not onnx")
    with refuses(InvalidFile, "ONNX", path=tmp_path / "bad.onnx"):
        OpenVinoRunner(tmp_path / "bad.onnx")
    with refuses(InvalidFile, "not exist", path=tmp_path / "missing.onnx"):
        OpenVinoRunner(tmp_path / "missing.onnx")
    foreign = onnx.load(files["fp32"])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with refuses(InvalidFile, "without a manifest", path=tmp_path / "foreign.onnx"):
        OpenVinoRunner(tmp_path / "foreign.onnx")
    for path in (files["fp32"], manifest_path(files["fp32"])):
        shutil.copyfile(path, tmp_path / path.name)
    content = bytearray((tmp_path / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(content)
    with refuses(InvalidFile, "sha256", path=tmp_path / "model.onnx"):
        OpenVinoRunner(tmp_path / "model.onnx")


def test_the_bytes_that_were_hashed_are_the_ones_that_run(files, crops, expected, tmp_path, monkeypatch):
    path, real = tmp_path / "m.onnx", module._check_precision
    shutil.copyfile(files["fp32"], path)
    monkeypatch.setattr(module, "_check_precision", lambda *args: (path.write_bytes(b"evil"), real(*args)))
    with OpenVinoRunner(path) as runner:
        np.testing.assert_allclose(runner(crops), expected, rtol=1e-4, atol=1e-4)


def test_a_file_that_openvino_does_not_take(files, monkeypatch):
    file = read_onnx(files["fp32"])
    proto = onnx.ModelProto()
    proto.CopyFrom(file.proto)
    proto.graph.node[5].op_type = "NoSuchOperator"
    broken = dataclasses.replace(file, content=proto.SerializeToString())
    monkeypatch.setattr(module, "read_onnx", lambda path: broken)
    refused(files, InvalidFile, "OpenVINO", "NoSuchOperator")


@pytest.mark.parametrize(
    ("part", "field", "value", "said"),
    [
        ("preprocessing", "height", 256, "['uint8', 'any', '256', '64', '3']"),
        ("input", "name", "pixels", "pixels"),
        ("input", "dtype", "float32", "['float32', 'any', '128', '64', '3']"),
        ("embedding", "dim", 7, "['float32', 'any', '7']"),
        ("embedding", "name", "features", "features"),
    ],
)
def test_a_manifest_that_promises_something_else(files, part, field, value, said):
    manifest = read_onnx(files["fp32"]).manifest
    other = dataclasses.replace(manifest, **{part: dataclasses.replace(getattr(manifest, part), **{field: value})})
    with opened(files, "fp32") as runner, refuses(InvalidFile, path="x", expected=said):
        module._check_interface(runner._compiled, other, "x")


def test_the_interface_is_checked_on_opening(files, monkeypatch):
    file = read_onnx(files["fp32"])
    wider = dataclasses.replace(file.manifest, embedding=dataclasses.replace(file.manifest.embedding, dim=7))
    monkeypatch.setattr(module, "read_onnx", lambda path: dataclasses.replace(file, stored_manifest=wider))
    refused(files, InvalidFile, "'7'", "by its manifest")


def test_an_unverified_file_is_said_to_be_one(files, unverified, caplog):
    with caplog.at_level(logging.WARNING, "pmm"):
        OpenVinoRunner(files["fp32"])
        OpenVinoRunner(unverified, warn=False)
        assert "verified" not in caplog.text
        OpenVinoRunner(unverified)
    assert "unverified.onnx: its embeddings were never verified" in caplog.text


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signals here")
@pytest.mark.parametrize("closing", ["del first; del second", "threading.Thread(target=opened.clear).start()"])
def test_signals_are_heard_after_runners_were_closed(files, closing):
    """Handlers run on a stack that OpenVINO lends; see `shared_core`."""
    script = (
        "import faulthandler, os, signal, sys, threading, time; faulthandler.enable()\n"
        "from pmm.runtime.openvino import OpenVinoRunner\n"
        "signal.signal(signal.SIGUSR1, lambda *args: print('heard'))\n"
        f"first, second = opened = [OpenVinoRunner(sys.argv[1]) for _ in range(2)]\n"
        f"{'opened.clear()' if 'del' in closing else 'del first, second'}\n"
        f"{closing}\n"
        "time.sleep(0.5)\n"
        "os.kill(os.getpid(), signal.SIGUSR1)"
    )
    done = run_python("-c", script, files["fp32"])
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_it_needs_no_torch_and_the_library_is_not_taken_for_this_module(files):
    script = (
        "import sys; sys.modules['torch'] = None; import numpy as np\n"
        "from pmm.runtime.openvino import OpenVinoRunner\n"
        "assert 'openvino' not in sys.modules\n"
        "with OpenVinoRunner(sys.argv[1]) as runner:\n"
        "    print(runner(np.zeros((2, 128, 64, 3), np.uint8)).shape)"
    )
    done = run_python("-c", script, files["fp32"])
    assert done.stdout.strip() == "(2, 384)", done.stderr
