"""Device memory through each library: fakes that move bytes in host memory, and the real ones where there is a GPU."""

import contextlib
import ctypes
import importlib
import re
import sys
import threading
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from pmm.runtime import cuda_libraries, driver
from pmm.runtime.cuda_libraries import CudaPythonDevice, PycudaDevice, TorchDevice, open_device
from pmm.runtime.driver import DriverError
from pmm.utils.errors import BackendUnavailable, UserError
from tests.refusals import refuses
from tests.runtime.standin import Libcuda, World

HANDLE = 0x7F1234567890


class FakeTorch(ModuleType):
    """Tensors on "cuda" are the CPU's. `Stream` hands out the same 32 in turn (c10/cuda/CUDAStream.cpp)."""

    def __init__(self, available=True):
        super().__init__("torch")
        self.calls, self.failing, self.uint8, self.now = [], set(), torch.uint8, 0.0
        self.__version__ = "9.9.1+cu130"
        self.cuda = SimpleNamespace(
            is_available=lambda: available,
            Stream=self._pooled,
            ExternalStream=self._stream,
            default_stream=lambda device: SimpleNamespace(cuda_stream=0, device=device),
            stream=self._inside("stream"),
            device=self._inside("device"),
            Event=self._event,
        )

    def _enter(self, name, *args):
        self.calls.append((name, *args))
        if name in self.failing:
            raise RuntimeError(f"CUDA error: no {name}\nmore lines")

    def _pooled(self, device):
        self.streams = getattr(self, "streams", 0) + 1
        return self._stream(HANDLE + self.streams % 32, device)

    def _stream(self, handle, device):
        self._enter("Stream", device)
        return SimpleNamespace(
            cuda_stream=handle,
            synchronize=lambda: self._enter("synchronize"),
            wait_stream=lambda other: self._enter("wait", other.cuda_stream),
        )

    def _event(self, *, enable_timing):
        assert enable_timing
        self._enter("Event")

        def record(stream):
            assert stream.cuda_stream in self.opened
            self._enter("record")
            event.at = self.now

        def synchronize():
            self._enter("wait for event")
            event.done = True

        def elapsed_time(end):
            self._enter("elapsed_time")
            assert end.done
            return end.at - event.at

        event = SimpleNamespace(record=record, synchronize=synchronize, elapsed_time=elapsed_time, done=False)
        return event

    def _inside(self, name):
        @contextlib.contextmanager
        def inside(what):
            self._enter(f"{name} in", what)
            yield
            self.calls.append((f"{name} out", what))

        return inside

    def empty(self, size, *, dtype=torch.uint8, device="cpu", pin_memory=False):
        self._enter("empty", size, device, pin_memory)
        return torch.empty(size, dtype=dtype)

    def from_numpy(self, array):
        self._enter("from_numpy")
        return torch.from_numpy(array)


