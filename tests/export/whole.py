"""TensorRT whole: NVIDIA's own parser and builder, as TensorRT-RTX has them on a CPU, seen through the names of one
version (narrow.py), and the stand-in of the runtime (tests/runtime/standin.py) on what was built.

The engine's layers are those of the parsed network; its numbers are ONNX Runtime's on the file that was parsed.
"""

import base64
import json
from importlib.machinery import ModuleSpec

import numpy as np
import onnx
import tensorrt_rtx

from pmm.artifacts.onnx_file import read_onnx
from pmm.export.half_precision import emulated
from pmm.export.options import EngineOptions, ExportOptions
from pmm.export.trt import engine_from_onnx
from pmm.runtime.ort_session import open_session
from pmm.utils.hardware import Gpu
from tests.export.narrow import Narrow
from tests.runtime.standin import LISTS, Driver, Module, World, refused_by_the_driver

_RUN_TIME = ("Runtime", "ExecutionContextAllocationStrategy", "CudaGraphStrategy", "EngineValidity")
DEATHS = {
    # github.com/NVIDIA/TensorRT/issues/4258, trtexec of TensorRT 10.3; the last line says nothing of memory
    "GPU memory, 10.3": (
        ("ERROR", "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"),
        ("WARNING", "Requested amount of GPU memory (15485030400 bytes) could not be allocated. There may not be "
                    "enough free memory for allocation to succeed."),
        ("ERROR", "Error Code: 9: Skipping tactic 0x0000000000000000 due to exception [tunable_graph.cpp:create:117] "
                  "autotuning: User allocator error allocating 15485030400-byte buffer"),
        ("ERROR", "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation "
                  "for node {ForeignNode[a...b]}.)"),
    ),
    # as logs of 10.9 and later have it
    "GPU memory, 10.9": (
        ("ERROR", "[virtualMemoryBuffer.cpp::nvinfer1::StdVirtualMemoryBufferImpl::resizePhysical::154] Error Code 2: "
                  "OutOfMemory (Requested size was 2833252352 bytes.)"),
        ("WARNING", "UNSUPPORTED_STATE: Skipping tactic 28 due to insufficient memory on requested size of 2833252352 "
                    "detected for tactic 0x0000000204040736."),
        ("ERROR", "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation "
                  "for node conv1 + relu.)"),
    ),
    "another reason, with little memory": (
        ("WARNING", "Tactic Device request: 414MB Available: 216MB. Device memory is insufficient to use tactic."),
        ("WARNING", "UNSUPPORTED_STATE: Skipping tactic 0 due to insufficient memory on requested size of 434110464 "
                    "detected for tactic 0x0000000000000000."),
        ("ERROR", "Error Code 4: Internal Error (a reason)"),
    ),
    "workspace": (
        ("ERROR", "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation "
                  "for node conv1 due to insufficient workspace. See verbose log for requested sizes.)"),
    ),
    "another reason": (("ERROR", "Error Code 4: Internal Error (a reason)\nand more of it"),),
}  # fmt: skip
"""What a builder says before it gives no engine: severity and text."""
GPU = Gpu("NVIDIA Standin 6000", "8.9")
NEWEST = "tensorrt-11.4.0.106"
_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8"}


def built(shared, path, precision="fp16", parity_check=None, **options):
    """The artifact of an engine of one of the shared ONNX files."""
    options = EngineOptions(**{"batch": ((1, 4, 8),), **options})
    return engine_from_onnx(
        read_onnx(shared.onnx(ExportOptions(precision=precision))), path, options, parity_check=parity_check
    )


class Whole(Narrow):
    """Plays `import tensorrt`, of the version `name` (a key of LISTS), for builder and runner."""

    def __init__(self, name: str, world: World, inspector: str = "whole", lies: str = "", dies: str = ""):
        """`inspector`: how much the engine inspector tells (see standin.py). `lies`: the precision that the builder
        really takes, whatever the network says. `dies`: of what, a key of DEATHS."""
        listed = json.loads(LISTS[name].read_text())
        runtime = Module(name, world)
        for kind in runtime._classes.values():
            kind._module = self
        runtime._classes["ICudaEngine"] = type("ICudaEngine", (_RunsTheFile, runtime._classes["ICudaEngine"]), {})
        runtime._classes["IExecutionContext"] = type(
            "IExecutionContext", (_Profiled, runtime._classes["IExecutionContext"]), {}
        )
        super().__init__(tensorrt_rtx, listed["api"], "")
        self.__dict__.update(
            _runtime=runtime, _world=world, _make=runtime._make, __version__=listed["version"],
            _inspector=inspector, _lies=lies, _dies=dies, _parsed=[], driver=Driver(world),
            __spec__=ModuleSpec("tensorrt", None),  # torch, where it is imported later, looks whether it could be
        )  # fmt: skip

    # A module is equal to itself alone. Were it equal to another test's, as its parts are, the process's one logger
    # would go with whichever of the two is collected first, in the middle of a build.
    __eq__, __hash__ = object.__eq__, object.__hash__

    def __getattr__(self, name):
        if name in _RUN_TIME:
            return getattr(self._runtime, name)
        real = super().__getattr__(name)
        return {"Builder": self._builder, "OnnxParser": self._parser}.get(name, real)

    def _builder(self, logger):
        for runtime in self._world.runtimes:
            assert runtime._logger is logger, "the library goes on with the logger of an object that is there"
        if self._world.fails("Builder"):
            refused_by_the_driver(self, logger)
        return _Builds(self, super().__getattr__("Builder")(logger), logger)

    def _parser(self, network, logger):
        return _Parses(self, super().__getattr__("OnnxParser")(network, logger))


