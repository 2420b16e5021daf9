"""A machine with GPUs, for the bench: TensorRT whole (tests/export/whole.py) and the stand-in of the runtime."""

import sys

import pytest

from pmm.bench import artifacts, candidates
from pmm.runtime import driver, trt_variant
from pmm.runtime import trt as runtime
from pmm.utils import hardware
from pmm.utils.hardware import Gpu
from tests.runtime.standin import HostDevice, World

GPUS = (Gpu("NVIDIA Standin 6000", "8.9"), Gpu("NVIDIA Standin 4000", "8.6"))


class _Noted:
    """A context that notes the batches that it runs, each with the best batch of the profile it is in."""

    def _execute(self, handle):
        self._ran.add((self._batch, self._plan["batches"][self._profile][1]))
        return super()._execute(handle)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with two GPUs and one version of TensorRT, or TensorRT-RTX; torch sees no GPU, and runs on the CPU."""

    def of(version, **kind):
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
        from tests.export.whole import Whole

        world = World()
        world.ran = set()
        module, flavor = Whole(version, world, **kind), "rtx" if "rtx" in version else "tensorrt"
        classes = module._runtime._classes
        context = type("IExecutionContext", (_Noted, classes["IExecutionContext"]), {"_ran": world.ran})
        monkeypatch.setitem(classes, "IExecutionContext", context)
        monkeypatch.setitem(sys.modules, trt_variant.FLAVORS[flavor], module)
        for each in (hardware, trt_variant, candidates, artifacts):
            monkeypatch.setattr(each, "nvidia_gpus", lambda: GPUS)
        monkeypatch.setattr(candidates, "find_spec", lambda name: object())
        monkeypatch.setattr(runtime, "open_device", lambda index=0: HostDevice(world, index))
        monkeypatch.setattr(driver, "cuda_library", lambda: module.driver)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return world, "tensorrt-rtx" if flavor == "rtx" else flavor

    return of