class FakePycuda:
    """pycuda.driver, where every use needs the context that was pushed in the same thread."""

    class Error(Exception):
        pass

    def __init__(self):
        self.calls, self.failing, self.memory, self.depth, self.now = [], set(), {}, threading.local(), 0.0

    def enter(self, name, *args, context=True):
        self.calls.append((name, *args))
        if name in self.failing:
            raise self.Error(f"{name} failed: out of memory")
        assert not context or getattr(self.depth, "value", 0) > 0, f"{name}: no context in this thread"

    def module(self):
        module = ModuleType("pycuda.driver")
        module.Error = self.Error
        module.init = lambda: self.enter("init", context=False)
        module.Device = lambda index: SimpleNamespace(retain_primary_context=lambda: self._retain(index))
        module.Stream = self._stream
        module.Event = self._event
        module.mem_alloc = self._mem_alloc
        module.pagelocked_empty = self._pagelocked_empty
        module.memcpy_htod_async = self._htod
        module.memcpy_dtoh_async = self._dtoh
        return module

    def _retain(self, index):
        self.enter("retain", index, context=False)

        def push():
            self.enter("push", context=False)
            self.depth.value = getattr(self.depth, "value", 0) + 1

        def pop():
            self.depth.value -= 1

        return SimpleNamespace(push=push, pop=pop)

    def _stream(self, flags=0):
        self.enter("Stream", flags)
        return SimpleNamespace(handle=HANDLE, synchronize=lambda: self.enter("synchronize"))

    def _event(self, flags=0):
        assert flags == 0, "times are switched off"
        self.enter("Event")

        def record(stream):
            assert stream.handle == HANDLE
            self.enter("record")
            event.at = self.now

        def synchronize():
            self.enter("wait for event")
            event.done = True

        def time_since(begin):
            self.enter("time_since")
            assert event.done
            return event.at - begin.at

        event = SimpleNamespace(record=record, synchronize=synchronize, time_since=time_since, done=False)
        return event

    def _mem_alloc(self, nbytes):
        self.enter("mem_alloc", nbytes)
        memory = np.empty(nbytes, np.uint8)
        pointer = memory.ctypes.data
        self.memory[pointer] = memory

        class Allocation:
            def __int__(allocation):  # noqa: N805
                return pointer

            def free(allocation):  # noqa: N805
                self.enter("free")
                del self.memory[pointer]

        return Allocation()

    def _pagelocked_empty(self, shape, dtype):
        self.enter("pagelocked_empty")
        return np.empty(shape, dtype)

    def _htod(self, pointer, array, stream):
        self.enter("memcpy_htod_async")
        assert stream.handle == HANDLE
        self.memory[pointer][: array.nbytes] = array

    def _dtoh(self, array, pointer, stream):
        self.enter("memcpy_dtoh_async")
        assert stream.handle == HANDLE
        array[:] = self.memory[pointer][: array.nbytes]


class FakeCudaPython(ModuleType):
    """cuda.bindings.runtime: each function returns its error code, then its results."""

    class cudaMemcpyKind(IntEnum):  # noqa: N801
        cudaMemcpyHostToDevice = 1  # noqa: N815
        cudaMemcpyDeviceToHost = 2  # noqa: N815

    def __init__(self):
        super().__init__("cuda.bindings.runtime")
        self.calls, self.failing, self.memory, self.device = [], set(), {}, 1
        self.now, self.events, self.waited_for = 0.0, {}, None

    def _code(self, name, *args):
        self.calls.append((name, *args))
        return 2 if name in self.failing else 0

    def _memory(self, nbytes):
        memory = np.empty(nbytes, np.uint8)
        self.memory[memory.ctypes.data] = memory
        return memory.ctypes.data

    def cudaGetDevice(self):  # noqa: N802
        return self._code("cudaGetDevice"), self.device

    def cudaSetDevice(self, device):  # noqa: N802
        self.device = device
        return (self._code("cudaSetDevice", device),)

    def cudaStreamCreateWithFlags(self, flags):  # noqa: N802
        return self._code("cudaStreamCreateWithFlags", flags), HANDLE

    def cudaMalloc(self, nbytes):  # noqa: N802
        code = self._code("cudaMalloc", nbytes)
        return code, (None if code else self._memory(nbytes))

    def cudaMallocHost(self, nbytes):  # noqa: N802
        code = self._code("cudaMallocHost", nbytes)
        return code, (None if code else self._memory(nbytes))

    def cudaMemcpyAsync(self, target, source, nbytes, kind, stream):  # noqa: N802
        assert stream == HANDLE
        device_side = target if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else source
        assert device_side in self.memory, "the direction is the other one"
        code = self._code("cudaMemcpyAsync")
        if not code:
            ctypes.memmove(target, source, nbytes)
        return (code,)

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        return (self._code("cudaStreamSynchronize", stream),)

    def cudaStreamDestroy(self, stream):  # noqa: N802
        return (self._code("cudaStreamDestroy", stream),)

    def cudaFree(self, pointer):  # noqa: N802
        del self.memory[pointer]
        return (self._code("cudaFree"),)

    def cudaFreeHost(self, pointer):  # noqa: N802
        del self.memory[pointer]
        return (self._code("cudaFreeHost"),)

    def cudaEventCreate(self):  # noqa: N802
        code = self._code("cudaEventCreate")
        if not code:
            self.events[1000 + len(self.calls)] = None
        return code, (None if code else 1000 + len(self.calls))

    def cudaEventRecord(self, event, stream):  # noqa: N802
        assert stream == HANDLE
        self.events[event] = self.now
        return (self._code("cudaEventRecord"),)

    def cudaEventSynchronize(self, event):  # noqa: N802
        assert event in self.events
        self.waited_for = event
        return (self._code("cudaEventSynchronize"),)

    def cudaEventElapsedTime(self, start, end):  # noqa: N802
        assert end == self.waited_for
        code = self._code("cudaEventElapsedTime")
        return code, (None if code else self.events[end] - self.events[start])

    def cudaEventDestroy(self, event):  # noqa: N802
        del self.events[event]
        return (self._code("cudaEventDestroy"),)

    def cudaGetErrorName(self, code):  # noqa: N802
        return 0, b"cudaErrorMemoryAllocation"


