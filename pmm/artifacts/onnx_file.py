"""ONNX files from outside: read once, hashed, checked for escapes, and with their manifest. Loads no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from pmm.artifacts.artifact import read_manifest
from pmm.artifacts.manifest import METADATA_KEY, Manifest
from pmm.artifacts.onnx_content import check_content
from pmm.utils.errors import InvalidFile, UserError, reason_of
from pmm.utils.files import existing_file

if TYPE_CHECKING:
    import onnx


EXPORT = "export the checkpoint with pmm export onnx"
ADOPT = "export the checkpoint with pmm export onnx, or adopt the file with pmm adopt"
MAX_BYTES = 2**31 - 1
"""Of a message of protocol buffers, which an ONNX file is."""


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file as it was hashed, so that what is run or parsed cannot change after the check."""

    path: Path
    content: bytes
    proto: onnx.ModelProto
    sha256: str
    stored_manifest: Manifest | None
    """The manifest beside the file, else the copy inside it; None if the file is not one of pmm export onnx."""
    external: bool
    """Weights lie in other files beside it."""

    @property
    def manifest(self) -> Manifest:
        """Raises InvalidFile without one."""
        if self.stored_manifest is None:
            raise InvalidFile(
                "an ONNX file without a manifest, beside it or inside, that says what to feed it",
                path=self.path,
                hint=ADOPT,
            )
        return self.stored_manifest


def read_onnx(path: str | Path, *, external_data: bool = False, foreign: bool = False) -> OnnxFile:
    """Read an ONNX file without touching what it refers to.

    Args:
        external_data: allow weights in other files, as long as those lie beside the file.
        foreign: take a file of ours that other tools changed for a file of theirs, without its manifest.

    Raises:
        InvalidFile: no ONNX, external data that is not allowed, or a manifest that is damaged or of another file, or
            that lies inside and says something else than the graph.
    """
    path = existing_file(path, "an ONNX file written by pmm export onnx")
    content = path.read_bytes()
    proto = _parsed(content, path)
    external = _check_external_data(path, proto, external_data)
    digest = hashlib.sha256(content).hexdigest()
    manifest, beside = _manifest(path, proto, digest)
    if manifest and not beside:
        try:
            check_content(proto, manifest, path)
        except InvalidFile:
            if not foreign:
                raise
            manifest = None
            others = [entry for entry in proto.metadata_props if entry.key != METADATA_KEY]
            del proto.metadata_props[:]
            proto.metadata_props.extend(others)
    return OnnxFile(path, content, proto, digest, manifest, external)


def with_weights_inside(file: OnnxFile) -> onnx.ModelProto:
    """The graph of `file`, which was read with `external_data`, with the weights from the files beside it.

    Raises InvalidFile if those are missing or too short, or if all is more than one file can hold.
    """
    if not file.external:
        return file.proto
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(file.proto)
    folder, size = file.path.parent, len(file.content)
    for tensor in _all_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location = next(entry.value for entry in tensor.external_data if entry.key == "location")
            place = existing_file(folder / location, f"the weights of {file.path}")
            size += _external_bytes(tensor, place)
            if size > MAX_BYTES:
                problem = f"it and its weights are more than {MAX_BYTES / 2**30:.0f} GiB"
                raise InvalidFile(problem, path=file.path, expected="a graph that one file can hold")
            try:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            except Exception as error:  # of several types, as the versions of onnx differ
                reason = f"its weights in {location!r} cannot be read ({reason_of(error)})"
                raise InvalidFile(reason, path=file.path) from error
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return proto


def _external_bytes(tensor: onnx.TensorProto, place: Path) -> int:
    """How much of the file `place`, which several tensors may share, onnx reads for one."""
    given = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset, length = int(given.get("offset", 0)), int(given.get("length", -1))
    except ValueError:  # onnx refuses it
        return 0
    rest = max(0, place.stat().st_size - offset)
    return min(length, rest) if length > 0 else rest


def is_onnx(path: Path) -> bool:
    """Whether the file can be read as ONNX, with or without a manifest."""
    try:
        _parsed(path.read_bytes(), path)
        return True
    except UserError:
        return False


def _parsed(content: bytes, path: Path) -> onnx.ModelProto:
    import onnx

    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own exception type depends on its version
        raise InvalidFile("truncated, or not an ONNX file", path=path, hint=EXPORT) from error
    if not proto.graph.node:
        raise InvalidFile("truncated, or not an ONNX file (it has no operators)", path=path, hint=EXPORT)
    return proto


def is_adopted_onnx(path: Path) -> bool:
    """Whether the ONNX file at `path` is one of pmm adopt. Raises InvalidFile as `read_onnx`."""
    manifest = read_onnx(path, external_data=True, foreign=True).stored_manifest
    return manifest is not None and manifest.is_adopted_itself


def embed_manifest(proto: onnx.ModelProto, manifest: Manifest) -> None:
    """Put `manifest` into the file's metadata, so that a copied file keeps its contract."""
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, manifest.to_json()


def _manifest(path: Path, proto: onnx.ModelProto, digest: str) -> tuple[Manifest | None, bool]:
    """The manifest beside the file, which must say what the hashed copy inside says; else that copy. And whether it
    lies beside."""
    beside, inside = read_manifest(path, digest), _embedded(path, proto)
    if beside and inside:
        beside.check_copy(inside, path)
    return beside or inside, beside is not None


def _embedded(path: Path, proto: onnx.ModelProto) -> Manifest | None:
    inside = {entry.key: entry.value for entry in proto.metadata_props}
    return Manifest.from_json(inside[METADATA_KEY], path) if METADATA_KEY in inside else None


def _check_external_data(path: Path, proto: onnx.ModelProto, allowed: bool) -> bool:
    """Before ONNX Runtime or TensorRT sees the file: each would open what it names. True if it names anything."""
    import onnx

    external = False
    for tensor in _all_tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
        location = locations[0] if locations else ""
        # of several, each library takes the one it likes
        reason = _escapes(path.parent, location) or ("named more than once" if len(locations) > 1 else "")
        if reason:
            problem = f"refused, its weights lie in {location!r}, {reason}"
            raise InvalidFile(problem, path=path, expected="a file beside it")
        if not allowed:
            problem = f"its weights lie in another file ({location!r})"
            raise InvalidFile(problem, path=path, expected="the weights inside, as pmm export onnx writes them")
        external = True
    return external


def _escapes(folder: Path, location: str) -> str:
    """Why `location` is not a plain file below `folder`; empty if it is one."""
    if not location or PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor:
        return "an absolute path"
    parts = PureWindowsPath(location).parts
    if ".." in parts:
        return "a path with '..'"
    if "\\" in location:  # a folder's end or a part of a name, depending on the system
        return "a path with a backslash"
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            return "a symbolic link"
    return ""


def _all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _tensors(proto.graph)
    for function in proto.functions:
        yield from _attributes(function.node)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph: initialisers, attributes, and those of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _attributes(graph.node)


def _attributes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
