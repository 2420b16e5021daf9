"""ONNX Runtime through its CUDA provider: a stand-in GPU over real sessions on the CPU, and a real one where it is.

The stand-in runs what was enqueued when it is waited for, not before, and replays a graph on the places that it was
captured with: a missing wait or a graph of another place gives wrong numbers, or an AssertionError.
"""

import ctypes
import re
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.options import MIN_COSINE, ExportOptions
from pmm.runtime import driver, gpu_binding, ort, ort_session
from pmm.runtime.open import open_runner
from pmm.runtime.ort import OrtRunner
from pmm.utils import cuda_versions, hardware
from pmm.utils.errors import BackendUnavailable, InvalidFile, InvalidInput, MissingLibrary, OutOfMemory, UserError
from pmm.utils.hardware import Gpu, nvidia_gpus
from tests.refusals import refuses
from tests.runtime.standin import Driver, OnGpu, World

CUDA = "CUDAExecutionProvider"
AMPERE, TURING = Gpu("NVIDIA Standin A1", "8.0"), Gpu("NVIDIA Standin T1", "7.5")
OPEN, PLACE = ort.open_session, onnxruntime.OrtValue.ortvalue_from_shape_and_type


class Binding:
    def __init__(self, gpu, real):
        self.gpu, self.real, self.places = gpu, real, {}

    def bind_ortvalue_input(self, name, value):
        self.places[name] = value
        self.real.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name, value):
        self.places[name] = value
        self.real.bind_ortvalue_output(name, value)

    def synchronize_inputs(self):
        self.gpu.calls.append("inputs")

    def synchronize_outputs(self):
        self.gpu.work()


class Session:
    """A session on the CPU that takes the options of one on a GPU."""

    def __init__(self, gpu, real):
        self.gpu, self.real, self.graphs = gpu, real, {}

    def __getattr__(self, name):
        return getattr(self.real, name)

    def io_binding(self):
        return Binding(self.gpu, self.real.io_binding())

    def run(self, names, feeds):
        assert not self.gpu.cuda_graph, "would be captured, on places that do not stay"
        return self.real.run(names, feeds)

    def run_with_iobinding(self, binding, options):
        graph = int(options.get_run_config_entry("gpu_graph_id"))
        self.gpu.calls.append(graph)
        if self.gpu.refuses:
            raise RuntimeError(f"{self.gpu.refuses}\nmore")
        assert graph != 0, "ONNX Runtime's own number"
        if graph > 0:
            assert self.graphs.setdefault(graph, binding) is binding, "replayed on other places than captured"
        self.gpu.waiting.append(lambda: self.real.run_with_iobinding(binding.real))
        try:
            waits = options.get_run_config_entry("disable_synchronize_execution_providers") != "1"
        except RuntimeError:  # not set
            waits = True
        if waits:
            self.gpu.work()


class StandIn:
    def __init__(self, monkeypatch):
        self.patch, self.waiting, self.calls, self.opened, self.places = monkeypatch, [], [], [], []
        self.refuses, self.cuda_graph = "", False
        self.is_a(AMPERE)
        monkeypatch.setattr(ort, "verify_provider", lambda session, device, name: f"{CUDA} (all operators)")
        monkeypatch.setattr(ort, "open_session", self.open)
        monkeypatch.setattr(ort, "resolved_device", lambda device: device)
        monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", self.place)
        # from a GPU it is a copy
        view = onnxruntime.OrtValue.numpy
        monkeypatch.setattr(onnxruntime.OrtValue, "numpy", lambda value: view(value).copy())
        update = onnxruntime.OrtValue.update_inplace
        monkeypatch.setattr(onnxruntime.OrtValue, "update_inplace", lambda value, data: update(self.idle(value), data))

    def is_a(self, *models):
        for module in (ort_session, hardware):
            self.patch.setattr(module, "nvidia_gpus", lambda: models)

    def place(self, shape, kind, device, index):
        assert device == "cuda"
        self.places.append(index)
        return PLACE(shape, kind, "cpu", 0)

    def open(self, content, name, device, threads, **options):
        if device == "cpu":
            return OPEN(content, name, device, threads)
        self.opened.append((device, options))
        self.cuda_graph = options["cuda_graph"]
        return Session(self, OPEN(content, name, "cpu", threads))

    def idle(self, value):
        assert not self.waiting, "images are overwritten under a run"
        return value

    def work(self):
        while self.waiting:
            self.waiting.pop(0)()


