"""Engines (.plan) and AOTInductor packages (.pt2): native code, opened only with its manifest. Loads no torch."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pmm.artifacts.artifact import read_manifest
from pmm.artifacts.manifest import METADATA_KEY, Manifest
from pmm.artifacts.native_contracts import EngineContract, PackageContract
from pmm.utils.errors import InvalidFile
from pmm.utils.files import existing_file

C = TypeVar("C", EngineContract, PackageContract)


@dataclass(frozen=True)
class NativeFile(Generic[C]):
    """An engine or a package as it was hashed: what is loaded cannot change after the check."""

    path: Path
    content: bytes
    manifest: Manifest
    contract: C
    """Where it can run."""


def read_native(path: str | Path, contract: type[C]) -> NativeFile[C]:
    """Read an engine or a package, as `contract` says, without loading anything of it.

    Raises InvalidFile: no such file, no manifest beside it or one that is of another file, of another kind of artifact,
    or says something else than the copy inside a package.
    """
    path = existing_file(path, f"a file that {contract.rebuild.partition(': ')[2]} wrote")
    content = path.read_bytes()
    manifest = read_manifest(path, hashlib.sha256(content).hexdigest())
    if manifest is None:
        raise InvalidFile(
            f"no manifest beside it ({path.name}.json); this {contract.kind} is executable code, so it is only opened "
            "with its manifest",
            path=path,
            hint=f"copy the manifest too, or {contract.rebuild}",
        )
    native = manifest.native
    if not isinstance(native, contract):
        raise InvalidFile(
            f"its manifest is of another kind of file, without the section {contract.kind!r}",
            path=path,
            hint=contract.rebuild,
        )
    if contract is PackageContract:
        manifest.check_copy(_copy_inside(path, content), path)
    return NativeFile(path, content, manifest, native)


def check_origin(path: Path, built: C, current: C, capabilities: Sequence[str]) -> None:
    """Raises InvalidFile listing every way in which this machine differs from those that can run the native code.

    Args:
        built, current: what it was built with, and what it would be built with on this machine.
        capabilities: compute capabilities of the GPUs that run it; none if only its library knows.
    """
    differs = []
    if current.version != built.version:
        differs.append(f"{built.library} is {current.version} here, it was built with {built.version}")
    if current.platform != built.platform:
        differs.append(f"this is {current.platform}, it was built for {built.platform}")
    if missing := sorted(set(built.instructions) - set(current.instructions)):
        differs.append(f"this CPU has no {', '.join(missing)}, which it may use")
    if capabilities and current.compute_capability not in capabilities:
        differs.append(
            f"the GPU is {current.gpu} (compute capability {current.compute_capability}), it was built on "
            f"{built.gpu or 'no GPU'} for compute capability {', '.join(capabilities)}"
        )
    if differs:
        raise InvalidFile(f"this {built.kind} cannot run here: {'; '.join(differs)}", path=path, hint=built.rebuild)


def _copy_inside(path: Path, content: bytes) -> Manifest:
    """The manifest in a package, which is a zip archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            name = next(name for name in archive.namelist() if name.endswith("wrapper_metadata.json"))
            text = json.loads(archive.read(name))[METADATA_KEY]
    except (zipfile.BadZipFile, StopIteration, ValueError, KeyError) as error:
        raise InvalidFile(
            "truncated, or not a package of pmm export aoti (no manifest inside)",
            path=path,
            hint=PackageContract.rebuild,
        ) from error
    return Manifest.from_json(text, path)
