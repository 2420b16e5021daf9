"""Capture and replay against a stand-in of the CUDA driver, and on a GPU where there is one."""

import ctypes

import numpy as np
import pytest

from pmm.runtime import driver as cuda_driver
from pmm.runtime.cuda_graph import GRAPHS_KEPT, bucket, capture
from pmm.runtime.cuda_libraries import CudaPythonDevice, PycudaDevice, TorchDevice
from pmm.runtime.driver import DriverError
from pmm.utils import hardware
from tests.refusals import refuses
from tests.runtime.standin import INVALIDATED, OUT_OF_MEMORY, HostDevice, Libcuda, World

STEPS = ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"]


@pytest.fixture
def world():
    return World()


@pytest.fixture
def device(world):
    return HostDevice(world)


@pytest.fixture
def driver(world):
    return Libcuda(world)


def test_buckets_are_few_and_near():
    padded = {count: bucket(count, 4096) for count in range(1, 4097)}
    assert all(count <= size <= 1.6 * count for count, size in padded.items())
    assert {bucket(size, 4096) for size in padded.values()} == set(padded.values())
    assert len({padded[count] for count in range(1, 65)}) <= GRAPHS_KEPT
    assert [bucket(count, 64) for count in (1, 2, 3, 16, 17, 63, 64)] == [1, 2, 4, 16, 24, 64, 64]
    assert bucket(9, 10) == 10


def test_captured_work_is_run_by_launching_only(world, device, driver):
    stream, done = world.streams[device.stream], []
    graph = capture(device.stream, lambda: stream.add(lambda: done.append("work")), driver)
    stream.run()
    assert done == []
    for _ in range(3):
        graph.launch()
        stream.run()
    assert done == ["work"] * 3
    assert world.calls == [*STEPS, "cuGraphDestroy"] + ["cuGraphLaunch"] * 3
    graph.close()
    graph.close()
    assert not world.graphs
    assert not world.executables
    with refuses(DriverError, "closed"):
        graph.launch()


@pytest.mark.parametrize("call", STEPS)
def test_a_failing_step_is_named_and_leaves_the_stream_usable(world, device, driver, call):
    driver.codes[call] = INVALIDATED
    with refuses(DriverError, call, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        capture(device.stream, lambda: None, driver)
    assert world.streams[device.stream].captured is None
    assert not world.graphs
    assert not world.executables
    driver.codes.clear()
    capture(device.stream, lambda: None, driver).launch()


@pytest.mark.parametrize("error", [ValueError("wrong shape"), KeyboardInterrupt()])
def test_failing_work_ends_the_capture(world, device, driver, error):
    def work():
        raise error

    with pytest.raises(DriverError if isinstance(error, Exception) else KeyboardInterrupt) as caught:
        capture(device.stream, work, driver)
    assert world.streams[device.stream].captured is None
    assert not world.graphs
    if isinstance(error, Exception):
        assert "wrong shape" in str(caught.value)


@pytest.mark.parametrize(("code", "text"), [(OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"), (12345, "CUDA error 12345")])
def test_a_failing_launch_is_named(device, driver, code, text):
    graph = capture(device.stream, lambda: None, driver)
    driver.codes["cuGraphLaunch"] = code
    with refuses(DriverError, "cuGraphLaunch", text):
        graph.launch()


def test_a_failing_free_is_named(device, driver):
    graph = capture(device.stream, lambda: None, driver)
    driver.codes["cuGraphExecDestroy"] = OUT_OF_MEMORY
    with refuses(DriverError, "cuGraphExecDestroy", "CUDA_ERROR_OUT_OF_MEMORY"):
        graph.close()


def test_an_old_driver(device):
    with refuses(DriverError, "too old", hint="update the driver"):
        capture(device.stream, lambda: None, object())


def test_no_driver(device, monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(cuda_driver, "cuda_library", hardware.cuda_library.__wrapped__)  # without what it has kept
    with refuses(DriverError, "no NVIDIA driver"):
        capture(device.stream, lambda: None)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [TorchDevice, PycudaDevice, CudaPythonDevice])
def test_a_copy_is_replayed_on_the_gpu(kind):
    pytest.importorskip({"cuda-python": "cuda.bindings.runtime"}.get(kind.library, kind.library))
    device = kind()
    with device.active():
        source, target = (device.host_array((1000,), np.float32) for _ in range(2))
        buffer = device.allocate(source.nbytes)

        def work():
            device.upload(buffer, source)
            device.download(buffer, target)

        source[:] = 1
        work()
        device.synchronize()
        graph = capture(device.stream, work)
        for value in (2, 3):
            source[:] = value
            assert target[0] == value - 1
            graph.launch()
            device.synchronize()
            assert (target == value).all()
        # a capture that must fail leaves the stream usable
        with pytest.raises(DriverError):
            capture(device.stream, device.synchronize)
        work()
        device.synchronize()
        graph.close()
    device.close()