@pytest.fixture
def gpu(monkeypatch):
    return StandIn(monkeypatch)


@pytest.fixture(scope="module")
def path(exported):
    return exported


@pytest.fixture(scope="module")
def crops(people):
    return load_crops([s.path for s in read_dataset("synthetic", people).query[:10]], 128, 64)


@pytest.fixture(scope="module")
def expected(path, crops):
    with open_runner(path, device="cpu") as runner:
        return runner(crops)


def same(found, wanted):
    assert found.shape == wanted.shape
    return np.allclose(found, wanted, rtol=1e-4, atol=1e-4)


# --- results


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_every_batch_size(gpu, path, crops, expected, cuda_graph):
    with OrtRunner(path, "cuda", cuda_graph=cuda_graph) as runner:
        for count in (1, 2, 7, 10, 2, 1, 10):
            start = count % 3
            found = runner(crops[start : start + count])
            assert same(found, expected[start : start + count])
        assert runner(crops[:0]).shape == (0, expected.shape[1])
        assert runner.cuda_graph == cuda_graph


def test_a_result_does_not_change_with_later_calls(gpu, path, crops):
    with OrtRunner(path, "cuda", cuda_graph=True) as runner:
        first = runner(crops[:3])
        before = first.copy()
        runner(crops[3:6])
        assert np.array_equal(first, before)


def test_one_graph_per_bucket_and_the_first_on_opening(gpu, path, crops):
    with OrtRunner(path, "cuda", cuda_graph=True) as runner:
        assert [call for call in gpu.calls if call != "inputs"] == [1]
        for count in (4, 3, 2, 4):
            runner(crops[:count])
        assert [call for call in gpu.calls if call != "inputs"] == [1, 4, 4, 2, 4]


def test_graphs_are_not_kept_without_end(gpu, path, crops, expected, monkeypatch):
    monkeypatch.setattr(ort, "GRAPHS_KEPT", 2)
    with OrtRunner(path, "cuda", cuda_graph=True) as runner:
        for count in (3, 5, 6, 9, 3, 1):
            assert same(runner(crops[:count]), expected[:count])
        assert len(runner._bindings) == 2
        runner.bind(crops[:7])()
        assert [call for call in gpu.calls if call != "inputs"] == [1, 4, -1, -1, -1, 4, 1, -1]


def test_batches_of_any_size_are_few_captures(gpu, path, crops, expected):
    with OrtRunner(path, "cuda", cuda_graph=True) as runner:
        for count in np.random.default_rng(0).integers(1, 11, 40).tolist():
            assert same(runner(crops[:count]), expected[:count])
        assert sorted(runner._bindings) == [1, 2, 4, 8, 12]
        gpu.calls.clear()
        step = runner.bind(crops[:5])
        step()
        assert left_by(step).shape[0] == 5, "a step is timed at its own size"


# ONNX Runtime's own words, of github.com/microsoft/onnxruntime issues 22702, 21684, 25609 and onnxruntime/mobius 316
CALL = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:114 std::conditional_t<THRW, void, "
    "onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*, const char*, SUCCTYPE, int) [with "
    "ERRTYPE = cudaError; bool THRW = true] "
)
AT = " ; GPU=0 ; hostname=private-name ; file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_execution_provider.cc ; line=336 ; expr="  # noqa: E501
OLD_DRIVER = f"{CALL}CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version{AT}cudaSetDevice()"


