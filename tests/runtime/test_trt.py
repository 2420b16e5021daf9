"""The TensorRT runner against a stand-in of four versions (see standin.py); none of it needs a GPU."""

import ctypes
import dataclasses
import gc
import hashlib
import json
import logging
import sys
import threading

import numpy as np
import pytest

from pmm.artifacts.artifact import manifest_path
from pmm.artifacts.batch_profiles import BatchProfile, BatchProfiles
from pmm.artifacts.manifest import EmbeddingContract, InputContract, Manifest
from pmm.artifacts.native_contracts import EngineContract
from pmm.data.preprocessing import Preprocessing
from pmm.runtime import driver, thread_context, trt, trt_variant
from pmm.runtime.cuda_graph import bucket
from pmm.runtime.driver import DriverError
from pmm.runtime.open import open_runner
from pmm.utils import extras, hardware
from pmm.utils.errors import (
    BackendUnavailable,
    InvalidFile,
    InvalidInput,
    InvalidValue,
    MissingLibrary,
    OutOfMemory,
    UserError,
)
from pmm.utils.hardware import Gpu
from tests.refusals import refuses
from tests.runtime.standin import INVALIDATED, LISTS, HostDevice, Libcuda, Module, OnGpu, World, embed

SIZE = Preprocessing(height=8, width=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
BATCH = BatchProfile(least=2, best=3, most=6)
DIM = 5
GPU = Gpu("NVIDIA Standin 6000", "8.9")
PLAIN = [name for name in LISTS if "rtx" not in name]
RTX = [name for name in LISTS if "rtx" in name]
ON_OPENING = ("create_execution_context", "set_optimization_profile_async")
CHECKED = (*ON_OPENING, "set_input_shape", "infer_shapes", "set_tensor_address", "execute_async_v3")


class Machine:
    """A machine with one version of TensorRT, and an engine on its disk."""

    def __init__(self, version, tmp_path, monkeypatch):
        self.world, self.patch = World(), monkeypatch
        self.module, self.cuda = Module(version, self.world), Libcuda(self.world)
        self.flavor = "rtx" if "rtx" in version else "tensorrt"
        self.devices = []
        monkeypatch.setitem(sys.modules, trt_variant.FLAVORS[self.flavor], self.module)
        self.gpus = (GPU,)
        for module in (hardware, trt_variant):
            monkeypatch.setattr(module, "nvidia_gpus", lambda: self.gpus)
        monkeypatch.setattr(trt, "open_device", self.open_device)
        monkeypatch.setattr(driver, "cuda_library", lambda: self.cuda)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        self.path = tmp_path / "model.plan"
        self.write()

    def open_device(self, index=0):
        self.devices.append(HostDevice(self.world, index))
        return self.devices[-1]

    def write(self, contract=None, given=None, content=None, beside=True, parity=None, **plan):
        """An engine and its manifest; `plan` and `content` are what the file holds, the rest what is promised."""
        self.given = given or InputContract()
        self.plan = {
            "seed": 3,
            "batches": [[BATCH.least, BATCH.best, BATCH.most]],
            "input": {"name": "images", "dtype": self.given.dtype, "shape": self.given.shape(SIZE)},
            "outputs": [{"name": "embeddings", "dtype": "float32", "shape": [DIM]}],
            **plan,
        }
        content = content or json.dumps(self.plan).encode()
        self.path.write_bytes(content)
        promised = {
            "flavor": self.flavor,
            "version": self.module.__version__,
            "batch": BatchProfiles((BATCH,)),
            "onnx_sha256": "0" * 64,
            "platform": trt_variant.this_platform(),
            "gpu": GPU.name,
            "compute_capability": GPU.compute_capability,
            "hardware_compatibility": "none",
            "driver": "13.0",
            "flags": (),
            "precision_read_from": "parsed network",
        }
        manifest = Manifest(
            checkpoint_sha256="1" * 64,
            method="pmm",
            preprocessing=SIZE,
            input=self.given,
            embedding=EmbeddingContract(dim=DIM),
            precision="fp16",
            precision_found="fp16",
            precision_share={"fp16": 1.0},
            macs=1,
            opset=20,
            versions={},
            sha256=hashlib.sha256(content).hexdigest(),
            parity={"cosine": 1.0} if parity is None else parity,
            engine=EngineContract(**{**promised, **(contract or {})}),
        )
        manifest_path(self.path).write_text(manifest.to_json())
        if not beside:
            manifest_path(self.path).unlink()
        return manifest

    def open(self, **options):
        return trt.TrtRunner(self.path, **options)

    def expected(self, crops):
        matrix = np.random.default_rng(self.plan["seed"]).standard_normal((SIZE.height * SIZE.width * 3, DIM))
        return embed(self.given.feed(crops, SIZE), matrix)

    def nothing_left(self):
        gc.collect()
        world = self.world
        return not (world.memory or world.streams or world.graphs or world.executables or list(world.contexts))

    def refused(self, kind, *facts, touched=False, **options):
        """Opening fails with the facts in one line, and leaves nothing behind."""
        with refuses(kind, *facts) as caught:
            self.open(**options)
        assert bool(self.world.runtimes) == touched
        caught.value.__traceback__ = None
        assert not self.world.memory
        assert not self.world.streams
        assert not self.world.executables


@pytest.fixture(scope="module", autouse=True)
def only_what_is_new_is_collected():
    """`nothing_left` then does not look through all that the libraries hold."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=LISTS)
def machine(request, tmp_path, monkeypatch):
    return Machine(request.param, tmp_path, monkeypatch)


@pytest.fixture
def plain(tmp_path, monkeypatch):
    return Machine(PLAIN[-1], tmp_path, monkeypatch)


@pytest.fixture
def rtx(tmp_path, monkeypatch):
    return Machine(RTX[0], tmp_path, monkeypatch)


def crops(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE.height, SIZE.width, 3), np.uint8)


# --- results


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_every_batch_size_gives_the_rows_of_the_images(machine, cuda_graph):
    with machine.open(cuda_graph=cuda_graph) as runner:
        # below the least, inside, the most, several runs with a ragged or too small rest; repeated: replayed
        for count in [1, 2, 3, 6, 7, 8, 15, 1, 6, 3, 15]:
            images = crops(count, seed=count)
            found = runner(images)
            assert found.dtype == np.float32
            assert found.shape == (count, DIM)
            assert np.array_equal(found, machine.expected(images))
    assert machine.nothing_left()


def test_an_engine_of_a_static_batch_takes_any_number_of_images(machine):
    """Its first size is that number, not -1 (NvInferRuntime.h, ICudaEngine::getTensorShape)."""
    profile = BatchProfile(least=4, best=4, most=4)
    kind = {"given": InputContract(batch=4), "contract": {"batch": BatchProfiles((profile,))}, "batches": [[4, 4, 4]]}
    machine.write(**kind, static=4)
    with machine.open() as runner:
        for count in (1, 4, 7):
            assert np.array_equal(runner(crops(count)), machine.expected(crops(count)))
        runner.bind(crops(4))()
        with refuses(InvalidInput, "model.plan", "3 images", "static batch", "4"):
            runner.bind(crops(3))
    machine.write(**kind)  # an engine that takes any, under this manifest
    machine.refused(InvalidFile, "images [-1, 8, 4, 3]", "expected", "images [4, 8, 4, 3]", touched=True)


@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize("colour", ["rgb", "bgr"])
def test_the_engine_gets_what_it_was_exported_for(plain, kind, colour):
    plain.write(given=InputContract.of(kind, colour))
    with plain.open() as runner:
        assert np.array_equal(runner(crops(4)), plain.expected(crops(4)))


def test_no_images_give_no_rows(machine):
    with machine.open() as runner:
        found = runner(crops(0))
        assert found.shape == (0, DIM)
        assert found.dtype == np.float32


def test_a_result_does_not_change_with_later_calls(machine):
    with machine.open() as runner:
        first = runner(crops(3, seed=1))
        before = first.copy()
        runner(crops(3, seed=2))
        assert np.array_equal(first, before)


def test_images_are_checked(machine):
    with machine.open() as runner, refuses(InvalidInput, "float32", expected="uint8"):
        runner(crops(2).astype(np.float32))


def test_what_runs_is_told(machine):
    version, library = machine.module.__version__, "tensorrt-rtx" if machine.flavor == "rtx" else "tensorrt"
    with machine.open() as runner:
        assert runner.info.backend == library
        assert runner.info.device == GPU.name
        assert runner.info.precision == "fp16"
        assert runner.info.provider == f"{library} {version} (buffers: host 1.0, CUDA graph)"
        assert runner.cuda_graph
    with machine.open(cuda_graph=False) as runner:
        assert runner.info.provider.endswith("host 1.0, no CUDA graph)")
        assert not runner.cuda_graph


def test_open_runner_takes_engines(plain):
    with open_runner(plain.path, device="cuda") as runner:
        assert np.array_equal(runner(crops(2)), plain.expected(crops(2)))


def test_an_unverified_engine_is_said_to_be_one(plain, caplog):
    manifest = plain.write()
    manifest_path(plain.path).write_text(dataclasses.replace(manifest, parity=None).to_json())
    with caplog.at_level(logging.WARNING, "pmm"), plain.open():
        assert "never verified" in caplog.text


def test_an_unverified_engine_may_be_opened_without_a_word(plain, caplog):
    manifest = plain.write()
    manifest_path(plain.path).write_text(dataclasses.replace(manifest, parity=None).to_json())
    with caplog.at_level(logging.WARNING, "pmm"), plain.open(warn=False):
        assert not caplog.text


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_the_inspector_is_asked_with_a_context_whose_shapes_are_set(machine, cuda_graph):
    """Without one it answers "N/A due to dynamic shapes", as the stand-in does."""
    with machine.open(cuda_graph=cuda_graph) as runner:
        (layer,) = json.loads(runner.inspect())["Layers"]
        assert "N/A" not in json.dumps(layer)
        assert np.array_equal(runner(crops(4)), machine.expected(crops(4)))
    with refuses(UserError, "closed"):
        runner.inspect()


def test_host_code_stays_forbidden(machine):
    with machine.open():
        assert [runtime.engine_host_code_allowed for runtime in machine.world.runtimes] == [False]


# --- binding


def test_a_bound_step_runs_without_uploading(machine):
    with machine.open() as runner:
        step = runner.bind(crops(3, seed=4))
        device = machine.devices[0]
        uploads = []
        upload = device.upload
        machine.patch.setattr(device, "upload", lambda buffer, array: uploads.append(1) or upload(buffer, array))
        output = the_context(runner)._output
        expected = machine.expected(crops(3, seed=4))
        for _ in range(2):
            output.owner[:] = 0
            step()
            assert np.array_equal(output.owner[: expected.nbytes].view(np.float32).reshape(3, DIM), expected)
        assert not uploads
        # another call uses the same buffers; the step must not run on its images
        runner(crops(3, seed=5))
        step()
        assert np.array_equal(output.owner[: expected.nbytes].view(np.float32).reshape(3, DIM), expected)


@pytest.mark.parametrize("count", [0, BATCH.most + 1])
def test_what_cannot_be_bound(plain, count):
    with plain.open() as runner, refuses(InvalidInput, f"{count} images", expected="1 "):
        runner.bind(crops(count))


def test_bound_images_are_a_copy(plain):
    with plain.open() as runner:
        images = crops(2, seed=1)
        expected = plain.expected(images)
        step = runner.bind(images)
        images[:] = 0
        runner(crops(2, seed=2))
        step()
        output = the_context(runner)._output
        assert np.array_equal(output.owner[: expected.nbytes].view(np.float32).reshape(2, DIM), expected)


def the_context(runner):
    (context,) = runner._contexts._idle
    return context


def left_by(machine, count):
    """What is on the GPU after a step."""
    return left_on(machine.runner, count)


def left_on(runner, count):
    return the_context(runner)._output.owner[: count * DIM * 4].view(np.float32).reshape(count, DIM)


@pytest.fixture
def running(machine):
    with machine.open() as machine.runner:
        yield machine


def test_what_is_enqueued_is_waited_for(running):
    stream = running.world.streams[running.devices[0].stream]
    step = running.runner.bind(crops(3, seed=4))
    left_by(running, 3)[:] = 0
    for _ in range(3):
        step.enqueue()
    assert len(stream.waiting) == 3
    assert not left_by(running, 3).any()
    step.wait()
    assert not stream.waiting
    assert np.array_equal(left_by(running, 3), running.expected(crops(3, seed=4)))


def test_runs_that_were_enqueued_keep_their_images(running):
    first, other = (running.runner.bind(crops(count, seed=count)) for count in (4, 5))
    for step in (first, other, other, first):
        step.enqueue()
    assert np.array_equal(running.runner(crops(6, seed=6)), running.expected(crops(6, seed=6)))
    first.enqueue()
    first.wait()
    assert np.array_equal(left_by(running, 4), running.expected(crops(4, seed=4)))
    first.enqueue()
    other.enqueue()
    other.wait()
    assert np.array_equal(left_by(running, 5), running.expected(crops(5, seed=5)))


def test_a_graph_is_not_freed_before_it_has_run(running):
    running.patch.setattr(thread_context, "GRAPHS_KEPT", 1)
    steps = [running.runner.bind(crops(count, seed=count)) for count in (4, 5, 6)]
    for step in steps * 2:
        step.enqueue()
    steps[0].enqueue()
    steps[0].wait()
    assert np.array_equal(left_by(running, 4), running.expected(crops(4, seed=4)))


def test_device_times_are_those_of_the_work_alone(running):
    step, other = running.runner.bind(crops(1, seed=1)), running.runner.bind(crops(4, seed=4))
    for _ in range(5):
        other.enqueue()
    assert other.device_ms() == pytest.approx(1.0)
    # the images come back first, which does not count
    assert step.device_ms() == pytest.approx(1.0)
    assert np.array_equal(left_by(running, 1), running.expected(crops(1, seed=1)))
    # images are padded to the engine's least batch, embeddings are not
    up, down = step.transfers_ms()
    assert up == pytest.approx(BATCH.least * SIZE.height * SIZE.width * 3 / 1000)
    assert down == pytest.approx(DIM * 4 / 1000)
    other.enqueue()
    assert other.transfers_ms() == pytest.approx((4 * SIZE.height * SIZE.width * 3 / 1000, 4 * DIM * 4 / 1000))
    other()
    assert np.array_equal(left_by(running, 4), running.expected(crops(4, seed=4)))


def test_transfers_bring_the_images_that_they_time(running):
    step = running.runner.bind(crops(3, seed=3))
    running.runner(crops(6, seed=6))
    step.transfers_ms()
    context = the_context(running.runner)
    images = crops(3, seed=3)
    assert np.array_equal(context._input.owner[: images.nbytes], images.reshape(-1))
    step()
    assert np.array_equal(left_by(running, 3), running.expected(crops(3, seed=3)))


# --- precision


@pytest.mark.parametrize(
    ("found", "flags", "capability", "runs"),
    [
        ("fp32", ("TF32 on",), "8.9", "tf32"),
        ("fp32", ("TF32 on",), "8.0", "tf32"),
        ("fp32", ("TF32 on",), "7.5", "fp32"),
        ("fp32", ("TF32 off",), "8.9", "fp32"),
        ("fp32", (), "8.9", "fp32"),
        ("fp16", ("TF32 on",), "8.9", "fp16"),
    ],
)
def test_tf32_is_what_an_fp32_engine_with_leave_for_it_runs_in(plain, found, flags, capability, runs):
    plain.gpus = (Gpu(GPU.name, capability),)
    manifest = plain.write(contract={"flags": flags, "compute_capability": capability})
    told = dataclasses.replace(manifest, precision=found, precision_found=found)
    manifest_path(plain.path).write_text(told.to_json())
    with plain.open() as runner:
        assert runner.info.precision == runs


# --- threads


def test_threads_share_a_few_contexts(machine):
    with machine.open() as runner:
        together, wrong = threading.Barrier(4), []

        def work(seed):
            together.wait(20)
            for turn in range(30):
                images = crops(1 + (seed + turn) % 8, seed=seed * 100 + turn)
                try:
                    if not np.array_equal(runner(images), machine.expected(images)):
                        wrong.append(f"numbers, thread {seed}")
                except BaseException as error:
                    wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(machine.devices) <= 4
    assert machine.nothing_left()


def in_a_thread(work):
    """What `work()` returns, or the text of its UserError."""
    found = []

    def run():
        try:
            found.append(work())
        except UserError as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_per_request_takes_the_context_that_is_idle(machine):
    with machine.open() as runner:
        for turn in range(5):
            images = crops(2, seed=turn)
            assert np.array_equal(in_a_thread(lambda images=images: runner(images)), machine.expected(images))
    assert len(machine.devices) == 1
    assert machine.world.calls.count("create_execution_context") == len({2, 3} if machine.flavor != "rtx" else {1})


@pytest.mark.parametrize("contexts", [1, 3])
def test_no_more_runs_at_a_time_than_contexts(plain, contexts):
    """Runs that all wait inside: as many as contexts are there, the others outside."""
    inside, most, go = [], [], threading.Event()
    run = thread_context.ThreadContext.run

    def slow(self, *args):
        inside.append(self)
        most.append(len(inside))
        go.wait(20)
        run(self, *args)
        inside.remove(self)

    with plain.open(contexts=contexts) as runner:
        plain.patch.setattr(thread_context.ThreadContext, "run", slow)
        threads = [threading.Thread(target=runner, args=(crops(2),)) for _ in range(5)]
        for thread in threads:
            thread.start()
        while len(inside) < contexts:
            threading.Event().wait(0.001)
        assert len(plain.devices) == contexts
        go.set()
        for thread in threads:
            thread.join()
    assert max(most) == contexts
    assert plain.nothing_left()


def test_closing_waits_for_the_run_under_way(plain):
    started, go = threading.Event(), threading.Event()
    run, found = thread_context.ThreadContext.run, []

    def slow(self, *args):
        started.set()
        go.wait(20)
        run(self, *args)

    runner = plain.open()
    plain.patch.setattr(thread_context.ThreadContext, "run", slow)
    calls = threading.Thread(target=lambda: found.append(runner(crops(2))))
    closes = threading.Thread(target=runner.close)
    calls.start()
    started.wait(20)
    closes.start()
    go.set()
    calls.join()
    closes.join()
    assert np.array_equal(found[0], plain.expected(crops(2)))
    assert plain.nothing_left()


# --- CUDA graphs


@pytest.mark.parametrize("version", PLAIN)
def test_one_graph_per_batch_size(version, tmp_path, monkeypatch):
    machine = Machine(version, tmp_path, monkeypatch)
    with machine.open() as runner:
        for count in [3, 4, 5, 4, 3, 5]:
            assert np.array_equal(runner(crops(count)), machine.expected(crops(count)))
        calls = machine.world.calls
        assert calls.count("cuGraphInstantiateWithFlags") == 3
        assert calls.count("cuGraphLaunch") == 7  # and one on opening
        assert calls.count("execute_async_v3") == 6  # to warm up and to capture, per size
        assert calls.count("create_execution_context") == 3
        # the execution contexts of one share their working memory: input, output, and that
        assert calls.count("allocate") == 3
    assert machine.nothing_left()


@pytest.mark.parametrize("version", PLAIN)
def test_the_least_recently_used_graph_goes(version, tmp_path, monkeypatch):
    machine = Machine(version, tmp_path, monkeypatch)
    monkeypatch.setattr(thread_context, "GRAPHS_KEPT", 2)
    with machine.open() as runner:
        plain_sizes = [(4, 2), (2, 3), (1, 3), (4, 3), (6, 4), (5, 4), (4, 4), (2, 5), (2, 5), (6, 6)]
        for count, captured in plain_sizes:
            assert np.array_equal(runner(crops(count)), machine.expected(crops(count)))
            assert machine.world.calls.count("cuGraphInstantiateWithFlags") == captured
            assert len(machine.world.executables) <= 2
        assert machine.world.calls.count("create_execution_context") == 2


@pytest.mark.parametrize("call", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"])
def test_a_failing_capture_falls_back_and_says_so(plain, caplog, call):
    plain.cuda.codes[call] = INVALIDATED
    with caplog.at_level(logging.WARNING, "pmm"), plain.open() as runner:
        assert "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" in caplog.text
        assert not runner.cuda_graph
        assert f"no CUDA graph: {call} failed" in runner.info.provider
        assert "host 1.0" in runner.info.provider
        for count in [1, 4, 9]:
            assert np.array_equal(runner(crops(count)), plain.expected(crops(count)))
        assert len(caplog.records) == 1
        assert "cuGraphLaunch" not in plain.world.calls
        assert plain.world.calls.count(call) == 1
    assert plain.nothing_left()


def test_a_capture_that_fails_later_turns_all_graphs_off(plain):
    with plain.open() as runner:
        assert runner.cuda_graph
        plain.cuda.codes["cuStreamEndCapture"] = INVALIDATED
        for count in [5, 3, 4, 5, 3]:
            assert np.array_equal(runner(crops(count)), plain.expected(crops(count)))
        assert "no CUDA graph: " in runner.info.provider
        # on opening, and the size that was captured then; no other is tried again
        assert plain.world.calls.count("cuGraphLaunch") == 3
        assert plain.world.calls.count("cuStreamBeginCapture_v2") == 2
    assert plain.nothing_left()


def test_graphs_that_fail_elsewhere_leave_no_context_without_memory(plain):
    """Another context finds that graphs fail while this one makes a context."""
    with plain.open() as runner:
        lend = thread_context.ThreadContext._lend_memory

        def fail_meanwhile(self, context):
            runner._without_graphs("told elsewhere")
            lend(self, context)

        plain.patch.setattr(thread_context.ThreadContext, "_lend_memory", fail_meanwhile)
        for count in (5, 2, 3):
            assert np.array_equal(runner(crops(count)), plain.expected(crops(count)))
    assert plain.nothing_left()


def test_a_failing_launch_is_an_error(plain):
    with plain.open() as runner:
        plain.cuda.codes["cuGraphLaunch"] = INVALIDATED
        with refuses(DriverError, "cuGraphLaunch"):
            runner(crops(3))


def test_a_failing_launch_on_opening_leaves_nothing(plain):
    plain.cuda.codes["cuGraphLaunch"] = INVALIDATED
    plain.refused(DriverError, "cuGraphLaunch", touched=True)


def test_rtx_captures_by_itself(rtx):
    strategies = rtx.module.CudaGraphStrategy
    with rtx.open() as runner:
        runner(crops(3))
        (context,) = rtx.world.contexts
        assert context._how.cuda_graph_strategy == strategies.WHOLE_GRAPH_CAPTURE
        assert runner.cuda_graph
        assert not [call for call in rtx.world.calls if call.startswith("cu")]
    del context
    with rtx.open(cuda_graph=False) as runner:
        (context,) = rtx.world.contexts
        assert context._how.cuda_graph_strategy != strategies.WHOLE_GRAPH_CAPTURE
        assert not runner.cuda_graph


def compiled(rtx, **options):
    """Kernels that were compiled in a run of one and of three images, after opening."""
    before = rtx.world.calls.count("compile")
    with rtx.open(**options) as runner:
        runner(crops(1))
        runner(crops(6))
    return rtx.world.calls.count("compile") - before


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_rtx_compiles_once_for_all_processes(rtx, cuda_graph):
    assert compiled(rtx, cuda_graph=cuda_graph) == 3
    assert compiled(rtx, cuda_graph=cuda_graph) == 0
    (kept,) = (rtx.path.parent / "cache").rglob("*.cache")
    for content in (b"no cache", b""):
        kept.write_bytes(content)
        assert compiled(rtx) == 3
    # of another version: not taken, and replaced
    kept.write_text(json.dumps({"version": "0.9", "kernels": [1, 3, 6]}))
    assert compiled(rtx) == 3
    assert compiled(rtx) == 0


def test_a_cache_that_cannot_be_kept_is_no_error(rtx):
    (rtx.path.parent / "cache").write_text("a file where the folder should be")
    assert compiled(rtx) == compiled(rtx) == 3


@pytest.mark.parametrize("eager", [True, False])
def test_rtx_compiles_before_the_run_where_asked(rtx, eager):
    with rtx.open(eager=eager):
        (context,) = rtx.world.contexts
        strategy = context._how.dynamic_shapes_kernel_specialization_strategy
        assert (strategy == rtx.module.DynamicShapesKernelSpecializationStrategy.EAGER) == eager


def test_an_rtx_without_a_strategy_runs_without_graphs(rtx):
    del rtx.module._api["CudaGraphStrategy"]
    with rtx.open() as runner:
        assert not runner.cuda_graph
        assert runner.info.provider.endswith("no CUDA graph)")
        assert np.array_equal(runner(crops(4)), rtx.expected(crops(4)))


# --- batches


def write_profiles(machine, *sizes):
    machine.write(
        contract={"batch": BatchProfiles(tuple(BatchProfile(least=a, best=b, most=c) for a, b, c in sizes))},
        batches=[list(size) for size in sizes],
    )


def test_batches_of_any_size_run_as_few_captured_ones(plain):
    """A tracker's: 1 to 40 crops at random."""
    write_profiles(plain, (1, 8, 48))
    sizes = np.random.default_rng(0).integers(1, 41, 300).tolist()
    with plain.open() as runner:
        for turn, count in enumerate(sizes):
            images = crops(count, seed=turn % 7)
            assert np.array_equal(runner(images), plain.expected(images))
        captured = {bucket(count, 48) for count in [8, *sizes]}
        assert plain.world.calls.count("cuGraphInstantiateWithFlags") == len(captured) <= thread_context.GRAPHS_KEPT
        # each is launched, but for the warm-up and the capture of its size
        assert plain.world.calls.count("cuGraphLaunch") == len(sizes) + 1
        assert plain.world.calls.count("execute_async_v3") == 2 * len(captured)


def test_without_graphs_no_image_is_added(plain):
    write_profiles(plain, (1, 8, 48))
    with plain.open(cuda_graph=False) as runner:
        shapes = []
        context = plain.module._classes["IExecutionContext"]
        real = context.set_input_shape
        plain.patch.setattr(context, "set_input_shape", lambda *given: shapes.append(given[2][0]) or real(*given))
        for count in (3, 7, 17):
            runner(crops(count))
        assert shapes == [3, 7, 17]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_batch_runs_in_the_profile_that_is_made_for_it(machine, cuda_graph):
    write_profiles(machine, (1, 1, 1), (2, 4, 6), (8, 8, 12))
    chosen = []
    context = machine.module._classes["IExecutionContext"]
    real = context.set_optimization_profile_async
    machine.patch.setattr(
        context, "set_optimization_profile_async", lambda *given: chosen.append(given[1]) or real(*given)
    )
    with machine.open(cuda_graph=cuda_graph) as runner:
        for count in (1, 4, 6, 7, 12, 1, 30):
            assert np.array_equal(runner(crops(count)), machine.expected(crops(count)))
        step = runner.bind(crops(5))
        step()
        assert np.array_equal(left_on(runner, 5), machine.expected(crops(5)))
        assert set(chosen) == {0, 1, 2}
        before = len(chosen)
        runner(crops(4))
        runner(crops(4))
        assert len(chosen) - before <= 1
    assert machine.nothing_left()


# --- images on the GPU


PROTOCOLS = ["dlpack", "interface"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_images_on_the_gpu_do_not_go_through_the_host(machine, protocol, cuda_graph):
    with machine.open(cuda_graph=cuda_graph) as runner:
        machine.patch.setattr(HostDevice, "upload", lambda *_: pytest.fail("went up from the host"))
        assert runner(OnGpu(machine.world, crops(0), protocol)).shape == (0, DIM)
        for count in (1, 3, 4, 6, 7, 15):
            images = crops(count, seed=count)
            there = OnGpu(machine.world, images, protocol)
            assert np.array_equal(runner(there), machine.expected(images))
        machine.patch.setattr(HostDevice, "download", lambda *_: pytest.fail("came down to the host"))
        images = crops(9, seed=9)
        embeddings = runner.embed_on_gpu(OnGpu(machine.world, images, protocol))
        assert (embeddings.shape, embeddings.dtype, embeddings.device) == ((9, DIM), np.float32, 0)
    held = {**embeddings.__cuda_array_interface__, "version": 3}
    found = np.asarray(type("Host", (), {"__array_interface__": held})())
    assert np.array_equal(found, machine.expected(images))


def test_images_in_host_memory_may_leave_their_embeddings_there(plain):
    with plain.open() as runner:
        embeddings = runner.embed_on_gpu(crops(7, seed=1))
        assert np.array_equal(runner(crops(3)), plain.expected(crops(3)))
        content = ctypes.string_at(embeddings.pointer, embeddings.nbytes)
    assert np.array_equal(np.frombuffer(content, np.float32).reshape(7, DIM), plain.expected(crops(7, seed=1)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_images_on_the_gpu_are_checked(plain, protocol):
    def refused(content, *expected, index=0):
        with refuses(InvalidInput, *expected):
            runner(OnGpu(plain.world, content, protocol, index))

    with plain.open() as runner:
        refused(crops(2), "cuda:1", "cuda:0", index=1)
        refused(crops(2).astype(np.float32), "float32", "uint8 [B, 8, 4, 3]")
        refused(np.zeros((2, 3, 8, 4), np.uint8), "[2, 3, 8, 4]", "uint8 [B, 8, 4, 3]")
    for contract in (InputContract.of("float", "rgb"), InputContract.of("uint8", "bgr")):
        plain.write(given=contract)
        with plain.open() as runner:
            refused(crops(2), contract.dtype, contract.colour.upper(), "--input uint8")


def test_the_gpu_that_is_asked_for(machine):
    machine.gpus = (Gpu("NVIDIA Other", "7.0"), GPU)
    machine.refused(InvalidFile, "NVIDIA Other")
    with machine.open(device="cuda:1") as runner:
        assert runner.info.device == GPU.name
        assert np.array_equal(runner(crops(2)), machine.expected(crops(2)))
        images = crops(2, seed=5)
        assert np.array_equal(runner(OnGpu(machine.world, images, "dlpack", 1)), machine.expected(images))
    assert [device.index for device in machine.devices] == [1]
    for device, expected in (("cuda:2", "2 visible"), ("cuda:x", "cuda:N"), ("gpu", "cuda:N")):
        with pytest.raises(UserError, match=expected):
            machine.open(device=device)


# --- what the library refuses


@pytest.mark.parametrize("call", CHECKED)
def test_a_call_that_fails_is_named(machine, call):
    machine.world.failing.add(call)
    machine.refused(UserError, machine.path, call, machine.module.__version__, touched=True)
    with machine.open(cuda_graph=False) as runner:
        machine.world.failing.add(call)
        if call in ON_OPENING:
            return
        with refuses(UserError, call):
            runner(crops(5))
        # and the runner goes on
        assert np.array_equal(runner(crops(5)), machine.expected(crops(5)))


def test_undetermined_shapes_are_named(machine):
    machine.world.undetermined = ["images", "mask"]
    machine.refused(UserError, "infer_shapes", "images, mask", touched=True)


def test_a_driver_that_is_too_old_is_named_with_all_that_was_logged(machine, monkeypatch):
    monkeypatch.setattr(trt_variant, "driver_version", lambda: "12.2")
    machine.world.failing.add("Runtime")
    machine.refused(
        UserError, machine.path, machine.module.__version__, "driver version is insufficient", "Error Code 3",
        "CUDA 12.2", "update the driver",
    )  # fmt: skip


def test_memory_that_is_not_there(machine):
    machine.world.failing.add("allocate")
    machine.refused(OutOfMemory, "model.plan", "out of memory", "less than 6 images (--batch)", touched=True)


def test_memory_that_is_not_there_for_another_thread(machine):
    with machine.open() as runner, runner._contexts.borrow():
        machine.world.failing.add("allocate")
        assert "host 1.0: out of memory; free GPU memory" in in_a_thread(lambda: runner(crops(2)))
        assert [device.closed for device in machine.devices] == [False, True]
        # the next one that asks gets its own
        assert np.array_equal(in_a_thread(lambda: runner(crops(2))), machine.expected(crops(2)))


def test_a_file_that_is_no_engine(machine):
    machine.write(content=b"not an engine")
    expected = ["magicTag does not match", "pmm export trt"] + (["INVALID", "5"] if machine.flavor == "rtx" else [])
    machine.refused(InvalidFile, *expected, touched=True)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"input": {"name": "pixels", "dtype": "uint8", "shape": [8, 4, 3]}}, "takes uint8 pixels [-1, 8, 4, 3]"),
        ({"input": {"name": "images", "dtype": "float32", "shape": [8, 4, 3]}}, "takes float32 images"),
        ({"input": {"name": "images", "dtype": "uint8", "shape": [8, 5, 3]}}, "[-1, 8, 5, 3]"),
        ({"outputs": [{"name": "features", "dtype": "float32", "shape": [DIM]}]}, "returns float32 features"),
        ({"outputs": [{"name": "embeddings", "dtype": "float16", "shape": [DIM]}]}, "HALF"),
        ({"outputs": [{"name": "embeddings", "dtype": "float32", "shape": [DIM + 1]}]}, f"[-1, {DIM + 1}]"),
        ({"outputs": [{"name": n, "dtype": "float32", "shape": [DIM]} for n in ("embeddings", "logits")]}, "logits"),
        ({"batches": [[1, 3, 6]]}, "(1, 8, 4, 3)"),
        ({"batches": [[2, 4, 6]]}, "(4, 8, 4, 3)"),
        ({"batches": [[2, 3, 7]]}, "(7, 8, 4, 3)"),
        ({"batches": [[2, 3, 6], [2, 4, 8]]}, "2 batch profile"),
    ],
)
def test_an_engine_other_than_promised(machine, plan, expected):
    machine.write(**plan)
    machine.refused(InvalidFile, "by its manifest", expected, touched=True)