class _Passes:
    """`real`, but for what a subclass has."""

    def __init__(self, whole, real):
        self.whole, self.real = whole, real

    def __getattr__(self, name):
        return getattr(self.real, name)


class _Parses(_Passes):
    def parse(self, content):
        self.whole._parsed.append(content)
        return self.real.parse(content)


class _Builds(_Passes):
    def __init__(self, whole, real, logger):
        super().__init__(whole, real)
        self.logger, self.profiles = logger, []
        self.gpu = whole.driver.current()  # TensorRT builds for the GPU that is current where the builder is made

    def create_optimization_profile(self):
        self.profiles.append(self.real.create_optimization_profile())
        return self.profiles[-1]

    def build_serialized_network(self, network, config):
        real, whole = tensorrt_rtx, self.whole
        if whole._dies:
            for severity, text in DEATHS[whole._dies]:
                self.logger.log(getattr(real.ILogger.Severity, severity), text)
            return None
        built = self.real.build_serialized_network(network, config)
        assert built is not None
        given, returned = network.get_input(0), network.get_output(0)
        kinds = {getattr(real, name): precision for name, precision in _TYPES.items()}
        layers = [network.get_layer(at) for at in range(network.num_layers)]
        products = [layer for layer in layers if layer.type == real.LayerType.CONVOLUTION]
        quantised = any(layer.type == real.LayerType.QUANTIZE for layer in layers)
        tf32 = config.get_flag(whole.BuilderFlag.TF32)
        told = ["int8" if quantised else kinds[layer.get_output(0).dtype] for layer in products]
        plan = {
            "seed": 0,
            "batches": [[shape[0] for shape in profile.get_shape(given.name)] for profile in self.profiles],
            "static": given.shape[0],
            "gpu": self.gpu,
            "input": _tensor(given),
            "outputs": [_tensor(returned)],
            "layers": [whole._lies or ("tf32" if tf32 and kind == "fp32" else kind) for kind in told],
            "inspector": whole._inspector,
            "onnx": base64.b64encode(whole._parsed[-1]).decode(),
        }
        return json.dumps(plan).encode()


def _tensor(tensor):
    dtype = {tensorrt_rtx.uint8: "uint8", tensorrt_rtx.float32: "float32"}[tensor.dtype]
    return {"name": tensor.name, "dtype": dtype, "shape": list(tensor.shape)[1:]}


class _Profiled:
    """A context that calls a profiler as NvInferRuntime.h says: once per layer and run, by enqueue itself, which then
    waits for the run, or if told so by report_to_profiler, on the stream of the enqueue before."""

    profiler, enqueue_emits_profile, _timed = None, True, None

    def execute_async_v3(self, handle):
        stream = self._world.streams[handle]
        done = super().execute_async_v3(handle)
        if done and self.profiler is not None and stream.captured is None:
            self._timed = handle
            if self.enqueue_emits_profile:
                stream.run()
                self._report()
        return done

    def report_to_profiler(self):
        if self.enqueue_emits_profile:
            return True
        if self.profiler is None or self._timed is None or self._world.fails("report_to_profiler"):
            return False
        assert not self._world.streams[self._timed].waiting, "the run is not done"
        self._report()
        return True

    def _report(self):
        assert isinstance(self.profiler, tensorrt_rtx.IProfiler)
        self._runs = getattr(self, "_runs", 0) + 1
        slow = 100.0 if self._runs <= 2 else 1.0 + self._runs % 2 / 100  # the first runs, as ever
        for at, _ in enumerate(self._plan["layers"]):
            self.profiler.report_layer_time(f"conv{at}", slow * (1 + at) / 100)


class _RunsTheFile:
    """An engine whose numbers are the parsed file's."""

    _session = None

    def _embed(self, images):
        if self._session is None:
            proto = onnx.load_from_string(base64.b64decode(self._plan["onnx"]))
            half = any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in proto.graph.initializer)
            content = (emulated(proto) if half else proto).SerializeToString()  # ONNX Runtime runs no bf16 on CPUs
            object.__setattr__(self, "_session", open_session(content))
        return self._session.run(None, {self._plan["input"]["name"]: np.ascontiguousarray(images)})[0]