@pytest.mark.parametrize(
    "said",
    [
        "Non-zero status code returned while running Conv node. Name:'Conv_111' Status Message: \n/onnxruntime_src/"
        "onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) "
        "Failed to allocate memory for requested buffer of size 939524096",
        f"Non-zero status code returned while running Gemm node. Status Message: {CALL}CUBLAS failure 3: "
        f"CUBLAS_STATUS_ALLOC_FAILED{AT}cublasCreate(&cublas_handle_);",
        f"{CALL}CUDA failure 2: out of memory{AT}cudaMalloc((void**)&p, size);",
    ],
)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_batch_too_large_for_the_gpu_is_one_line(gpu, path, crops, said, cuda_graph):
    with OrtRunner(path, "cuda", cuda_graph=cuda_graph) as runner:

        def full(*args):
            raise RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {said}")

        runner.session.run = runner.session.run_with_iobinding = full
        with refuses(OutOfMemory, "7 images", hint="--batch-size") as one:
            runner(crops[:7])
        assert re.search(r"\((Failed to|CU\w+ failure)", str(one.value))
        assert "private-name" not in str(one.value)


@pytest.fixture
def old_driver(monkeypatch, tmp_path):
    """ONNX Runtime for CUDA 13 on a driver that serves 12.4: CUDA refuses when the session is made."""
    real = onnxruntime.InferenceSession

    def open_(content, options, providers, **others):
        if providers[0][0] == CUDA:
            raise RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {OLD_DRIVER}")
        return real(content, options, providers=providers, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_)
    monkeypatch.setattr(cuda_versions, "driver_version", lambda: "12.4")
    for module in (ort_session, hardware):
        monkeypatch.setattr(module, "nvidia_gpus", lambda: (AMPERE,))
    installed = cuda_versions.GpuLibrary("onnxruntime-gpu", "1.31.1", "13.0")
    monkeypatch.setattr(cuda_versions, "gpu_libraries", lambda: [installed])


# of libonnxruntime_providers_cuda.so 1.31.1, which loads cuDNN when it is used
NO_CUDNN = (
    "Non-zero status code returned while running Conv node. Name:'node_conv2d' Status Message: cuDNN is not available. "
    "Install cuDNN, update the system library search path, or set enable_cudnn=0 to force native CUDA paths where "
    "available."
)


def test_no_cudnn_is_one_line_and_auto_goes_on_on_the_cpu(gpu, path, crops, expected, caplog, monkeypatch):
    def refuse(self, names, feeds):
        raise RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {NO_CUDNN}")

    monkeypatch.setattr(Session, "run", refuse)
    for module in (ort, ort_session):
        monkeypatch.setattr(module, "cuda_fallback", lambda session: None)
    refused(path, ort_session.CudaFailure, "(cuDNN is not available", "pip install nvidia-cudnn-cu13")
    monkeypatch.setattr(ort, "resolved_device", lambda device: "cuda")
    with caplog.at_level("WARNING", "pmm"), OrtRunner(path, "auto") as runner:
        assert runner.info.backend == "ort-cpu"
        assert same(runner(crops[:2]), expected[:2])
    assert "runs on the CPU" in caplog.text
    assert "pip install nvidia-cudnn-cu13" in caplog.text


def test_a_driver_too_old_for_onnx_runtime_is_one_line_and_auto_goes_on_on_the_cpu(old_driver, path, crops, caplog):
    facts = ("CUDA failure 35", "onnxruntime-gpu 1.31.1", "CUDA 13.0", "CUDA 12.4", "580", '"onnxruntime-gpu[cuda,cudnn]>=1.23,<1.27"')  # fmt: skip # noqa: E501
    with refuses(ort_session.CudaFailure, *facts, path=path) as caught:
        OrtRunner(path, "cuda")
    assert "private-name" not in str(caught.value)
    with caplog.at_level("WARNING", "pmm"), OrtRunner(path, "auto") as runner:
        assert runner.info.backend == "ort-cpu"
        assert runner(crops[:2]).shape[0] == 2
    assert all(fact in caplog.text for fact in facts)


def test_threads_take_turns_with_the_graphs(gpu, path, crops, expected):
    with OrtRunner(path, "cuda", cuda_graph=True) as runner:
        together, wrong = threading.Barrier(4), []

        def work(start):
            together.wait(20)
            for _ in range(10):
                try:
                    assert same(runner(crops[start : start + 3]), expected[start : start + 3])
                except BaseException as error:
                    wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


# --- images on the GPU


@pytest.fixture
def world(gpu, monkeypatch):
    """Memory of the stand-in's GPUs, and their driver."""
    gpu.is_a(AMPERE, AMPERE)
    world = World()
    cuda = Driver(world)
    monkeypatch.setattr(driver, "cuda_library", lambda: cuda)
    return world


