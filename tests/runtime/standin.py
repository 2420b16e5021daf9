"""A stand-in for TensorRT, its CUDA driver and its GPU: host memory plays device memory.

The module is built from the list of public names of one real version: a name that this version does not have raises
AttributeError. Work on a stream happens when the stream is synchronised, not before, so a missing wait gives wrong
numbers; misuse that TensorRT leaves undefined raises AssertionError.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import json
import threading
import weakref
import zlib
from pathlib import Path

import numpy as np

from pmm.runtime.buffers import Buffer, Device
from pmm.utils.errors import UserError

LISTS = {path.stem: path for path in sorted((Path(__file__).parent / "tensorrt_api").glob("*.json"))}
WORKING_MEMORY = 1000
INVALIDATED, OUT_OF_MEMORY = 901, 2


class World:
    """Memory, streams, graphs, and what is to go wrong."""

    def __init__(self):
        self.memory: dict[int, np.ndarray] = {}
        self.device_of: dict[int, int] = {}
        """Pointer -> index of its GPU, where that is not 0."""
        self.streams: dict[int, Stream] = {}
        self.default_stream = Stream()
        self.graphs: dict[int, list] = {}
        self.executables: dict[int, list] = {}
        self.calls: list[str] = []
        self.clock = 0.0
        """The GPU's, in ms: a run takes 1, a copied byte 0.001."""
        self.failing: set[str] = set()
        """Calls to fail once, by name."""
        self.undetermined: list[str] = []
        """What infer_shapes returns."""
        self.runtimes: list = []
        self.configs: list = []
        self.contexts = weakref.WeakSet()
        self.handles = iter(range(0x7F0000000001, 0x7FFFFFFFFFFF))  # wider than 32 bits, as real ones

    def fails(self, call: str) -> bool:
        self.calls.append(call)
        if call in self.failing:
            self.failing.remove(call)
            return True
        return False

    def stream(self, handle: int) -> Stream:
        return self.default_stream if handle == 1 else self.streams[handle]

    def new_memory(self, nbytes: int) -> np.ndarray:
        memory = np.full(nbytes, 0xA5, np.uint8)  # nothing may rely on zeros
        self.memory[memory.ctypes.data] = memory
        return memory

    def at(self, pointer: int, nbytes: int) -> int:
        start = max((start for start in list(self.memory) if start <= pointer), default=0)
        assert start, f"{pointer:#x} is no device memory (any more)"
        assert pointer + nbytes <= start + self.memory[start].nbytes, "reaches past the end of device memory"
        return pointer


class OnGpu:
    """Someone's array on the GPU of `world`, with one of the two protocols; its content comes with `stream`."""

    def __init__(self, world: World, content: np.ndarray, protocol: str, index: int = 0, version: int = 3):
        self.world, self.index, self.version, self.content = world, index, version, content
        memory = world.new_memory(content.nbytes)
        self.array = memory.view(content.dtype).reshape(content.shape)
        world.device_of[memory.ctypes.data] = index
        self.stream = next(world.handles)
        world.streams[self.stream] = Stream()
        world.streams[self.stream].add(lambda: np.copyto(self.array, content))
        if protocol == "dlpack":
            self.__dlpack_device__ = lambda: (2, index)
            self.__dlpack__ = self._dlpack
        else:
            self.__cuda_array_interface__ = self.array.__array_interface__ | {
                "version": version, **({"stream": self.stream} if version >= 3 else {})
            }  # fmt: skip

    def _dlpack(self, *, stream):
        """The consumer's stream waits for the producer's (the array API's `__dlpack__`)."""
        self.world.stream(stream).add(self.world.streams[self.stream].run)
        return self.array.__dlpack__()


class Stream:
    def __init__(self):
        self.waiting: list = []
        self.captured: list | None = None
        self.spoilt = False

    def add(self, work) -> None:
        (self.waiting if self.captured is None else self.captured).append(work)

    def run(self) -> None:
        assert self.captured is None, "a stream must not be synchronised while it is capturing"
        while self.waiting:
            self.waiting.pop(0)()


