"""What a file is (checkpoint, ONNX file, engine, index, package), what this machine has: what goes into a bug report.

pmm info [FILE] [--json]
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from pmm.artifacts.artifact import read_manifest
from pmm.artifacts.kinds import ENGINE_SUFFIXES, PACKAGE_SUFFIX
from pmm.artifacts.manifest import Manifest
from pmm.config import SYNTHETIC
from pmm.utils import command_line
from pmm.utils.build_info import describe_build
from pmm.utils.environment import describe_environment
from pmm.utils.errors import UserError
from pmm.utils.files import existing_file, sha256

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class InfoCommand:
    """`pmm info [FILE] [--json]`"""

    file: tyro.conf.Positional[Path | None] = None
    """Checkpoint (.pth), ONNX file (.onnx), engine (.plan, .engine), index (.npz) or AOTInductor package (.pt2);
    without one, this machine."""
    json: bool = False
    """Print JSON."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(InfoCommand, prog=prog, description=__doc__ or "")
    facts = {"file": describe_file(command.file)} if command.file else {}
    facts["environment"] = describe_environment()
    if not command.json:
        facts["environment"]["kernels"] = describe_build(facts["environment"]["kernels"])
    facts = _plain(facts)
    print(json.dumps(facts, indent=2) if command.json else "\n".join(aligned(facts)))


def describe_file(path: Path) -> dict[str, Any]:
    """What the file at `path` is, as plain values; its name alone, as folders name people.

    Raises UserError if it is missing, damaged, or of no kind known here.
    """
    describe = KINDS.get(path.suffix.lower())
    if describe is None:
        advice = f"; pmm import {path} -o FILE.pth" if path.suffix.lower() == ".tar" else ""
        raise UserError(f"{path}: cannot tell what '{path.suffix}' files are; known: {', '.join(KINDS)}{advice}")
    size = existing_file(path, f"one of {', '.join(KINDS)}").stat().st_size
    if size == 0:
        raise UserError(f"{path}: an empty file; expected one of {', '.join(KINDS)}")
    return {"name": path.name, "size_mb": round(size / 1e6, 3), **describe(path)}


def aligned(facts: dict[str, Any]) -> Iterator[str]:
    """A line per value, nested tables as a.b, a blank line between the parts."""
    for title, part in facts.items():
        lines = dict(_flat(part))
        wide = max(map(len, lines))
        yield f"{title}:"
        yield from (f"  {key:<{wide}}  {value}" for key, value in lines.items())
        if title != list(facts)[-1]:
            yield ""


def _checkpoint(path: Path) -> dict[str, Any]:
    from pmm.artifacts.checkpoint import load, restore_model

    state = load(path)
    model, config = restore_model(state, path)
    weights, data, best = config.model.weights, config.data, state["best"]
    drawn = {"drawn_ids": data.synthetic_ids, "drawn_seed": data.synthetic_seed} if data.dataset == SYNTHETIC else {}
    return {
        "kind": "checkpoint",
        "format": state["format"],
        "sha256": sha256(path),
        "method": config.model.method,
        "backbone": config.model.backbone,
        "backbone_weights": weights if weights in ("auto", "imagenet", "none") else Path(weights).name,
        "crop": {"height": data.height, "width": data.width},
        "embedding_dim": model.embedding_dim,
        "metric": config.model.metric,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
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


def _onnx(path: Path) -> dict[str, Any]:
    from pmm.artifacts.onnx_file import read_onnx

    file = read_onnx(path, external_data=True)
    graph = file.proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    return {
        "kind": "ONNX file",
        "ours": "yes" if file.found else "no: no manifest beside it or inside",
        "sha256": file.sha256,
        "inputs": [_tensor(value) for value in graph.input if value.name not in constants],
        "outputs": [_tensor(value) for value in graph.output],
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in file.proto.opset_import},
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        **({"manifest": _manifest(file.found)} if file.found else {"producer": file.proto.producer_name}),
    }


def _tensor(value: onnx.ValueInfoProto) -> str:
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
    """From its manifest alone: it is executable code, and is not loaded to be looked at."""
    digest = sha256(path)
    manifest = read_manifest(path, digest)
    facts = {"kind": kind, "ours": "yes" if manifest else f"no: no manifest beside it ({path.name}.json)"}
    return {**facts, "sha256": digest, **({"manifest": _manifest(manifest)} if manifest else {})}


def _manifest(manifest: Manifest) -> dict[str, Any]:
    """Without what only other kinds of artifact have; its own hash was said above."""
    facts = {key: value for key, value in dataclasses.asdict(manifest).items() if value is not None}
    facts.pop("sha256")
    return {**facts, "parity": manifest.parity or "not verified"}


def _index(path: Path) -> dict[str, Any]:
    from pmm.gallery.index import Index

    index = Index.load(path)
    return {
        "kind": "index",
        "sha256": sha256(path),
        "images": len(index),
        "dimensions": index.embeddings.shape[1],
        **dataclasses.asdict(index.contract),
    }


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".pth": _checkpoint,
    ".onnx": _onnx,
    **dict.fromkeys(ENGINE_SUFFIXES, partial(_executable, "engine")),
    ".npz": _index,
    PACKAGE_SUFFIX: partial(_executable, "AOTInductor package"),
}


def _plain(value: Any) -> Any:
    """Plain JSON values; texts without the home folder in them, and without what would upset a terminal."""
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    home = str(Path.home())
    text = str(value).replace(home, "~") if len(home) > 1 else str(value)
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        yield from _flat({str(at): item for at, item in enumerate(value, 1)}, prefix)
    elif isinstance(value, list | dict):
        yield prefix, ", ".join(map(str, value)) or "none"
    else:
        yield prefix, {"None": "unknown", "": "none", "True": "yes", "False": "no"}.get(str(value), str(value))