def test_a_shape_other_than_promised_for_a_batch(machine):
    context = machine.module._classes["IExecutionContext"]
    machine.patch.setattr(context, "get_tensor_shape", lambda self, name: [self._batch, DIM + 1])
    machine.refused(InvalidFile, "[3, 6] for 3 images", "expected [3, 5]", touched=True)


# --- what is refused before TensorRT is touched


def test_an_engine_without_manifest(machine):
    machine.write(beside=False)
    machine.refused(InvalidFile, "no manifest", "executable code", "model.plan.json")


def test_an_engine_with_another_files_manifest(machine):
    manifest = machine.write()
    manifest_path(machine.path).write_text(dataclasses.replace(manifest, engine=None).to_json())
    machine.refused(InvalidFile, "manifest", "without the section 'engine'")


def test_a_changed_engine(machine):
    machine.path.write_bytes(machine.path.read_bytes() + b" ")
    machine.refused(InvalidFile, machine.path, "sha256")


def test_a_missing_engine(machine):
    machine.path.unlink()
    machine.refused(InvalidFile, machine.path, "not exist")


def test_the_bytes_that_were_hashed_are_the_ones_that_run(plain):
    """An engine that is replaced while it is opened is not run."""

    def swap_and_open(index):
        plain.path.write_bytes(b"evil")
        return plain.open_device(index)

    plain.patch.setattr(trt, "open_device", swap_and_open)
    with plain.open() as runner:
        assert np.array_equal(runner(crops(2)), plain.expected(crops(2)))


