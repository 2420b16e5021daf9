"""The memory that a gallery takes beyond what is memory-mapped, in a process that does nothing else.

python -m bench.lab.gallery_memory GALLERY QUERIES.npy KERNEL
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pmm.utils import build_info
from pmm.utils.arrays import Singles

ROOT = Path(__file__).resolve().parents[2]
INTERVAL = 0.002
"""Seconds between two looks at the memory."""


def measured_apart(gallery: Path, queries: Singles, kernel: str) -> dict[str, Any]:
    """`measured`, in a new process that scans by "compiled" or "numpy"."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "queries.npy")
        np.save(file, queries)
        command = [sys.executable, "-m", "bench.lab.gallery_memory", str(gallery), str(file), kernel]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measured(path: Path, queries: Singles) -> dict[str, Any]:
    """Seconds and bytes to open a gallery, until the first result, and at most while `queries` are searched for, alone
    and together."""
    import pmm

    before = _anonymous()
    begin = time.perf_counter()
    gallery = pmm.Gallery.open(path)
    opened, open_bytes = time.perf_counter() - begin, _anonymous() - before
    with _watched() as peak:
        begin = time.perf_counter()
        gallery.search(queries[0], 10)
        first = time.perf_counter() - begin
        first_peak = peak[0] - before
        for query in queries:
            gallery.search(query, 10)
        gallery.search(queries, 10)
    return {
        "open_s": opened,
        "open_bytes": open_bytes,
        "first_s": first,
        "first_bytes": first_peak,
        "batch": len(queries),
        "peak_bytes": peak[0] - before,
        "after_bytes": _anonymous() - before,
    }


@contextlib.contextmanager
def _watched() -> Iterator[list[int]]:
    """The most memory that was taken meanwhile, as often as it is looked at."""
    peak, done = [_anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak[0] = max(peak[0], _anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _anonymous() -> int:
    """Memory of this process that no file holds, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    if sys.argv[3] == "numpy":  # as where there is no compiler
        build_info.SEARCH_LIBRARY, os.environ["PMM_REQUIRE_EXT"] = Path(os.devnull), "0"
    print(json.dumps(measured(Path(sys.argv[1]), np.load(sys.argv[2]))))
