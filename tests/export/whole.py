"""TensorRT whole: NVIDIA's own parser and builder, as TensorRT-RTX has them on a CPU, seen through the names of one
version (narrow.py), and the stand-in of the runtime (tests/runtime/standin.py) on what was built.

The engine's layers are those of the parsed network; its numbers are ONNX Runtime's on the file that was parsed.
"""

import base64
import json

import numpy as np
import onnx
import tensorrt_rtx

from pmm.export.emulate import emulated
from pmm.runtime.ort import open_session
from tests.export.narrow import Narrow
from tests.runtime.standin import LISTS, Module, World, refused_by_the_driver

_RUN_TIME = ("Runtime", "ExecutionContextAllocationStrategy", "CudaGraphStrategy", "EngineValidity")
_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8"}


class Whole(Narrow):
    """Plays `import tensorrt`, of the version `name` (a key of LISTS), for builder and runner."""

    def __init__(self, name: str, world: World, inspector: str = "whole", lies: str = ""):
        """`inspector`: how much the engine inspector tells (see standin.py). `lies`: the precision that the builder
        really takes, whatever the network says."""
        listed = json.loads(LISTS[name].read_text())
        runtime = Module(name, world)
        for kind in runtime._classes.values():
            kind._module = self
        runtime._classes["ICudaEngine"] = type("ICudaEngine", (_RunsTheFile, runtime._classes["ICudaEngine"]), {})
        super().__init__(tensorrt_rtx, listed["api"], "")
        self.__dict__.update(
            _runtime=runtime, _world=world, _make=runtime._make, __version__=listed["version"],
            _inspector=inspector, _lies=lies, _parsed=[],
        )  # fmt: skip

    def __getattr__(self, name):
        if name in _RUN_TIME:
            return getattr(self._runtime, name)
        real = super().__getattr__(name)
        return {"Builder": self._builder, "OnnxParser": self._parser}.get(name, real)

    def _builder(self, logger):
        if self._world.fails("Builder"):
            refused_by_the_driver(self, logger)
        return _Builds(self, super().__getattr__("Builder")(logger))

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
    def create_optimization_profile(self):
        self.profile = self.real.create_optimization_profile()
        return self.profile

    def build_serialized_network(self, network, config):
        real, whole = tensorrt_rtx, self.whole
        if whole._world.fails("build_serialized_network"):
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
            "batches": [[shape[0] for shape in self.profile.get_shape(given.name)]],
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
