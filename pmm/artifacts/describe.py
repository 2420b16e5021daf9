"""What pmm info prints about a file. Checkpoints and ONNX files are read; of native code only the manifest is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmm.artifacts.adopted_file import is_adopted_network, restore_adopted
from pmm.artifacts.artifact import read_manifest
from pmm.artifacts.checkpoint import EXPECTED, checked, restore_model
from pmm.artifacts.client_contract import client_contract
from pmm.artifacts.kinds import KIND_NAMES, KNOWN_KINDS, Kind
from pmm.artifacts.manifest import FOR_CLIENTS, Manifest
from pmm.config import SYNTHETIC
from pmm.utils.errors import InvalidFile
from pmm.utils.files import sha256

if TYPE_CHECKING:
    import onnx


ADOPTED_NETWORK = "adopted network"


def describe_artifact(path: Path, kind: Kind) -> dict[str, Any]:
    """What the file at `path` is, as plain values. Raises InvalidFile if it is damaged, or of a kind not read here."""
    if kind not in DESCRIBE:
        raise InvalidFile(f"it is {KIND_NAMES[kind]}, which no command reads", path=path, expected=KNOWN_KINDS)
    return DESCRIBE[kind](path)


def _checkpoint(path: Path) -> dict[str, Any]:
    from pmm.artifacts.torch_file import read_torch_file

    content = read_torch_file(path, EXPECTED)
    if is_adopted_network(content):
        return _adopted(content, path)
    state = checked(content, path)
    model, config = restore_model(state, path)
    weights, data, best = config.model.weights, config.data, state["best"]
    drawn = {"drawn_ids": data.synthetic_ids, "drawn_seed": data.synthetic_seed} if data.dataset == SYNTHETIC else {}
    return {
        "kind": "checkpoint",
        "format": state["format"],
        "sha256": sha256(path),
        "method": config.model.method,
        "backbone": config.model.backbone,
        "backbone_weights": Path(config.model.init).name or weights,
        **({"weights": f"averages over the steps (--ema {config.recipe.ema:g})"} if config.recipe.ema else {}),
        "crop": {"height": data.height, "width": data.width},
        "embedding_dim": model.embedding_dim,
        "metric": config.model.metric,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **_training_crops(state["crop_statistics"]),
        "trained_on": {"dataset": data.dataset, "identities": config.model.num_classes, **drawn},
        "epoch": state["epoch"],
        "epochs": None if "imported" in state["versions"] else config.recipe.epochs,
        # a run that holds no identities out has nothing to choose its best epoch by
        "best_held_out_mAP": best if isinstance(best, float) and best >= 0 else None,
        "resumable": isinstance(state["optimizer"], dict),
        "preset": config.preset,
        "seed": config.seed,
        "made_with": state["versions"],
    }


def _adopted(content: dict[str, Any], path: Path) -> dict[str, Any]:
    adopted = restore_adopted(content, path)
    model = adopted.model
    return {
        "kind": ADOPTED_NETWORK,
        "format": content["format"],
        "sha256": sha256(path),
        "method": "adopted",
        "source": adopted.source,
        "crop": {"height": adopted.preprocessing.height, "width": adopted.preprocessing.width},
        "preprocessing": adopted.preprocessing.describe(),
        "embedding_dim": model.embedding_dim,
        "metric": "cosine" if model.normalised else "euclidean",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": model.macs(),
        "operators": model.operators(),
        **_training_crops(content.get("crop_statistics")),
        "dataset": adopted.dataset or None,
        "made_with": content["versions"],
    }


def _training_crops(statistics: dict[str, Any] | None) -> dict[str, Any]:
    return {"training_crops": statistics} if statistics else {}


def _onnx(path: Path) -> dict[str, Any]:
    from pmm.artifacts.onnx_file import read_onnx

    file = read_onnx(path, external_data=True)
    graph, manifest = file.proto.graph, file.stored_manifest
    constants = {tensor.name for tensor in graph.initializer}
    return {
        "kind": "ONNX file",
        "written_by_pmm": manifest is not None,
        "sha256": file.sha256,
        "inputs": [describe_tensor(value) for value in graph.input if value.name not in constants],
        "outputs": [describe_tensor(value) for value in graph.output],
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in file.proto.opset_import},
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        **({"manifest": _manifest(manifest)} if manifest else {"producer": file.proto.producer_name}),
    }


def describe_tensor(value: onnx.ValueInfoProto) -> str:
    """`float32 images [batch, 3, 128, 64]`."""
    import onnx

    kind, sizes = value.type.tensor_type, value.type.tensor_type.shape.dim
    try:
        name = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    except KeyError:  # a sequence, a map, or a type that numpy does not have
        name = f"type {kind.elem_type}"
    shape = [size.dim_param or (str(size.dim_value) if size.HasField("dim_value") else "?") for size in sizes]
    return f"{name} {value.name} [{', '.join(shape)}]"


def _executable(kind: str, path: Path) -> dict[str, Any]:
    """The facts in its manifest: the file is executable code, and is not loaded."""
    digest = sha256(path)
    manifest = read_manifest(path, digest)
    facts = {"kind": kind, "written_by_pmm": manifest is not None, "sha256": digest}
    return {**facts, **({"manifest": _manifest(manifest)} if manifest else {})}


def _manifest(manifest: Manifest) -> dict[str, Any]:
    """The fields of `manifest` that are set, without the hash, which is among the facts of the file."""
    facts = {key: value for key, value in dataclasses.asdict(manifest).items() if value is not None}
    facts.pop("sha256")
    facts[FOR_CLIENTS] = client_contract(manifest)
    return {**facts, "preprocessing": manifest.preprocessing.facts(), "parity": manifest.parity}


def in_words(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` of `describe_artifact`, with the file's `name`, for the text output: what is missing is spelled out, and
    the table for clients is reduced to its steps."""
    words = dict(facts)
    if facts.get("written_by_pmm") is False:
        words["written_by_pmm"] = f"no: it has no manifest ({facts['name']}.json)"
    if facts.get("kind") == ADOPTED_NETWORK and not facts["dataset"]:
        words["dataset"] = "none: later commands need --dataset and --root"
    if manifest := facts.get("manifest"):
        steps = {str(number): step for number, step in enumerate(manifest[FOR_CLIENTS]["steps"], 1)}
        words["manifest"] = {**manifest, FOR_CLIENTS: steps, "parity": manifest["parity"] or "not verified"}
    return words


DESCRIBE: dict[Kind, Callable[[Path], dict[str, Any]]] = {
    "checkpoint": _checkpoint,
    "torch": _checkpoint,  # of other code: reading it says what to do with it
    "onnx": _onnx,
    "engine": partial(_executable, "engine"),
    "package": partial(_executable, "AOTInductor package"),
}
