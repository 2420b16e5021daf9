"""Two more models for Triton, with which a server takes image files as they are.

NAME-preprocess, in Python (`pmm.export.triton_preprocess`), makes crops of them, and NAME-jpeg, an ensemble, chains it
to NAME. Fields and rules are those of Triton's model configuration, of its Python backend and of the sources of its
ensemble scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pmm.data.resize_opencv as opencv
from pmm.artifacts.manifest import Manifest
from pmm.export.triton_config import Bare, Serving, Value, contract_parameters, data_type, parameter_list, text_format

PREPROCESS, ENSEMBLE = "-preprocess", "-jpeg"
"""Ends of the two names."""
FILES, CROPS, EMBEDDINGS = "files", "crops", "embeddings"
"""Tensors of the ensemble, whatever the network calls its own: the content of an image file for each crop, what the
network takes, and what comes out."""
MODEL, OPENCV = "model.py", "resize_opencv.py"
OF_THE_EMBEDDINGS = ("sha256", "checkpoint_sha256", "method", "precision", "metric", "embedding_normalised")
"""Facts that say what comes out; what goes in is no concern of a client of the ensemble."""


def ensemble_folders(
    name: str, manifest: Manifest, most: int, serving: Serving, *, version: str
) -> dict[str, dict[str, bytes]]:
    """The folders beside model `name`, the ensemble last: name -> place of each file in it -> content.

    Args:
        manifest: of model `name`.
        most: its largest batch.
        version: folder of the model's version, in which the ensemble has no file.
    """
    code = {f"{version}/{MODEL}": Path(__file__).with_name("triton_preprocess.py").read_bytes()}
    if not manifest.preprocessing.antialias:
        code[f"{version}/{OPENCV}"] = Path(opencv.__file__).read_bytes()
    preprocess = _preprocess_config(f"{name}{PREPROCESS}", manifest, most, serving)
    ensemble = _ensemble_config(name, manifest, most)
    return {
        f"{name}{PREPROCESS}": {**code, "config.pbtxt": preprocess.encode()},
        f"{name}{ENSEMBLE}": {"config.pbtxt": ensemble.encode()},
    }


def _preprocess_config(name: str, manifest: Manifest, most: int, serving: Serving) -> str:
    input_ = manifest.input
    return text_format(
        {
            "name": name,
            "backend": "python",
            "max_batch_size": most,
            "input": _files(),
            "output": {
                "name": input_.name,
                "data_type": Bare(data_type(input_.dtype, name)),
                "dims": list(input_.shape(manifest.preprocessing)),
            },
            "instance_group": {"count": serving.instances, "kind": Bare("KIND_CPU")},
            # what waits while an instance works goes together; none waits for others here, as it does at the network
            "dynamic_batching": {"max_queue_delay_microseconds": 0},
            "parameters": parameter_list({"pmm_preprocessing": json.dumps(_preprocessing(manifest), sort_keys=True)}),
        }
    )


def _ensemble_config(name: str, manifest: Manifest, most: int) -> str:
    embedding, facts = manifest.embedding, contract_parameters(manifest)
    return text_format(
        {
            "name": f"{name}{ENSEMBLE}",
            "platform": "ensemble",
            "max_batch_size": most,
            "input": _files(),
            "output": {
                "name": EMBEDDINGS,
                "data_type": Bare(data_type(embedding.dtype, name)),
                "dims": [embedding.dim],
            },
            "ensemble_scheduling": {
                "step": [
                    _step(f"{name}{PREPROCESS}", {FILES: FILES}, {manifest.input.name: CROPS}),
                    _step(name, {manifest.input.name: CROPS}, {embedding.name: EMBEDDINGS}),
                ]
            },
            "parameters": parameter_list({f"pmm_{key}": facts[f"pmm_{key}"] for key in OF_THE_EMBEDDINGS}),
        }
    )


def _step(model: str, takes: Mapping[str, str], gives: Mapping[str, str]) -> Value:
    """Name of a tensor of the model -> of the ensemble."""
    return {
        "model_name": model,
        "model_version": -1,
        "input_map": [{"key": key, "value": value} for key, value in takes.items()],
        "output_map": [{"key": key, "value": value} for key, value in gives.items()],
    }


def _files() -> Value:
    return {"name": FILES, "data_type": Bare("TYPE_STRING"), "dims": [1]}


def _preprocessing(manifest: Manifest) -> dict[str, Any]:
    """What the Python model has to know of the contract."""
    size, contract = manifest.preprocessing, manifest.input
    scale = offset = None
    if contract.dtype != "uint8" and contract.normalised_by == "caller":
        scale, offset = (each.tolist() for each in size.scale_and_offset())
    return {
        "height": size.height,
        "width": size.width,
        "interpolation": size.interpolation,
        "antialias": size.antialias,
        "padding": size.padding,
        "scale": scale,
        "offset": offset,
        "colour": contract.colour,
        "layout": contract.layout,
        "type": contract.dtype,
    }
