"""How Triton Inference Server runs a model: the text of its config.pbtxt.

Fields and rules are those of Triton's model configuration (protobuf ModelConfig), its batcher guide and the sources of
its backends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pmm.artifacts.client_contract import client_contract
from pmm.artifacts.manifest import FOR_CLIENTS, Manifest
from pmm.runtime.cuda_graph import bucket
from pmm.utils.errors import InvalidFile, InvalidValue

TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}
ONNX_BEST = 8
MAX_GRAPH_BATCH = 64
"""Batch size up to which the server captures a CUDA graph for every batch; launches cost larger ones little."""
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Bare:
    """A word of the configuration language, written without quotes."""

    word: str


Value = str | int | Bare | Mapping[str, "Value"] | Sequence["Value"]
"""A field in protobuf's text format, which is written here: no protobuf is needed to export."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How the server runs each model. Raises InvalidValue for a number that Triton cannot take."""

    max_batch: int | None = None
    """Most images per call (default: an engine's limit, 64 for an ONNX file)."""
    queue_delay_us: int = 500
    """Longest wait for others to share a batch with, in microseconds."""
    instances: int = 1
    """Copies of the model: per GPU, or in all on a server without one."""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--max-batch", 1 if self.max_batch is None else self.max_batch, 1),
            ("--queue-delay-us", self.queue_delay_us, 0),
            ("--instances", self.instances, 1),
        ):
            if not least <= value <= INT32_MAX:
                raise InvalidValue(flag, value, f"a whole number from {least} to {INT32_MAX}")


def model_config(name: str, backend: str, manifest: Manifest, most: int, serving: Serving) -> str:
    """The text of config.pbtxt; the same arguments give the same text.

    Raises InvalidFile if the manifest's types have no counterpart in Triton.
    """
    engine, input_, embedding = manifest.engine, manifest.input, manifest.embedding
    best = min(engine.batch.best if engine else ONNX_BEST, most)
    profiles = engine.batch.profiles if engine else ()
    # ONNX Runtime has no bf16 convolution on the CPU: with KIND_GPU the server names what is missing
    anywhere = engine is None and manifest.precision_found != "bf16"
    config: dict[str, Value] = {
        "name": name,
        "backend": backend,
        "max_batch_size": most,
        "input": {
            "name": input_.name,
            "data_type": Bare(data_type(input_.dtype, name)),
            "format": Bare(f"FORMAT_{input_.layout}"),
            "dims": list(input_.shape(manifest.preprocessing)),
        },
        "output": {
            "name": embedding.name,
            "data_type": Bare(data_type(embedding.dtype, name)),
            "dims": [embedding.dim],
        },
        "instance_group": {
            "count": serving.instances,
            "kind": Bare("KIND_AUTO" if anywhere else "KIND_GPU"),
            # if none is named the server takes the first alone
            **({"profile": [str(at) for at in range(len(profiles))]} if len(profiles) > 1 else {}),
        },
        "dynamic_batching": {
            # the batcher never goes beyond the largest preferred size: without `most`, `best` would be the limit
            "preferred_batch_size": sorted({best, most}),
            "max_queue_delay_microseconds": serving.queue_delay_us,
        },
    }
    if backend == "onnxruntime":
        # on by default in ONNX Runtime; the parity figures were measured without. Not read on a server without a GPU
        cuda: Value = {"name": "cuda", "parameters": {"key": "use_tf32", "value": "0"}}
        config["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": cuda}}
    else:
        config["optimization"] = {"cuda": {"graphs": Bare("true"), "graph_spec": _graphs(best, most)}}
    warm = {1, best, most, *(profile.best for profile in profiles if profile.best <= most)}
    config["model_warmup"] = [_warm_up(batch, manifest, name) for batch in sorted(warm)]
    parameters = contract_parameters(manifest)
    if backend == "onnxruntime":
        # of cuDNN's convolutions, 1 is HEURISTIC: see pmm.runtime.ort_session.SEARCH. Where there are parameters at
        # all, the backend takes it from here alone, and would take EXHAUSTIVE
        parameters["cudnn_conv_algo_search"] = "1"
    config["parameters"] = parameter_list(parameters)
    return text_format(config)


