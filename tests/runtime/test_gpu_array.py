"""Arrays on a GPU as others hand them over: numpy's own DLPack, told to lie on a GPU, and the CUDA array interface."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pmm.runtime import driver
from pmm.runtime.gpu_array import GpuArray, gpu_array, is_on_gpu
from pmm.utils.errors import InvalidInput
from tests.conftest import examples
from tests.refusals import refuses
from tests.runtime.standin import HostDevice, Libcuda, OnGpu, World

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)
TYPES = st.sampled_from(["u1", "i8", "f2", "f4", "f8"])
PROTOCOLS = ["dlpack", "interface"]


@pytest.fixture
def world(monkeypatch):
    world = World()
    cuda = Libcuda(world)
    monkeypatch.setattr(driver, "cuda_library", lambda: cuda)
    return world


def read(found: GpuArray) -> np.ndarray:
    """A copy of what lies there."""
    interface = {**found.__cuda_array_interface__, "version": 3}
    return np.array(type("Host", (), {"__array_interface__": interface})())


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("index", [0, 1])
def test_the_content_is_there_before_it_is_used(world, protocol, index):
    content = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    theirs, device = OnGpu(world, content, protocol, index), HostDevice(world)
    assert is_on_gpu(theirs)
    found = gpu_array(theirs, device.stream)
    assert (found.shape, found.dtype, found.device, found.nbytes) == ((2, 4, 3), np.uint8, index, 24)
    with device.active():
        device.synchronize()
    assert np.array_equal(read(found), content)
    assert np.array_equal(read(found.rows(1, 9)), content[1:])
    assert found.rows(3, 9).shape == (0, 4, 3)
    assert gpu_array(found, device.stream) is found


def test_an_old_interface_waits_for_the_default_stream(world):
    gpu_array(OnGpu(world, np.zeros(3, np.uint8), "interface", version=2), 0)
    assert "cuStreamSynchronize" in world.calls


class Handed:
    """`array`, as if it lay on a GPU."""

    def __init__(self, array, protocol):
        self.array = array
        if protocol == "dlpack":
            self.__dlpack_device__ = lambda: (2, 0)
            self.__dlpack__ = lambda stream: array.__dlpack__()
        else:
            self.__cuda_array_interface__ = {**array.__array_interface__, "stream": None}


@examples(60)
@given(array=hnp.arrays(TYPES, SHAPES), axis=st.integers(0, 3), step=st.sampled_from([1, 2, -1]))
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_it_is_read_as_numpy_reads_it_or_refused_for_its_gaps(array, axis, step, protocol):
    world = World()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "cuda_library", lambda: Libcuda(world))
        view = array[(slice(None),) * min(axis, array.ndim - 1) + (slice(None, None, step),)]
        if view.flags.c_contiguous:
            found = gpu_array(Handed(view, protocol), 1)
            assert (found.shape, found.dtype) == (view.shape, view.dtype)
            assert np.array_equal(read(found), view, equal_nan=True)
        elif view.size:
            with refuses(InvalidInput, "not contiguous", str(list(view.shape)), hint=".contiguous()"):
                gpu_array(Handed(view, protocol), 1)


def test_what_is_no_array_on_a_gpu():
    for other in (np.zeros(3), torch.zeros(3), [1, 2], None, "cuda"):
        assert not is_on_gpu(other)


def test_a_type_that_numpy_does_not_have():
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    handed = type("Handed", (), {"__dlpack__": lambda self, stream: tensor.__dlpack__()})()
    with refuses(InvalidInput, "16 bits", expected="uint8"):
        gpu_array(handed, 1)


def test_what_is_handed_over_lives_as_long_as_it_is_held():
    class Gone(np.ndarray):
        pass

    array = np.ones(1000, np.uint8).view(Gone)
    freed = []
    import weakref

    weakref.finalize(array, freed.append, True)
    found = gpu_array(Handed(array, "dlpack"), 1)
    pointer = array.ctypes.data
    del array
    gc.collect()
    assert not freed
    assert found.pointer == pointer
    del found
    gc.collect()
    assert freed


@pytest.mark.gpu
def test_torch_shares_its_memory_on_the_gpu():
    images = torch.arange(12, dtype=torch.uint8, device="cuda").reshape(3, 4)
    found = gpu_array(images, torch.cuda.Stream().cuda_stream)
    assert found.pointer == images.data_ptr()
    assert torch.equal(torch.as_tensor(found.rows(1, 3), device="cuda"), images[1:])