def content_of(found):
    return np.frombuffer(ctypes.string_at(found.pointer, found.nbytes), found.dtype).reshape(found.shape)


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("protocol", ["dlpack", "interface"])
def test_images_on_the_gpu_do_not_go_through_the_host(gpu, world, path, crops, expected, cuda_graph, protocol):
    with OrtRunner(path, "cuda", cuda_graph=cuda_graph) as runner:
        gpu.patch.setattr(gpu_binding.GpuBinding, "upload", lambda *_: pytest.fail("went up from the host"))
        for count in (1, 5, 3, 10):
            assert same(runner(OnGpu(world, crops[:count], protocol)), expected[:count])
        assert runner(OnGpu(world, crops[:0], protocol)).shape == (0, expected.shape[1])
        gpu.patch.setattr(gpu_binding.GpuBinding, "download", lambda *_: pytest.fail("came down to the host"))
        found = runner.embed_on_gpu(OnGpu(world, crops[:3], protocol))
        runner.embed_on_gpu(OnGpu(world, crops[3:6], protocol))
    assert (found.shape, found.device) == ((3, expected.shape[1]), 0)
    assert same(content_of(found), expected[:3])


def test_images_in_host_memory_may_leave_their_embeddings_on_the_gpu(gpu, world, path, crops, expected):
    with OrtRunner(path, "cuda:1", cuda_graph=True) as runner:
        found = runner.embed_on_gpu(crops[:5])
        assert runner.embed_on_gpu(crops[:0]).shape == (0, expected.shape[1])
    assert found.device == 1
    assert same(content_of(found), expected[:5])
    with OrtRunner(path, "cpu") as runner, refuses(UserError, "ort-cpu", "on cpu"):
        runner.embed_on_gpu(crops[:5])


def test_images_that_this_gpu_does_not_take(gpu, world, path, crops):
    with OrtRunner(path, "cuda:1") as runner:
        for given, facts in (
            (OnGpu(world, crops[:2], "dlpack", 0), ("cuda:0", "cuda:1")),
            (OnGpu(world, crops[:2].astype(np.float32), "dlpack", 1), ("float32", "uint8 [B, 128, 64, 3]")),
        ):
            with refuses(InvalidInput, *facts):
                runner(given)
    with OrtRunner(path, "cpu") as runner, refuses(InvalidInput, "on a GPU", "on cpu"):
        runner(OnGpu(world, crops[:2], "dlpack"))


# --- binding


def left_by(step):
    return step._binding.download()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_bound_step_uploads_once(gpu, path, crops, expected, cuda_graph):
    with OrtRunner(path, "cuda", cuda_graph=cuda_graph) as runner:
        images = crops[:4].copy()
        step = runner.bind(images)
        images[:] = 0
        gpu.calls.clear()
        for _ in range(3):
            step()
            assert same(left_by(step), expected[:4])
        number = 4 if cuda_graph else -1
        assert gpu.calls == ["inputs", number, number, number]
        # another call, or step, of the same batch size; ours brings its images back
        other = runner.bind(crops[5:9])
        other()
        assert same(left_by(other), expected[5:9])
        gpu.calls.clear()
        step()
        assert same(left_by(step), expected[:4])
        assert ("inputs" in gpu.calls) == cuda_graph  # without a graph each step has its own place
        runner(crops[5:9])
        step.enqueue()
        step.wait()
        assert same(left_by(step), expected[:4])


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_what_is_enqueued_is_waited_for(gpu, path, crops, expected, cuda_graph):
    with OrtRunner(path, "cuda", cuda_graph=cuda_graph) as runner:
        step, other = runner.bind(crops[:4]), runner.bind(crops[5:9])
        step()
        for _ in range(3):
            step.enqueue()
        assert len(gpu.waiting) == 3
        step.wait()
        assert not gpu.waiting
        assert same(left_by(step), expected[:4])
        # images are not overwritten under a run that waits for its turn
        step.enqueue()
        other.enqueue()
        step.enqueue()
        step.wait()
        assert same(left_by(step), expected[:4])
        step.enqueue()
        assert same(runner(crops[5:9]), expected[5:9])