def parameter_list(parameters: Mapping[str, str]) -> list[Value]:
    """The field `parameters`: a table of strings."""
    return [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()]


def _graphs(best: int, most: int) -> list[Value]:
    """The batch sizes that the server captures as CUDA graphs: those of our runner, each for all batches down to
    the size before it (surplus rows hold earlier images, and no row changes another's embedding)."""
    sizes = sorted({bucket(count, most) for count in range(1, min(most, MAX_GRAPH_BATCH) + 1)} | {best, most})
    return [
        {"batch_size": size, "graph_lower_bound": {"batch_size": size if size > MAX_GRAPH_BATCH else before + 1}}
        for before, size in pairwise([0, *sizes])
    ]


def _warm_up(batch: int, manifest: Manifest, name: str) -> Value:
    """Black images that each instance runs before the server calls it ready."""
    input_ = manifest.input
    black: Value = {
        "data_type": Bare(data_type(input_.dtype, name)),
        "dims": list(input_.shape(manifest.preprocessing)),
        "zero_data": Bare("true"),
    }
    return {"name": f"batch {batch}", "batch_size": batch, "inputs": {"key": input_.name, "value": black}}


def contract_parameters(manifest: Manifest) -> dict[str, str]:
    """Facts for clients that the configuration has no field for; they read them from the server."""
    size, embedding, engine = manifest.preprocessing, manifest.embedding, manifest.engine
    contract = {
        "sha256": manifest.sha256,
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "method": manifest.method,
        "precision": manifest.precision_found,
        "colour": manifest.input.colour,
        "interpolation": size.interpolation,
        "antialias": json.dumps(size.antialias),
        "padding": json.dumps(size.padding),
        "normalised_by": manifest.input.normalised_by,
        "mean": json.dumps(size.mean),
        "std": json.dumps(size.std),
        "metric": embedding.metric,
        "embedding_normalised": json.dumps(embedding.normalised),
        FOR_CLIENTS: json.dumps(client_contract(manifest), sort_keys=True),
    }
    if engine is not None:
        contract |= {
            "tensorrt_version": engine.version,
            "platform": engine.platform,
            "gpu": engine.gpu,
            "compute_capability": engine.compute_capability,
            "hardware_compatibility": engine.hardware_compatibility,
        }
    # prefixed: the backends read their parameters from the same table
    return {f"pmm_{key}": value for key, value in contract.items()}


def data_type(dtype: str, name: str) -> str:
    """Triton's name for `dtype`. Raises InvalidFile if the model `name` has one that Triton has no name for."""
    if dtype not in TYPES:
        raise InvalidFile(f"model '{name}': its manifest has type '{dtype}'", expected=" or ".join(TYPES))
    return TYPES[dtype]


def text_format(message: Mapping[str, Value], indent: str = "") -> str:
    """Protobuf text format, one field per line; a list is a repeated field."""
    lines = []
    for key, value in message.items():
        for each in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if isinstance(each, Mapping):
                lines.append(f"{indent}{key} {{\n{text_format(each, indent + '  ')}{indent}}}\n")
            elif isinstance(each, Bare):
                lines.append(f"{indent}{key}: {each.word}\n")
            else:
                lines.append(f"{indent}{key}: {_quoted(each) if isinstance(each, str) else each}\n")
    return "".join(lines)


def _quoted(text: str) -> str:
    """A string literal in printable ASCII: every other byte of the UTF-8 text as three octal digits."""
    # "replace": JSON can hold half a surrogate pair, protobuf strings cannot
    content = text.encode("utf-8", "replace")
    return '"' + "".join(chr(x) if 32 <= x < 127 and x not in b'"\\' else f"\\{x:03o}" for x in content) + '"'