@pytest.mark.parametrize("patch", [False, True])
def test_another_version(machine, patch):
    version = f"{machine.module.__version__}.1" if patch else "9.1.2"
    machine.write(contract={"version": version})
    machine.refused(InvalidFile, f"built with {version}", machine.module.__version__, "pmm export trt")


def test_another_platform(machine):
    machine.write(contract={"platform": "windows-amd64"})
    machine.refused(InvalidFile, "windows-amd64", trt_variant.this_platform(), "pmm export trt")


def test_another_compute_capability(plain):
    plain.write(contract={"compute_capability": "8.6"})
    plain.refused(InvalidFile, GPU.name, GPU.compute_capability, "8.6", "pmm export trt")


def test_another_gpu_of_the_same_compute_capability_runs_it_with_a_warning(plain, caplog):
    plain.write(contract={"gpu": "NVIDIA Other"})
    with caplog.at_level(logging.WARNING, "pmm"), plain.open() as runner:
        assert np.array_equal(runner(crops(2)), plain.expected(crops(2)))
    (record,) = caplog.records
    assert "NVIDIA Other" in record.getMessage()
    assert GPU.name in record.getMessage()


def test_all_that_differs_is_named(plain):
    gpu = {"gpu": "NVIDIA Other", "compute_capability": "8.0"}
    plain.write(contract={"version": "9.1.2", "platform": "windows-amd64", **gpu})
    plain.refused(InvalidFile, "9.1.2", "windows-amd64", "NVIDIA Other")