@pytest.fixture
def libraries(monkeypatch, tmp_path):
    """Install fakes of the named libraries; the others are missing. Returns them by name."""
    # what a wrong import would run
    for name in ("autoinit", "autoprimaryctx"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('pycuda.{name} was imported')")

    def install(*names, torch_available=True):
        world = World()
        cuda = Libcuda(world)
        monkeypatch.setattr(driver, "cuda_library", lambda: cuda)
        for module in ("torch", "pycuda", "pycuda.driver", "pycuda.autoinit", "cuda.bindings", "cuda.bindings.runtime"):
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, "pycuda.autoinit")
        found = {}
        if "torch" in names:
            found["torch"] = FakeTorch(torch_available)
            found["torch"].opened, found["torch"].driver = world.streams, cuda
            monkeypatch.setitem(sys.modules, "torch", found["torch"])
        if "pycuda" in names:
            found["pycuda"], package = FakePycuda(), ModuleType("pycuda")
            package.VERSION_TEXT, package.__path__ = "2026.1", [str(tmp_path)]
            monkeypatch.setitem(sys.modules, "pycuda", package)
            monkeypatch.setitem(sys.modules, "pycuda.driver", found["pycuda"].module())
        if "cuda-python" in names:
            found["cuda-python"], package = FakeCudaPython(), ModuleType("cuda.bindings")
            package.__version__ = "13.5.0"
            monkeypatch.setitem(sys.modules, "cuda.bindings", package)
            monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", found["cuda-python"])
        return found

    return install


KINDS = {"torch": TorchDevice, "pycuda": PycudaDevice, "cuda-python": CudaPythonDevice}
NAMES = {"torch": "torch 9.9.1", "pycuda": "pycuda 2026.1", "cuda-python": "cuda-python 13.5.0"}


# --- the choice


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        (("torch", "pycuda", "cuda-python"), "torch"),
        (("pycuda", "cuda-python"), "pycuda"),
        (("torch", "cuda-python"), "torch"),
        (("cuda-python",), "cuda-python"),
    ],
)
def test_order_of_choice(libraries, installed, chosen):
    libraries(*installed)
    device = open_device()
    assert type(device) is KINDS[chosen]
    assert device.name == NAMES[chosen]
    assert device.index == 0
    assert device.stream


def test_torch_without_cuda_is_passed_over(libraries):
    libraries("torch", "pycuda", torch_available=False)
    assert open_device().library == "pycuda"


def test_a_library_that_fails_is_passed_over(libraries):
    libraries("pycuda", "cuda-python")["pycuda"].failing.add("init")
    assert open_device().library == "cuda-python"


def test_none_is_one_line_with_the_reasons(libraries):
    found = libraries("torch", "pycuda", torch_available=False)
    found["pycuda"].failing.add("retain")
    facts = ("torch: no CUDA", "pycuda 2026.1: primary context", "out of memory", "import of cuda.bindings.runtime")
    with refuses(BackendUnavailable, *facts, "pip install cuda-python", hint="pycuda"):
        open_device()


