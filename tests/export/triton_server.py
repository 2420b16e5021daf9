"""A small stand-in for Triton Inference Server, as strict as its sources: it checks an ensemble, gathers requests, runs
Python models and ONNX files.

Of the server's repositories: core, src/ensemble_scheduler/ensemble_utils.cc, and python_backend, src/pb_stub.cc,
pb_tensor.cc, pb_error.h and src/resources/triton_python_backend_utils.py.
"""

import importlib.util
import json
import struct
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from google.protobuf.json_format import MessageToJson
from tritonclient.grpc import model_config_pb2

TYPES = {"TYPE_UINT8": np.dtype(np.uint8), "TYPE_FP32": np.dtype(np.float32), "TYPE_STRING": np.dtype(object)}


class Tensor:
    def __init__(self, name, array):
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise TypeError("incompatible constructor arguments: Tensor(str, numpy.ndarray)")
        if not name:
            raise RuntimeError("Tensor name cannot be an empty string.")
        if array.dtype not in TYPES.values():
            raise TypeError(f"no type of Triton's for {array.dtype}")
        self._name, self._array = name, np.ascontiguousarray(array)

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array

    def shape(self):
        return list(self._array.shape)


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message, code=INTERNAL):
        if not isinstance(message, str) or code not in range(8):
            raise TypeError("incompatible constructor arguments: TritonError(str, code)")
        message.encode()
        self._message, self._code = message, code

    def message(self):
        return self._message

    def code(self):
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        if not isinstance(error, TritonError | None) or not all(isinstance(each, Tensor) for each in output_tensors):
            raise TypeError("incompatible constructor arguments: InferenceResponse(list[Tensor], TritonError)")
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self):
        return self._tensors

    def error(self):
        return self._error


class InferenceRequest:
    def __init__(self, tensors):
        self._tensors = tensors

    def inputs(self):
        return self._tensors


def get_input_tensor_by_name(request, name):
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


UTILS = types.ModuleType("triton_python_backend_utils")
for each in (Tensor, TritonError, InferenceResponse, InferenceRequest, get_input_tensor_by_name):
    setattr(UTILS, each.__name__, each)


def through_the_wire(array):
    """A batch of strings as it comes out of the request's bytes: each with its length in 4 bytes before it."""
    encoded = b"".join(struct.pack("<I", len(each)) + each for each in array.reshape(-1).tolist())
    decoded = []
    while encoded:
        (length,) = struct.unpack_from("<I", encoded)
        decoded.append(encoded[4 : 4 + length])
        encoded = encoded[4 + length :]
    out = np.empty(len(decoded), object)
    out[:] = decoded
    return out.reshape(array.shape)


@dataclass
class Server:
    """All models in the folder `repository`, loaded."""

    repository: Path
    python: dict = field(default_factory=dict)

    def __post_init__(self):
        self.configs = {}
        for folder in self.repository.iterdir():
            config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
            assert config.name == folder.name
            assert (folder / "1").is_dir()
            self.configs[config.name] = config
        for config in self.configs.values():
            if config.platform == "ensemble":
                self.check_ensemble(config)
            elif config.backend == "python":
                self.python[config.name] = self.load(config)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for model in self.python.values():
            model.finalize()

    def load(self, config):
        version = self.repository / config.name / "1"
        spec = importlib.util.spec_from_file_location("model", version / "model.py")
        module = importlib.util.module_from_spec(spec)
        before = list(sys.path), set(sys.modules)
        sys.path += [str(version), str(version.parent)]
        sys.modules["triton_python_backend_utils"] = UTILS
        try:
            spec.loader.exec_module(module)
            model = module.TritonPythonModel()
            kind = {"model_config": MessageToJson(config, preserving_proto_field_name=True), "model_name": config.name}
            model.initialize({**kind, "model_version": "1", "model_repository": str(version.parent)})
        finally:
            sys.path[:] = before[0]
            for name in set(sys.modules) - before[1]:
                if not name.startswith("PIL"):
                    del sys.modules[name]
        return model

    def check_ensemble(self, ensemble):
        """As ValidateEnsembleConfig."""
        tensors = {each.name: (each.data_type, list(each.dims)) for each in (*ensemble.input, *ensemble.output)}
        assert len(tensors) == 2
        known = {each.name for each in ensemble.input}
        for step in ensemble.ensemble_scheduling.step:
            model = self.configs[step.model_name]
            assert model.max_batch_size >= ensemble.max_batch_size
            for mapping, sides in ((step.input_map, model.input), (step.output_map, model.output)):
                assert {each.name for each in sides} == set(mapping)
                for each in sides:
                    of_model = each.data_type, list(each.dims)
                    assert tensors.setdefault(mapping[each.name], of_model) == of_model
            assert set(step.input_map.values()) <= known
            known |= set(step.output_map.values())
        assert {each.name for each in ensemble.output} <= known

    def infer(self, name, batches):
        """For each of the requests, which come together: tensors by name, or the error."""
        config = self.configs[name]
        for batch in batches:
            for each in config.input:
                array = batch[each.name]
                assert array.dtype == TYPES[model_config_pb2.DataType.Name(each.data_type)]
                assert list(array.shape[1:]) == list(each.dims)
                assert 1 <= len(array) <= config.max_batch_size
        if config.platform == "ensemble":
            return self.infer_ensemble(config, batches)
        run = self.run_python if config.backend == "python" else self.run_onnx
        answers = run(config, batches)
        for batch, answer in zip(batches, answers, strict=True):
            if not isinstance(answer, TritonError):
                for each in config.output:
                    array = answer[each.name]
                    assert array.dtype == TYPES[model_config_pb2.DataType.Name(each.data_type)]
                    assert list(array.shape) == [len(next(iter(batch.values()))), *each.dims]
        return answers

    def infer_ensemble(self, config, batches):
        held = [dict(batch) for batch in batches]
        failed = {}
        for step in config.ensemble_scheduling.step:
            alive = [row for row in range(len(batches)) if row not in failed]
            asked = [{to: held[row][of] for to, of in step.input_map.items()} for row in alive]
            for row, answer in zip(alive, self.infer(step.model_name, asked), strict=True):
                if isinstance(answer, TritonError):
                    failed[row] = answer
                else:
                    held[row] |= {of: answer[to] for to, of in step.output_map.items()}
        return [
            failed.get(row) or {each.name: held[row][each.name] for each in config.output}
            for row in range(len(batches))
        ]

    def run_python(self, config, batches):
        requests = [
            InferenceRequest([Tensor(k, through_the_wire(v) if v.dtype == object else v) for k, v in batch.items()])
            for batch in batches
        ]
        responses = self.python[config.name].execute(requests)
        assert isinstance(responses, list)
        assert len(responses) == len(requests)
        assert all(isinstance(response, InferenceResponse) for response in responses)
        return [
            response.error() or {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            for response in responses
        ]

    def run_onnx(self, config, batches):
        import onnxruntime

        path = self.repository / config.name / "1" / "model.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [each.name for each in config.output]
        return [dict(zip(names, session.run(names, batch), strict=True)) for batch in batches]


def files(*contents):
    """A request's tensor of image files: [N, 1]."""
    array = np.empty((len(contents), 1), object)
    array[:, 0] = contents
    return array


def parameters(config):
    return json.loads(config.parameters["pmm_preprocessing"].string_value)
