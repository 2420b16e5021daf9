"""A file for the kernels that TensorRT-RTX compiles when an engine runs: else each process needs seconds for them."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from pmm.utils.errors import UserError
from pmm.utils.files import make_folder, write_file


class RuntimeCache:
    """The runtime cache of one engine: an object of the library, filled from a file and written back to it.

    The library itself checks whether a file was written by this version of it, for this GPU and driver; another file
    is replaced. A cache that cannot be read or written costs time only, so it is no error.
    """

    def __init__(self, config: Any, path: Path) -> None:
        """`config`: a runtime configuration of the engine; the GPU's context is current in this thread."""
        self.path, self.shared = path, config.create_runtime_cache()
        try:
            self._before = path.read_bytes() if path.is_file() else b""
        except OSError:
            self._before = b""
        if self._before and not self.shared.deserialize(self._before):
            logging.getLogger("pmm").info("%s: not for this GPU, driver and TensorRT-RTX; replaced", path)

    def save(self) -> None:
        """Write the kernels compiled since; the GPU's context is current in this thread."""
        serialised = self.shared.serialize()
        content = b"" if serialised is None else bytes(serialised)
        if content and content != self._before:
            try:
                make_folder(self.path.parent)
                write_file(self.path, content)
                self._before = content
            except UserError as error:
                logging.getLogger("pmm").info("%s", error)


def cache_file(engine_sha256: str, version: str, compute_capability: str) -> Path:
    """Where the cache of an engine is kept: in the user's folder for such files."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pmm" / "tensorrt-rtx" / f"{engine_sha256[:16]}-{version}-sm{compute_capability}.cache"