def test_a_hardware_compatible_engine_runs_on_another_gpu(machine):
    machine.write(
        contract={"gpu": "NVIDIA Other", "compute_capability": "8.0", "hardware_compatibility": "ampere-plus"}
    )
    with machine.open() as runner:
        assert np.array_equal(runner(crops(2)), machine.expected(crops(2)))


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0", "12.1"])
def test_an_rtx_engine_built_without_gpu_runs_on_those_listed(rtx, capability):
    rtx.gpus = (Gpu("NVIDIA Any", capability),)
    rtx.write(contract={"gpu": "", "compute_capability": ""})
    with rtx.open() as runner:
        assert runner.info.device == "NVIDIA Any"


@pytest.mark.parametrize("capability", ["7.0", "7.5", "9.0", "10.0"])
def test_an_rtx_engine_built_without_gpu_runs_on_no_other(rtx, capability):
    rtx.gpus = (Gpu("NVIDIA Any", capability),)
    rtx.write(contract={"gpu": "", "compute_capability": ""})
    rtx.refused(InvalidFile, "NVIDIA Any", capability, "8.0, 8.6, 8.9, 12.0, 12.1")


def test_a_tensorrt_engine_without_gpu_in_its_manifest_runs_nowhere(plain):
    plain.write(contract={"gpu": "", "compute_capability": ""})
    plain.refused(InvalidFile, GPU.name)