def test_transfers_are_timed(gpu, path, crops, expected, monkeypatch):
    now = iter([1.0, 1.25, 1.375])
    monkeypatch.setattr(gpu_binding.time, "perf_counter", lambda: next(now))
    with OrtRunner(path, "cuda", cuda_graph=True) as runner:
        step = runner.bind(crops[:4])
        step.enqueue()
        gpu.calls.clear()
        assert step.transfers_ms() == (250.0, 125.0)
        assert not gpu.waiting
        assert gpu.calls == ["inputs"]  # waited for: a copy may go on after the call
        step()
        assert same(left_by(step), expected[:4])
        assert step.device_ms() is None


def test_transfers_copy_both_ways_and_bring_the_images_that_they_time(gpu, path, crops, expected, monkeypatch):
    with OrtRunner(path, "cuda", cuda_graph=True) as runner:
        step, other = runner.bind(crops[:4]), runner.bind(crops[5:9])
        other()
        numpy, copies = onnxruntime.OrtValue.numpy, []
        with monkeypatch.context() as patch:
            patch.setattr(onnxruntime.OrtValue, "numpy", lambda value: copies.append(value.shape()) or numpy(value))
            step.transfers_ms()
        assert copies == [[4, expected.shape[1]]]
        other()
        assert same(left_by(other), expected[5:9])
        step.transfers_ms()
        step()
        assert same(left_by(step), expected[:4])


def test_no_images_cannot_be_bound(gpu, path, crops):
    for cuda_graph in (False, True):
        with OrtRunner(path, "cuda", cuda_graph=cuda_graph) as runner:
            with refuses(InvalidInput, "0 images"):
                runner.bind(crops[:0])
            with refuses(InvalidInput, "float32", expected="uint8"):
                runner.bind(crops.astype(np.float32))


def test_on_a_cpu_a_step_has_no_device_times(path, crops):
    with OrtRunner(path) as runner:
        step = runner.bind(crops[:2])
        step.enqueue()
        step.wait()
        assert step.device_ms() is None
        assert step.transfers_ms() is None


# --- what runs


def test_what_runs_is_told(gpu, path):
    version = f"onnxruntime {onnxruntime.__version__} {CUDA} (all operators)"
    for tf32, cuda_graph in ((False, False), (True, False), (False, True), (True, True)):
        info = OrtRunner(path, "cuda", tf32=tf32, cuda_graph=cuda_graph).info
        assert (info.backend, info.device) == ("ort-cuda", AMPERE.name)
        assert info.precision == ("tf32" if tf32 else "fp32")
        assert info.provider == version + ", cuDNN HEURISTIC" + (", CUDA graph" if cuda_graph else "")
        assert gpu.opened[-1] == ("cuda", {"tf32": tf32, "cuda_graph": cuda_graph, "float_biases": False})


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_the_gpu_that_was_chosen(gpu, path, crops, expected, cuda_graph):
    gpu.is_a(TURING, AMPERE)
    with open_runner(path, device="cuda:1") if not cuda_graph else OrtRunner(path, "cuda:1", cuda_graph=True) as runner:
        assert (runner.info.backend, runner.info.device) == ("ort-cuda", AMPERE.name)
        assert same(runner(crops[:3]), expected[:3])
        step = runner.bind(crops[:4])
        step()
        assert same(left_by(step), expected[:4])
    assert gpu.opened[-1][0] == "cuda:1"
    assert set(gpu.places) == {1}
    OrtRunner(path, "cuda:1", tf32=True)
    refused(path, BackendUnavailable, "NVIDIA Standin T1", "TF32", device="cuda:0", tf32=True)


def test_the_provider_is_told_and_falls_back_to_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **options: asked.append((args, options)))
    OPEN(b"x", device="cuda")
    OPEN(b"x", device="cuda", tf32=True)
    OPEN(b"x", device="cuda", cuda_graph=True)
    OPEN(b"x")
    OPEN(b"x", device="cuda:2")
    providers = [options["providers"] for _, options in asked]
    usual = {"device_id": 0, "use_tf32": 0, "enable_cuda_graph": 0, "cudnn_conv_algo_search": "HEURISTIC"}
    assert providers == [
        [(CUDA, usual)],
        [(CUDA, usual | {"use_tf32": 1})],
        [(CUDA, usual | {"enable_cuda_graph": 1})],
        [("CPUExecutionProvider", {})],
        [(CUDA, usual | {"device_id": 2})],
    ]
    assert [options["enable_fallback"] for _, options in asked] == [0] * 5