class HostDevice(Device):
    """The buffers' interface over a World."""

    library, name = "host", "host 1.0"

    def __init__(self, world: World, index: int = 0):
        self.world, self.index, self.stream, self.closed = world, index, next(world.handles), False
        world.streams[self.stream] = Stream()
        self.pointers, self.depth = [], threading.local()

    @contextlib.contextmanager
    def active(self):
        self.depth.value = getattr(self.depth, "value", 0) + 1
        try:
            yield
        finally:
            self.depth.value -= 1

    def _used(self) -> None:
        assert getattr(self.depth, "value", 0) > 0, "the GPU's context is not active in this thread"
        assert not self.closed

    def allocate(self, nbytes):
        self._used()
        if self.world.fails("allocate"):
            raise UserError("host 1.0: out of memory")
        memory = self.world.new_memory(nbytes)
        self.pointers.append(memory.ctypes.data)
        return Buffer(memory.ctypes.data, nbytes, memory)

    def allocate_output(self, nbytes):
        self._used()
        if self.world.fails("allocate_output"):
            raise UserError("host 1.0: out of memory")
        memory = self.world.new_memory(nbytes)
        weakref.finalize(memory, self.world.memory.pop, memory.ctypes.data)
        return Buffer(memory.ctypes.data, nbytes, memory)

    def host_array(self, shape, dtype):
        self._used()
        return np.frombuffer(bytearray(b"\xa5") * (int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(
            shape
        )

    def _copy(self, buffer, content, *, to_device):
        self._used()
        there, here, count = buffer.pointer, content.ctypes.data, content.nbytes

        def copy(keep=content):
            self.world.clock += count / 1000
            self.world.at(there, count)
            ctypes.memmove(*((there, here) if to_device else (here, there)), count)

        self.world.streams[self.stream].add(copy)

    def copy(self, target, source, nbytes):
        self._used()

        def copy():
            ctypes.memmove(self.world.at(target, nbytes), self.world.at(source, nbytes), nbytes)

        self.world.streams[self.stream].add(copy)

    def synchronize(self):
        self._used()
        self.world.streams[self.stream].run()

    def elapsed_ms(self, work):
        self._used()
        stream, times = self.world.streams[self.stream], []
        stream.add(lambda: times.append(self.world.clock))
        work()
        stream.add(lambda: times.append(self.world.clock))
        stream.run()
        return times[1] - times[0]

    def close(self):
        if not self.closed:
            self.closed = True
            for pointer in self.pointers:
                del self.world.memory[pointer]
            del self.world.streams[self.stream]


class Libcuda:
    """The driver's graph functions, called with ctypes values as the real ones; every handle must be given back."""

    def __init__(self, world: World):
        self.world = world
        self.codes: dict[str, int] = {}
        """Function -> error code to return from now on."""

    def _enter(self, name: str) -> int:
        self.world.calls.append(name)
        return self.codes.get(name, 0)

    def _stream(self, handle) -> Stream:
        assert isinstance(handle, ctypes.c_void_p), "a plain int would be cut to 32 bits"
        return self.world.streams[handle.value]

    def cuStreamCreate(self, stream, flags):  # noqa: N802
        assert flags.value == 1, "waits for work on the default stream"
        if code := self._enter("cuStreamCreate"):
            return code
        stream._obj.value = next(self.world.handles)
        self.world.streams[stream._obj.value] = Stream()
        return 0

    def cuStreamDestroy_v2(self, stream):  # noqa: N802
        del self.world.streams[stream.value]
        return self._enter("cuStreamDestroy_v2")

    def cuStreamSynchronize(self, stream):  # noqa: N802
        self.world.stream(stream.value).run()
        return self._enter("cuStreamSynchronize")

    def cuPointerGetAttribute(self, value, attribute, pointer):  # noqa: N802
        assert attribute == 9
        assert isinstance(pointer, ctypes.c_uint64)
        value._obj.value = self.world.device_of.get(pointer.value, 0)
        return self._enter("cuPointerGetAttribute")

    def cuMemcpyDtoDAsync_v2(self, target, source, nbytes, stream):  # noqa: N802
        assert isinstance(nbytes, ctypes.c_size_t)
        self._stream(stream).add(lambda: ctypes.memmove(target.value, source.value, nbytes.value))
        return self._enter("cuMemcpyDtoDAsync_v2")

    def cuMemcpyDtoD_v2(self, target, source, nbytes):  # noqa: N802
        assert isinstance(nbytes, ctypes.c_size_t)
        # no wait in it: "for transfers from device to device memory, no host-side synchronization is performed"
        self.world.default_stream.add(lambda: ctypes.memmove(target.value, source.value, nbytes.value))
        return self._enter("cuMemcpyDtoD_v2")

    def cuStreamBeginCapture_v2(self, stream, mode):  # noqa: N802
        assert mode == 1, "the capture must not forbid other threads to allocate"
        if code := self._enter("cuStreamBeginCapture_v2"):
            return code
        target = self._stream(stream)
        assert target.captured is None
        assert not target.waiting
        target.captured, target.spoilt = [], False
        return 0

    def cuStreamEndCapture(self, stream, graph):  # noqa: N802
        target = self._stream(stream)
        assert target.captured is not None
        captured, target.captured = target.captured, None
        if code := self._enter("cuStreamEndCapture") or (INVALIDATED if target.spoilt else 0):
            return code
        graph._obj.value = next(self.world.handles)
        self.world.graphs[graph._obj.value] = captured
        return 0

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):  # noqa: N802
        assert isinstance(flags, ctypes.c_ulonglong)
        assert flags.value == 0
        if code := self._enter("cuGraphInstantiateWithFlags"):
            return code
        executable._obj.value = next(self.world.handles)
        self.world.executables[executable._obj.value] = self.world.graphs[graph.value]
        return 0

    def cuGraphDestroy(self, graph):  # noqa: N802
        del self.world.graphs[graph.value]
        return self._enter("cuGraphDestroy")

    def cuGraphLaunch(self, executable, stream):  # noqa: N802
        if code := self._enter("cuGraphLaunch"):
            return code
        handle = executable.value

        def run(work):
            assert handle in self.world.executables, "the graph was freed before it ran"
            work()

        for work in self.world.executables[handle]:
            self._stream(stream).add(functools.partial(run, work))
        return 0

    def cuGraphExecDestroy(self, executable):  # noqa: N802
        del self.world.executables[executable.value]
        return self._enter("cuGraphExecDestroy")

    def cuGetErrorName(self, code, text):  # noqa: N802
        names = {INVALIDATED: b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY"}
        if code not in names:
            return 1
        text._obj.value = names[code]
        return 0


class Driver(Libcuda):
    """With the functions that make a GPU's primary context the thread's."""

    def __init__(self, world, gpus=2):
        super().__init__(world)
        self.stack, self.gpus = [], gpus

    def current(self):
        """The GPU that CUDA's runtime takes: that of the context on top, else the first."""
        return self.stack[-1] if self.stack else 0

    def cuInit(self, flags):  # noqa: N802
        return self._enter("cuInit")

    def cuDeviceGet(self, device, index):  # noqa: N802
        device._obj.value = index
        return 0 if index < self.gpus else 101

    def cuDevicePrimaryCtxRetain(self, context, device):  # noqa: N802
        context._obj.value = 0x7F00000000 + device.value
        return self._enter("cuDevicePrimaryCtxRetain")

    def cuCtxPushCurrent_v2(self, context):  # noqa: N802
        assert isinstance(context, ctypes.c_void_p), "a plain int would be cut to 32 bits"
        self.stack.append(context.value - 0x7F00000000)
        return self._enter("cuCtxPushCurrent_v2")

    def cuCtxPopCurrent_v2(self, context):  # noqa: N802
        context._obj.value = 0x7F00000000 + self.stack.pop()
        return self._enter("cuCtxPopCurrent_v2")


class Listed:
    """An object that has only the public attributes that its class has in one version of TensorRT."""

    _names: frozenset = frozenset()

    def __getattribute__(self, name):
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        if name not in type(self)._names:
            raise AttributeError(f"{type(self).__name__} has no attribute {name} in this version")
        try:
            return object.__getattribute__(self, name)
        except AttributeError:
            # not AttributeError: hasattr must not take what the stand-in lacks for what the version lacks
            raise NotImplementedError(f"{type(self).__name__}.{name}") from None

    def __setattr__(self, name, value):
        if not name.startswith("_") and name not in type(self)._names:
            raise AttributeError(f"{type(self).__name__} has no attribute {name} in this version")
        object.__setattr__(self, name, value)


class Dims:
    """As TensorRT's: a sequence, but no tuple, and not equal to one."""

    def __init__(self, values):
        self._values = tuple(values)

    def __len__(self):
        return len(self._values)

    def __getitem__(self, index):
        return self._values[index]


class _Runtime(Listed):
    def __init__(self, logger):
        assert isinstance(logger, self._module.ILogger)
        assert getattr(logger, "_constructed", True)
        if self._world.fails("Runtime"):
            refused_by_the_driver(self._module, logger)
        self.engine_host_code_allowed, others = False, self._world.runtimes
        self._logger = others[0]._logger if others else logger
        if self._logger is not logger:  # github.com/NVIDIA/TensorRT/issues/1475
            self._logger.log(self._module.ILogger.Severity.WARNING, "The logger passed into createInferRuntime differs")
        self._world.runtimes.append(self)

    def deserialize_cuda_engine(self, content):
        assert isinstance(content, bytes)
        try:
            return self._module._make("ICudaEngine", self, json.loads(content))
        except ValueError:
            self._logger.log(self._module.ILogger.Severity.ERROR, "magicTag does not match\nmore")
            self._logger.log(self._module.ILogger.Severity.WARNING, "a warning")
            return None

    def get_engine_validity(self, content):
        return self._module.EngineValidity.INVALID, 5


class _Engine(Listed):
    def __init__(self, runtime, plan):
        self._runtime, self._plan = runtime, plan
        self._tensors = [plan["input"], *plan["outputs"]]
        self.num_io_tensors = len(self._tensors)
        self.num_optimization_profiles = len(plan["batches"])
        for name in {"device_memory_size", "device_memory_size_v2"} & type(self)._names:
            setattr(self, name, WORKING_MEMORY)
        rng = np.random.default_rng(plan["seed"])
        self._matrix = rng.standard_normal((int(np.prod(plan["input"]["shape"])), plan["outputs"][0]["shape"][0]))

    def _embed(self, images):
        return embed(images, self._matrix)

    def _tensor(self, name):
        return next(tensor for tensor in self._tensors if tensor["name"] == name)

    def get_tensor_name(self, index):
        return self._tensors[index]["name"]

    def get_tensor_mode(self, name):
        mode = self._module.TensorIOMode
        return mode.INPUT if name == self._plan["input"]["name"] else mode.OUTPUT

    def get_tensor_dtype(self, name):
        return getattr(self._module, self._tensor(name)["dtype"])

    def get_tensor_shape(self, name):
        return Dims([self._plan.get("static", -1), *self._tensor(name)["shape"]])

    def get_tensor_profile_shape(self, name, index):
        assert name == self._plan["input"]["name"]
        assert 0 <= index < self.num_optimization_profiles
        return [Dims([size, *self._plan["input"]["shape"]]) for size in self._plan["batches"][index]]

    def create_execution_context(self, how=None):
        if self._world.fails("create_execution_context"):
            return None
        return self._module._make("IExecutionContext", self, how)

    def create_engine_inspector(self):
        return self._module._make("EngineInspector", self)

    def create_runtime_config(self):
        self._world.configs.append(self._module._make("IRuntimeConfig"))
        return self._world.configs[-1]


class _Inspector(Listed):
    """What NvInferRuntime.h says of IEngineInspector, in the JSON that NVIDIA's guide shows for TensorRT 10 and that
    Polygraphy reads from 11, which tells type and layout apart.

    `plan["inspector"]`: "whole" tells all; "kernels" tells types of weights and names of kernels alone, as some engines
    do; "names" is what an engine built without detailed verbosity tells; "nothing" tells no type at all.
    """

    execution_context = None

    def __init__(self, engine):
        self._engine = engine

    def get_engine_information(self, form):
        assert form == self._module.LayerInformationFormat.JSON
        context, kind = self.execution_context, self._engine._plan.get("inspector", "whole")
        assert context is None or context._engine is self._engine
        layers = self._engine._plan.get("layers", ["fp16"])
        if kind == "names":
            return json.dumps({"Layers": [f"conv{at} + relu" for at, _ in enumerate(layers)]})
        shaped = context is not None and context._batch and kind == "whole"
        told = [self._layer(at, precision, shaped, kind) for at, precision in enumerate(layers)]
        return json.dumps({"Layers": told, "Bindings": [tensor["name"] for tensor in self._engine._tensors]})

    def _layer(self, at, precision, shaped, kind):
        layout, whole, word, operand = INSPECTED[precision]
        if not shaped:
            layout = whole = word_of_tensor = "N/A due to dynamic shapes"
        else:
            word_of_tensor = word
        split = self._module.__version__.startswith("11.")
        form = {"Format": layout, "Datatype": word_of_tensor} if split else {"Format/Datatype": whole}
        tensors = [
            {"Name": f"t{at + end}", "Location": "Device", "Dimensions": [-1, 16, 8, 4], **form} for end in (0, 1)
        ]
        layer = {"Name": f"conv{at}", "LayerType": "CaskConvolution", "Inputs": tensors[:1], "Outputs": tensors[1:]}
        if kind == "nothing":
            return layer
        kernel = f"sm80_xmma_fprop_implicit_gemm_{operand}{operand}_{operand}f32_f32_nhwckrsc_nhwc_tilesize128x128x32"
        return {**layer, "Weights": {"Type": word, "Count": 9408}, "TacticName": kernel, "TacticValue": "0x0"}


INSPECTED = {
    "fp32": ("Row major linear", "Row major linear FP32", "Float", "f32"),
    "tf32": ("Row major linear", "Row major linear FP32", "Float", "tf32"),
    "fp16": ("Channel major where channel % 8 == 0", "Channel major FP16 format where channel % 8 == 0", "Half", "f16"),
    "bf16": ("Channel major where channel % 8 == 0", "Channel major BF16 format where channel % 8 == 0", "BFloat16",
             "bf16"),
    "int8": ("Thirty-two wide channel vectorized row major",
             "Thirty-two wide channel vectorized row major Int8 format", "Int8", "i8"),
}  # fmt: skip
"""Per precision: layout, layout and type together, type, and operand in a kernel's name."""


def refused_by_the_driver(module, logger):
    """What Builder and Runtime do where the driver is too old or absent: pybind11's factory gets no object, and the
    reason is the first of several logged errors (python/src/infer, pyCore.cpp)."""
    for line in ("CUDA initialization failure with error: 35. CUDA driver version is insufficient for CUDA runtime "
                 "version", "[runtime.cpp::~Runtime::401] Error Code 3: API Usage Error"):  # fmt: skip
        logger.log(module.ILogger.Severity.ERROR, line)
    raise TypeError("pybind11::init(): factory function returned nullptr")


class _Context(Listed):
    def __init__(self, engine, how):
        strategies = self._module.ExecutionContextAllocationStrategy
        own = how is None or how is strategies.STATIC or type(how).__name__ == "IRuntimeConfig"
        assert own or how is strategies.USER_MANAGED, how
        self._engine, self._plan, self._how = engine, engine._plan, how
        self._memory = None if not own else 0
        self._use, self._profile, self._batch = threading.Lock(), None, None
        self._addresses, self._changes, self._fresh = {}, 0, True
        self._world.contexts.add(self)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "device_memory":
            self._lend(value, WORKING_MEMORY)

    def _changed(self):
        with self._alone():
            self._changes += 1
            self._fresh = True

    @contextlib.contextmanager
    def _alone(self):
        """A context serves any thread, but one at a time (NvInferRuntime.h of IExecutionContext)."""
        assert self._use.acquire(blocking=False), "one context, two threads at a time"
        try:
            yield
        finally:
            self._use.release()

    def _lend(self, pointer, size):
        assert self._how is self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        assert size >= WORKING_MEMORY
        self._memory = self._world.at(pointer, size)
        self._changed()

    def set_device_memory(self, pointer, size):
        self._lend(pointer, size)

    def set_optimization_profile_async(self, index, stream):
        self._changed()
        assert stream in self._world.streams
        if self._world.fails("set_optimization_profile_async") or not 0 <= index < len(self._plan["batches"]):
            raise RuntimeError("Error in set optimization profile async.")  # the binding's, where C++ returns false
        self._profile = index
        return True

    def set_input_shape(self, name, shape):
        self._changed()
        assert self._profile is not None, "no profile selected"
        least, _, most = self._plan["batches"][self._profile]
        wrong = (
            name != self._plan["input"]["name"]
            or list(shape[1:]) != self._plan["input"]["shape"]
            or not least <= shape[0] <= most
        )
        if self._world.fails("set_input_shape") or wrong:
            self._engine._runtime._logger.log(self._module.ILogger.Severity.ERROR, f"{shape} is outside the profile")
            return False
        self._batch = shape[0]
        return True

    def infer_shapes(self):
        if self._world.fails("infer_shapes"):
            self._engine._runtime._logger.log(self._module.ILogger.Severity.ERROR, "reshaping failed")
            raise RuntimeError("infer_shapes error code: -1")  # the binding's
        return self._world.undetermined or ([] if self._batch else [self._plan["input"]["name"]])

    def get_tensor_shape(self, name):
        return Dims([self._batch or -1, *self._engine._tensor(name)["shape"]])

    def set_tensor_address(self, name, pointer):
        self._changed()
        self._engine._tensor(name)
        if self._world.fails("set_tensor_address"):
            return False
        self._addresses[name] = pointer
        return True

    def execute_async_v3(self, handle):
        with self._alone():
            return self._execute(handle)

    def _execute(self, handle):
        if self._world.fails("execute_async_v3"):
            return False
        assert self._memory is not None, "no working memory"
        given, returned = self._plan["input"], self._plan["outputs"][0]
        assert {given["name"], returned["name"]} <= set(self._addresses), "a tensor has no address"
        stream, batch, changes = self._world.streams[handle], self._batch, self._changes
        if stream.captured is not None and self._fresh:
            stream.spoilt = True  # the deferred work of a change of shape cannot be captured
        self._fresh = False
        cache = getattr(self._how, "_cache", None)
        if cache is not None and batch not in cache._kernels:
            self._world.calls.append("compile")
            cache._kernels.add(batch)
        source, target = self._addresses[given["name"]], self._addresses[returned["name"]]
        context = weakref.ref(self)

        def run():
            alive = context()
            assert alive is not None, "the context is gone"
            assert alive._changes == changes, "the context was changed after the capture"
            alive._world.clock += 1
            if alive._memory:
                alive._world.at(alive._memory, WORKING_MEMORY)
            dtype, shape = np.dtype(given["dtype"]), (batch, *given["shape"])
            nbytes = int(np.prod(shape)) * dtype.itemsize
            content = ctypes.string_at(alive._world.at(source, nbytes), nbytes)
            result = alive._engine._embed(np.frombuffer(content, dtype).reshape(shape)).tobytes()
            ctypes.memmove(alive._world.at(target, len(result)), result, len(result))

        stream.add(run)
        return True


class _RuntimeConfig(Listed):
    cuda_graph_strategy = dynamic_shapes_kernel_specialization_strategy = _cache = None

    def create_runtime_cache(self):
        return self._module._make("IRuntimeCache")

    def set_runtime_cache(self, cache):
        self._cache = cache
        return True


class _RuntimeCache(Listed):
    """What was compiled, of this version: others are rejected, and the cache stays as it was (docstring of the
    wheel's IRuntimeCache.deserialize)."""

    def __init__(self):
        self._kernels = set()

    def deserialize(self, blob):
        try:
            values = json.loads(bytes(blob))
        except ValueError:
            return False
        if values["version"] != self._module.__version__:
            return False
        self._kernels |= set(values["kernels"])
        return True

    def serialize(self):
        return json.dumps({"version": self._module.__version__, "kernels": sorted(self._kernels)}).encode()


def embed(images: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """What a stand-in engine computes: images [B, ...] -> float32 [B, D], each row by itself."""
    rows = [image.reshape(-1).astype(np.float64) @ matrix for image in images]
    return np.stack(rows).astype(np.float32)


class Module:
    """Plays `import tensorrt`, in the version that `name` lists (a key of LISTS)."""

    _OBJECTS = {  # noqa: RUF012
        "Runtime": _Runtime,
        "ICudaEngine": _Engine,
        "EngineInspector": _Inspector,
        "IExecutionContext": _Context,
        "IRuntimeConfig": _RuntimeConfig,
        "IRuntimeCache": _RuntimeCache,
    }

    def __init__(self, name: str, world: World):
        listed = json.loads(LISTS[name].read_text())
        self._api, self.__version__ = listed["api"], listed["version"]
        self._classes = {
            key: type(key, (cls,), {"_names": frozenset(self._api[key]), "_world": world, "_module": self})
            for key, cls in self._OBJECTS.items()
            if key in self._api
        }
        # numbers of enum members move between versions
        first = zlib.crc32(listed["version"].encode()) % 7
        self._enums = {
            key: enum.Enum(key, {member: first + at for at, member in enumerate(members[1:])})
            for key, members in self._api.items()
            if members[:1] == ["ENUM"]
        }
        severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])
        constructed = {"_constructed": False, "__init__": lambda self: setattr(self, "_constructed", True)}
        self._enums["ILogger"] = type("ILogger", (), {"Severity": severity, **constructed})

    def _make(self, name, *args):
        return self._classes[name](*args)

    def __getattr__(self, name):
        if name not in self._api:
            raise AttributeError(f"module {self.__version__} has no attribute {name}")
        types = {"float32": "FLOAT", "float16": "HALF", "uint8": "UINT8"}
        found = self._classes.get(name) or self._enums.get(name)
        if name in types:
            found = self._enums["DataType"][types[name]]
        if found is None:
            raise NotImplementedError(name)
        return found