def test_no_gpu(machine):
    machine.gpus = ()
    machine.refused(BackendUnavailable, machine.path, "NVIDIA GPUs", "none")


def test_the_cpu(machine):
    machine.refused(BackendUnavailable, machine.path, "NVIDIA GPUs", "CPU", device="cpu")


def test_an_unknown_device(machine):
    with refuses(InvalidValue, value="tpu"):
        machine.open(device="tpu")
    assert not machine.world.runtimes


def test_a_missing_library(machine):
    machine.patch.setitem(sys.modules, trt_variant.FLAVORS[machine.flavor], None)
    machine.refused(MissingLibrary, f"pip install {trt_variant.library_name(machine.flavor)}")


def test_a_library_that_cannot_be_loaded(machine):
    def load(name):
        raise FileNotFoundError(f"libnvinfer.so of {name}")

    machine.patch.setattr(extras.importlib, "import_module", load)
    machine.refused(MissingLibrary, "libnvinfer.so", "pip install")


def test_an_unknown_flavor():
    with refuses(InvalidValue, value="tensorflow", expected="tensorrt or rtx"):
        trt_variant.load_flavor("tensorflow")


# --- closing


def test_close_frees_everything_and_may_be_repeated(machine):
    runner = machine.open()
    step = runner.bind(crops(4))
    runner(crops(15))
    runner.close()
    assert machine.nothing_left()
    runner.close()
    uses = (step.enqueue, step.wait, step.device_ms, step.transfers_ms)
    for use in (lambda: runner(crops(2)), lambda: runner.bind(crops(2)), step, *uses):
        with refuses(UserError, "closed"):
            use()
    assert not runner.cuda_graph