def test_a_session_does_not_fall_back_while_it_runs(path):
    assert OrtRunner(path).session._enable_fallback is False


def test_the_names_of_the_options_are_onnx_runtimes():
    """A misspelt run option would be ignored."""
    from onnxruntime.capi import onnxruntime_inference_collection

    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("onnxruntime_pybind11_state*")
    for name in ("gpu_graph_id", "disable_synchronize_execution_providers"):
        assert name.encode() in library.read_bytes()
    assert onnxruntime_inference_collection._GRAPH_ANNOTATION_SKIP == gpu_binding.NO_GRAPH


# --- what is refused


def refused(path, kind, *facts, device="cuda", **options):
    with refuses(kind, *facts):
        OrtRunner(path, device, **options)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tf32_is_for_fp32_files(gpu, shared, precision):
    path = shared.onnx(ExportOptions(precision=precision))
    refused(path, InvalidFile, path, f"in {precision}", "TF32", tf32=True)
    assert not gpu.opened


def test_tf32_needs_a_gpu_that_has_it(gpu, path):
    gpu.is_a(TURING)
    refused(path, BackendUnavailable, path, "NVIDIA Standin T1", "TF32", tf32=True)
    assert OrtRunner(path, "cuda").info.precision == "fp32"
    assert [Gpu("x", capability).has_tf32 for capability in ("7.5", "8.0", "8.9", "12.0")] == [False, True, True, True]


def test_a_cpu_has_neither(path):
    refused(path, BackendUnavailable, path, "CPU", "TF32", device="cpu", tf32=True)
    refused(path, BackendUnavailable, path, "CPU", "CUDA graphs", device="cpu", cuda_graph=True)


def test_a_graph_that_cannot_be_captured(gpu, path):
    gpu.refuses = "CUDA failure 901: operation failed due to a previous error during capture"
    refused(path, UserError, path, "CUDA graph (CUDA failure 901: ", "during capture)", cuda_graph=True)
    OrtRunner(path, "cuda")


def test_a_missing_library_and_gpu_are_unavailable(path, monkeypatch):
    monkeypatch.setattr(ort_session, "nvidia_gpus", tuple)
    refused(path, BackendUnavailable, "--device cuda:1", "no NVIDIA GPU", device="cuda:1")
    refused(path, BackendUnavailable, "no NVIDIA GPU")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(path, MissingLibrary, "pip install onnxruntime", "onnxruntime-gpu[cuda,cudnn]", device="cpu")


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_on_a_gpu(trained, shared, crops, precision, cuda_graph):
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("the ONNX Runtime that is installed is for CPUs: pip install onnxruntime-gpu")
    if precision == "tf32" and not nvidia_gpus()[0].has_tf32:
        pytest.skip(f"{nvidia_gpus()[0].name} has no TF32")
    stored = "fp32" if precision == "tf32" else precision
    path = shared.onnx(ExportOptions(precision=stored))
    least = MIN_COSINE[precision]
    with (
        open_runner(trained, device="cpu") as reference,
        OrtRunner(path, "cuda", tf32=precision == "tf32", cuda_graph=cuda_graph) as runner,
    ):
        assert runner.info.precision == precision
        wanted = reference(crops)
        for count in (10, 3, 1, 10, 3):
            assert numeric_parity(wanted[:count], runner(crops[:count])).min_cosine > least
        step, other = runner.bind(crops[:4]), runner.bind(crops[4:8])
        for _ in range(3):
            for each in (step, step, other):
                each.enqueue()
            step()
            assert numeric_parity(wanted[:4], left_by(step)).min_cosine > least
            other.enqueue()
            other.wait()
            assert numeric_parity(wanted[4:8], left_by(other)).min_cosine > least
        up, down = step.transfers_ms()
        assert 0 < up < 1000
        assert 0 < down < 1000