# --- what each does


@pytest.fixture(params=KINDS)
def opened(request, libraries):
    fake = libraries(request.param)[request.param]
    return open_device(), fake


def test_bytes_go_there_and_back(opened):
    device, _ = opened
    with device.active():
        buffer = device.allocate(64)
        given, taken = device.host_array((2, 4), np.float32), device.host_array((4,), np.float32)
        assert (given.shape, given.dtype) == ((2, 4), np.float32)
        given[:] = np.arange(8).reshape(2, 4)
        device.upload(buffer, given)
        device.download(buffer, taken)
        device.synchronize()
        assert taken.tolist() == [0, 1, 2, 3]
        on_device = np.ctypeslib.as_array((ctypes.c_float * 8).from_address(buffer.pointer))
        assert on_device.tolist() == list(range(8))
        assert buffer.nbytes == 64
        del given, taken, on_device
    device.close()


def test_work_is_timed_by_the_gpu(opened):
    device, fake = opened
    waits = ("wait for event", "cudaEventSynchronize")

    def work():
        assert not any(call[0] in waits for call in fake.calls)
        fake.now += 2.5

    fake.now = 7.0
    with device.active():
        fake.calls.clear()
        assert device.elapsed_ms(work) == 2.5
        assert sum(call[0] in waits for call in fake.calls) == 1
        with pytest.raises(ZeroDivisionError):
            device.elapsed_ms(lambda: 1 / 0)
    device.close()
    assert not getattr(fake, "events", None)


def test_arrays_that_do_not_fit_are_refused(opened):
    device, _ = opened
    with device.active():
        buffer = device.allocate(8)
        for array in (np.zeros(9, np.uint8), np.zeros((2, 8), np.uint8)[:, ::2]):
            with pytest.raises(ValueError, match="for 8 bytes"):
                device.upload(buffer, array)
            with pytest.raises(ValueError, match="for 8 bytes"):
                device.download(buffer, array)


def test_another_thread_may_use_and_close_it(opened):
    device, fake = opened
    with device.active():
        device.allocate(8)
        device.host_array((8,), np.uint8)
    failed = []

    def work():
        try:
            with device.active(), device.active():
                device.allocate(8)
                device.synchronize()
            device.close()
            device.close()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert not getattr(fake, "memory", None)