def test_the_library_has_one_logger_and_each_runner_hears_it(machine, tmp_path):
    """Of two, it would use the first for both."""
    with machine.open(), machine.open() as second:
        machine.world.failing.add("set_input_shape")
        with refuses(UserError, "set_input_shape", "outside the profile"):
            second(crops(5))
    assert len({id(runtime._logger) for runtime in machine.world.runtimes}) == 1
    first, later = [], []
    kept = [trt_variant.error_logger(machine.module, lambda *said: first.append(said))]
    kept.append(trt_variant.error_logger(machine.module, lambda *said: later.append(said)))
    kept[0].native.log(machine.module.ILogger.Severity.INFO, "one")
    del kept[0]
    kept[0].native.log(machine.module.ILogger.Severity.INFO, "two")
    assert (first, later) == ([("INFO", "one")], [("INFO", "one"), ("INFO", "two")])


def test_the_logger_keeps_every_error_until_it_is_told(machine):
    logger = trt_variant.error_logger(machine.module)
    severity = machine.module.ILogger.Severity
    assert isinstance(logger.native, machine.module.ILogger)
    assert logger.take() == "no reason given"
    for kind, text in ((severity.ERROR, "one\ntwo"), (severity.WARNING, "careful"), (severity.ERROR, ""),
                       (severity.INTERNAL_ERROR, " three "), (severity.ERROR, "one")):  # fmt: skip
        logger.native.log(kind, text)
    assert logger.take() == "one; three"
    assert logger.take("nothing") == "nothing"