FAILURES = [
    ("torch", "Stream", lambda d, b, a: TorchDevice()),
    ("torch", "empty", lambda d, b, a: d.allocate(8)),
    ("torch", "wait", lambda d, b, a: d.allocate(8)),
    ("torch", "empty", lambda d, b, a: d.host_array((8,), np.uint8)),
    ("torch", "synchronize", lambda d, b, a: d.synchronize()),
    ("torch", "Event", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("torch", "record", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("torch", "wait for event", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("torch", "elapsed_time", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("pycuda", "init", lambda d, b, a: PycudaDevice()),
    ("pycuda", "Stream", lambda d, b, a: PycudaDevice()),
    ("pycuda", "push", lambda d, b, a: d.active().__enter__()),
    ("pycuda", "mem_alloc", lambda d, b, a: d.allocate(8)),
    ("pycuda", "pagelocked_empty", lambda d, b, a: d.host_array((8,), np.uint8)),
    ("pycuda", "memcpy_htod_async", lambda d, b, a: d.upload(b, a)),
    ("pycuda", "memcpy_dtoh_async", lambda d, b, a: d.download(b, a)),
    ("pycuda", "synchronize", lambda d, b, a: d.synchronize()),
    ("pycuda", "Event", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("pycuda", "record", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("pycuda", "wait for event", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("pycuda", "time_since", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("pycuda", "free", lambda d, b, a: d.close()),
    ("cuda-python", "cudaGetDevice", lambda d, b, a: d.active().__enter__()),
    ("cuda-python", "cudaSetDevice", lambda d, b, a: d.active().__enter__()),
    ("cuda-python", "cudaStreamCreateWithFlags", lambda d, b, a: CudaPythonDevice()),
    ("cuda-python", "cudaMalloc", lambda d, b, a: d.allocate(8)),
    ("cuda-python", "cudaMallocHost", lambda d, b, a: d.host_array((8,), np.uint8)),
    ("cuda-python", "cudaMemcpyAsync", lambda d, b, a: d.upload(b, a)),
    ("cuda-python", "cudaMemcpyAsync", lambda d, b, a: d.download(b, a)),
    ("cuda-python", "cudaStreamSynchronize", lambda d, b, a: d.synchronize()),
    ("cuda-python", "cudaEventCreate", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("cuda-python", "cudaEventRecord", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("cuda-python", "cudaEventSynchronize", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("cuda-python", "cudaEventElapsedTime", lambda d, b, a: d.elapsed_ms(lambda: None)),
    ("cuda-python", "cudaFree", lambda d, b, a: d.close()),
    ("cuda-python", "cudaFreeHost", lambda d, b, a: d.close()),
    ("cuda-python", "cudaStreamDestroy", lambda d, b, a: d.close()),
]


@pytest.mark.parametrize(("library", "call", "use"), FAILURES)
def test_every_refusal_of_cuda_is_one_line(libraries, library, call, use):
    fake = libraries(library)[library]
    device = open_device()
    with device.active():
        buffer, array = device.allocate(8), np.zeros(8, np.uint8)
        device.host_array((8,), np.uint8)
        fake.failing.add(call)
        with refuses(UserError, NAMES[library], "failed ("):
            use(device, buffer, array)
        fake.failing.clear()


# --- what each must take care of


@pytest.mark.parametrize("index", [0, 2])
def test_torch_works_on_a_stream_of_its_own(libraries, index):
    fake = libraries("torch")["torch"]
    device = open_device(index)
    with device.active():
        device.allocate(8)
        device.host_array((8,), np.uint8)
    # the memory is the default stream's, and ours waits for what that may still do there
    memory = ("empty", 8, f"cuda:{index}", False)
    on_default = [("stream in", 0), memory, ("stream out", 0), ("wait", 0), ("empty", 8, "cpu", True)]
    opening = [("device in", index), ("empty", 1, f"cuda:{index}", False), ("Stream", index), ("device out", index)]
    own = [("stream in", device.stream), *on_default, ("stream out", device.stream)]
    calls = [(name, getattr(what, "cuda_stream", what), *rest) for name, what, *rest in fake.calls]
    assert calls == [*opening, ("device in", index), *own, ("device out", index)]
    device.close()
    device.close()
    assert not fake.opened


def test_no_two_have_one_stream(libraries):
    """A capture on it would record the work of both."""
    libraries("torch")
    assert len({open_device().stream for _ in range(40)}) == 40


@pytest.mark.parametrize("call", ["cuStreamCreate", "cuStreamDestroy_v2"])
def test_a_stream_that_the_driver_refuses_is_one_line(libraries, call):
    fake = libraries("torch")["torch"]
    fake.driver.codes[call] = 2
    with refuses(DriverError, call, "CUDA_ERROR_OUT_OF_MEMORY"):
        TorchDevice().close()


def test_an_output_lives_as_long_as_its_owner(opened):
    device, fake = opened
    with device.active():
        output = device.allocate_output(16)
        assert output.nbytes == 16
    device.close()
    held = getattr(fake, "memory", {output.pointer: None})
    assert output.pointer in held
    (ctypes.c_char * 16).from_address(output.pointer)[:] = bytes(range(16))
    work = threading.Thread(target=output.__dict__.pop, args=("owner",))
    work.start()
    work.join()
    assert not getattr(fake, "memory", None)


@pytest.mark.parametrize("library", KINDS)
def test_another_gpu_than_the_first(libraries, library):
    fake = libraries(library)[library]
    device = open_device(3)
    assert device.index == 3
    with device.active():
        device.allocate(8)
    asked = {"torch": ("device in", 3), "pycuda": ("retain", 3), "cuda-python": ("cudaSetDevice", 3)}
    assert asked[library] in fake.calls


def test_torch_gives_its_memory_back(libraries):
    libraries("torch")
    device = open_device()
    with device.active():
        buffer = device.allocate(8)
    device.close()
    assert buffer.owner is None


def test_pycuda_leaves_no_context_behind(libraries):
    """pycuda aborts the process when a thread ends with a context on its stack."""
    fake = libraries("pycuda")["pycuda"]
    device = open_device()
    assert fake.depth.value == 0
    with pytest.raises(ZeroDivisionError), device.active():
        raise ZeroDivisionError
    assert fake.depth.value == 0
    device.close()
    assert fake.depth.value == 0
    assert ("retain", 0) in fake.calls
    assert ("Stream", 1) in fake.calls  # does not wait for the default stream
    assert not {"pycuda.autoinit", "pycuda.autoprimaryctx"} & set(sys.modules)


def test_the_trap_for_autoinit_works(libraries):
    libraries("pycuda")
    with pytest.raises(SystemExit, match="autoinit"):
        importlib.import_module("pycuda.autoinit")


def test_cuda_python_puts_the_programs_device_back(libraries):
    fake = libraries("cuda-python")["cuda-python"]
    device = open_device()
    with device.active():
        assert fake.device == 0
    assert fake.device == 1
    assert ("cudaStreamCreateWithFlags", 1) in fake.calls


SOURCE = Path(cuda_libraries.__file__).read_text()
CUDA_NAMES = sorted(set(re.findall(r"\bcuda[A-Z]\w+", SOURCE)))


def test_cuda_names_were_found():
    assert len(CUDA_NAMES) >= 11


@pytest.mark.parametrize("name", CUDA_NAMES)
def test_names_of_cuda_python_exist(name):
    real = pytest.importorskip("cuda.bindings.runtime")
    assert hasattr(real, name) or hasattr(real.cudaMemcpyKind, name)


@pytest.mark.parametrize("name", [name for name in CUDA_NAMES if hasattr(FakeCudaPython, name)])
def test_the_fake_takes_what_cuda_python_takes(name):
    real = pytest.importorskip("cuda.bindings.runtime")
    if not callable(getattr(real, name)) or isinstance(getattr(real, name), type):
        return
    signature = re.match(rf"{name}\((.*?)\)", getattr(real, name).__doc__)
    expected = len([part for part in signature[1].split(",") if part.strip()])
    assert getattr(FakeCudaPython, name).__code__.co_argcount - 1 == expected


@pytest.mark.gpu
@pytest.mark.parametrize("library", KINDS)
def test_bytes_go_there_and_back_on_the_gpu(library):
    pytest.importorskip({"cuda-python": "cuda.bindings.runtime"}.get(library, library))
    device, errors = KINDS[library](), []
    try:
        with device.active():
            buffers = [device.allocate(4000) for _ in range(2)]
            given, taken, ones = (device.host_array((1000,), np.float32) for _ in range(3))
            ones[:] = 1
            for turn, buffer in enumerate(buffers):
                given[:] = np.arange(1000) + turn
                device.upload(buffer, given)
                device.synchronize()
            for turn, buffer in enumerate(buffers):
                assert buffer.pointer % 256 == 0
                device.download(buffer, taken)
                device.synchronize()
                assert np.array_equal(taken, np.arange(1000, dtype=np.float32) + turn)

        def work():
            try:
                with device.active():
                    device.upload(buffers[0], ones)
                    device.download(buffers[0], taken)
                    device.synchronize()
                    assert (taken == 1).all()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not errors
        with device.active():
            big = device.allocate(1 << 28)
            content = device.host_array((1 << 28,), np.uint8)
            # no machine moves 1000 GB/s
            assert 0.27 < device.elapsed_ms(lambda: device.upload(big, content)) < 5000
            assert device.elapsed_ms(lambda: None) < 2
        with pytest.raises(UserError), device.active():
            device.allocate(1 << 50)
    finally:
        device.close()
