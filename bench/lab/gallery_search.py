"""Time exact search in a gallery of a million embeddings beside the search of earlier versions, and measure its memory.

python -m bench.lab.gallery_search [--rows 1000000] [--artifact model.onnx --root data] [--out FILE.json]

All ways take turns in one run, on the same queries; what each finds is compared with brute force in float64 before it
is timed. The earlier search is that of a commit where git has it, else the evaluation's of today; the report says
which. Without an artifact the embeddings are made up like a trained network's. Exit code 1 if a result is wrong, or
speed or memory of a large gallery are not what is required.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from bench.lab.earlier_search import COMMIT, PACKAGE, earlier_search
from bench.lab.gallery_memory import measured_apart
from bench.lab.gallery_model import People, embedded_people, synthetic_people
from bench.lab.mix_report import interval
from pmm.bench.latency import LatencyPlan, measure
from pmm.bench.statistics import median_ratio, stability_flags
from pmm.config import fast_mode
from pmm.evaluation.distance_blocks import MEMORY_LIMIT, Blocks
from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.evaluation.nearest import nearest
from pmm.exact_search.searcher import ExactSearcher
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.arrays import Doubles, Ints, Singles
from pmm.utils.environment import report_header
from pmm.utils.errors import ConflictingOptions
from pmm.utils.files import output_file, write_file
from pmm.utils.search_library import library

SCHEMA = "pmm-gallery-search-bench-1"
EARLIER, NUMPY, KERNEL = "matrix product, before", "short codes, numpy", "short codes, compiled"
K = 10
BATCH = 64
REQUIRED = {(NUMPY, 1): 3.0, (NUMPY, BATCH): 2.3, (KERNEL, 1): 7.0, (KERNEL, BATCH): 4.0}
"""How many times as fast as `EARLIER` a way has to be, alone and in batches."""
MOST_MEMORY = 0.2
"""Of the embeddings in float32: what a search keeps, and what it takes at most."""
REQUIRED_ROWS = 1_000_000
"""In smaller galleries nothing is required."""
AGREEMENT = 1e-12
"""Largest relative difference of a distance from brute force, which sums in another order."""


class Found(NamedTuple):
    """The nearest rows [Q, K] and half their squared distances."""

    rows: Ints
    distances: Doubles


Way = Callable[[Singles], Found]


def ways_to_search(parts: list[Singles], searchers: Mapping[str, ExactSearcher], scratch: Path) -> dict[str, Way]:
    """By name; the first is that of earlier versions, which keeps all embeddings in memory."""
    whole, before = np.concatenate(parts), earlier_search(scratch)
    matrix: Any = (before.distances.Rows if before else EmbeddingMatrix)(whole)

    def earlier(queries: Singles) -> Found:
        if not before:
            between = EmbeddingDistances(EmbeddingMatrix(queries), matrix)
            return Found(*nearest(between, K, Blocks.within(MEMORY_LIMIT, between.shape, between.dim, 1))[:2])
        then = before.distances.EmbeddingDistances(before.distances.Rows(queries), matrix)
        blocks = before.distances.Blocks.within(MEMORY_LIMIT, then.shape, then.dim, 1)
        return Found(*before.nearest.nearest(then, K, blocks)[:2])

    def certified(searcher: ExactSearcher) -> Way:
        return lambda queries: Found(*searcher.nearest(queries, K))

    return {EARLIER: earlier, **{name: certified(searcher) for name, searcher in searchers.items()}}


def brute_force(parts: list[Singles], queries: Singles) -> Found:
    """In float64: products choose what may be among the nearest, differences measure it."""
    wide = queries.astype(np.float64)
    halves = np.square(wide).sum(1) / 2
    last = np.full(len(queries), np.inf)
    best = [(np.empty(0, np.int64), np.empty(0)) for _ in queries]
    start = 0
    for part in parts:
        for chunk in np.array_split(part, max(1, len(part) // 4096)):
            rows = chunk.astype(np.float64)
            squares = np.square(rows).sum(1) / 2
            about = halves[:, None] + squares - wide @ rows.T
            # a product of a thousand terms is wrong by less than 1e-12 of the norms
            near = about <= (last + 1e-11 * (halves + squares.max()))[:, None]
            for query in np.flatnonzero(near.any(1)):
                found = np.flatnonzero(near[query])
                exact = np.square(rows[found] - wide[query]).sum(1) / 2
                items = np.concatenate([best[query][0], found + start])
                values = np.concatenate([best[query][1], exact])
                order = np.lexsort((items, values))[:K]
                best[query] = items[order], values[order]
                if len(order) == K:
                    last[query] = best[query][1][-1]
            start += len(chunk)
    return Found(*(np.stack(column) for column in zip(*best, strict=True)))


def checked(way: Way, queries: Singles, truth: Found) -> dict[str, Any]:
    """How many queries have other rows than brute force, and the largest relative difference of a distance."""
    found = [way(queries[start : start + BATCH]) for start in range(0, len(queries), BATCH)]
    found += [way(queries[query : query + 1]) for query in range(min(BATCH, len(queries)))]
    rows, distances = (np.concatenate(column) for column in zip(*found, strict=True))
    both = np.arange(len(rows)) % len(queries)
    wrong = (rows != truth.rows[both]).any(1)
    off = np.abs(distances - truth.distances[both]) / np.maximum(truth.distances[both], np.finfo(np.float64).tiny)
    return {"queries": len(rows), "other_rows": int(wrong.sum()), "off_by": float(off.max())}


def timed(ways: Mapping[str, Way], queries: Singles, at_once: int, plan: LatencyPlan) -> list[dict[str, Any]]:
    """Each way on the same queries in the same order, `at_once` at a time; times in ms."""

    def step(way: Way) -> Callable[[], object]:
        starts = itertools.cycle(range(0, len(queries) - at_once + 1, at_once))
        return lambda: way(queries[(start := next(starts)) : start + at_once])

    times = measure({name: step(way) for name, way in ways.items()}, plan)
    rows = []
    for name, found in times.items():
        speedup = median_ratio(times[EARLIER], found, block=plan.block)
        rows.append(
            {
                "way": name,
                "at_once": at_once,
                "ms": found.p50,
                "queries_per_s": 1e3 * at_once / found.p50,
                "samples_ms": [round(value, 3) for value in found.samples_ms],
                "speedup": interval(speedup),
                "required": REQUIRED.get((name, at_once)),
                "flags": list(stability_flags(found.samples_ms, found.turns_s, block=plan.block)),
            }
        )
    return rows


def bench(people: People, count: int, folder: Path, plan: LatencyPlan) -> dict[str, Any]:
    """Make the gallery in `folder`; check and time each way to search it, and its memory in a process of its own."""
    import pmm
    from pmm.gallery.storage.short_codes import read_codes, read_rotation
    from pmm.gallery.storage.snapshot import GallerySnapshot

    begin = time.perf_counter()
    gallery = None
    for rows in people.rows(count):
        ids = np.arange(0 if gallery is None else len(gallery), len(rows) + (0 if gallery is None else len(gallery)))
        if gallery is None:
            gallery = pmm.Gallery.create(folder, rows, ids, "euclidean")
        else:
            gallery.add(rows, ids)
    assert gallery is not None
    gallery.compact()
    seconds = time.perf_counter() - begin
    snapshot = GallerySnapshot.open(folder)
    rotation = read_rotation(snapshot)
    codes, parts = read_codes(snapshot, rotation.r), [np.asarray(chunk.embeddings) for chunk in snapshot.chunks]
    fp32 = 4 * count * people.queries.shape[1]
    kernels = {NUMPY: "numpy", **({KERNEL: "compiled"} if library() else {})}
    found: dict[str, Any] = {
        "rows": count,
        "dim": people.queries.shape[1],
        "embeddings": people.name,
        "k": K,
        "gallery": {"seconds": seconds, "chunks": len(parts), "coordinates": rotation.r, "fp32_bytes": fp32},
        "memory": {name: measured_apart(folder, people.queries[:BATCH], kernel) for name, kernel in kernels.items()},
        "checks": {},
        "rows_timed": [],
        "resident": {},
    }
    if not plan.samples:
        return found
    searchers = {
        name: ExactSearcher(parts, "euclidean", rotation, codes, kernel=kernel) for name, kernel in kernels.items()
    }
    found["resident"] = {name: searcher.resident_bytes for name, searcher in searchers.items()}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        ways = ways_to_search(parts, searchers, Path(scratch))
    found["earlier"] = COMMIT if PACKAGE in sys.modules else "pmm.evaluation.nearest of today"
    truth = brute_force(parts, people.queries)
    found["checks"] = {name: checked(way, people.queries, truth) for name, way in ways.items()}
    right = {name: ways[name] for name, check in found["checks"].items() if is_right(check)}
    if EARLIER in right:
        for at_once in (1, BATCH):
            found["rows_timed"] += timed(right, people.queries, at_once, plan)
    return found


def is_right(check: Mapping[str, Any]) -> bool:
    """Whether a way has found what brute force has."""
    return not check["other_rows"] and check["off_by"] <= AGREEMENT


def missed(found: Mapping[str, Any]) -> list[str]:
    """What is required of a large gallery and is not so."""
    if found["rows"] < REQUIRED_ROWS:
        return []
    most = MOST_MEMORY * found["gallery"]["fp32_bytes"]
    memory = {"resident": found["resident"], "peak": {name: m["peak_bytes"] for name, m in found["memory"].items()}}
    return [
        f"{row['way']}, {row['at_once']} at once: {row['speedup']['ratio']:.2f} times as fast, not {row['required']:g}"
        for row in found["rows_timed"]
        if row["required"] and row["speedup"]["ratio"] < row["required"]
    ] + [
        f"{name}, {what}: {size / 1e6:.0f} MB, more than {most / 1e6:.0f}"
        for what, sizes in memory.items()
        for name, size in sizes.items()
        if size > most
    ]


def markdown(found: Mapping[str, Any]) -> str:
    """The report as a table."""
    lines = [f"{found['rows']:,} x {found['dim']:,}, {found['embeddings']}; the {found['k']} nearest"]
    if found["checks"]:
        lines += ["", "| search | resident | alone, ms | times as fast | 64 at once, queries/s | times as fast |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
    fp32 = found["gallery"]["fp32_bytes"]
    for name, check in found["checks"].items():
        if not is_right(check):
            lines.append(f"| {name} | wrong for {check['other_rows']} of {check['queries']}, not timed | | | | |")
            continue
        cells = []
        for row in found["rows_timed"]:
            if row["way"] == name:
                figure = f"{row['ms']:.1f}" if row["at_once"] == 1 else f"{row['queries_per_s']:.0f}"
                speedup = row["speedup"]["ratio"]
                required = f" (required: {row['required']:g})" if row["required"] else ""
                cells += [figure, f"{speedup:.1f}{required}"]
        resident = found["resident"].get(name, fp32) / fp32
        lines.append(f"| {name} | {resident:.1%} | {' | '.join(cells)} |")
    lines += ["", f"{EARLIER}: {found['earlier']}"] if found["checks"] else []
    for name, memory in found["memory"].items():
        lines += [
            "",
            f"{name}: opened in {memory['open_s']:.3f} s with {memory['open_bytes'] / 1e6:.0f} MB; the first query "
            f"took {memory['first_s']:.2f} s, and with {memory['batch']} at once at most "
            f"{memory['peak_bytes'] / 1e6:.0f} MB were taken beyond what is memory-mapped.",
        ]
    return "\n".join([*lines, *(f"MISSED: {line}" for line in missed(found))])


PROG = "bench.lab.gallery_search"


@dataclass(frozen=True, kw_only=True)
class GallerySearchCommand:
    """`python -m bench.lab.gallery_search ...`"""

    rows: Annotated[int, Arg(least=1000)] = 1_000_000
    """Embeddings of the gallery."""
    dim: Annotated[int, Arg(least=2)] = 384
    """Of made-up embeddings."""
    queries: Annotated[int, Arg(least=BATCH)] = 1000
    """Queries that are compared with brute force, and timed."""
    artifact: Annotated[Path | None, Arg("FILE")] = None
    """Embed synthetic people with this file instead."""
    root: Annotated[Path | None, Arg("FOLDER")] = None
    """Where they lie (`pmm synthetic`)."""
    rounds: Annotated[int, Arg(least=0)] = 40
    """Times that each way is timed (0: measure memory alone)."""
    scratch: Annotated[Path | None, Arg("FOLDER")] = None
    """Folder for the gallery, which is removed at the end (default: that for temporary files)."""
    out: Path = Path("runs/gallery-search-bench/gallery-search.json")
    """JSON file to write."""


def main(prog: str) -> int:
    """Entry point; 1 if a result is wrong, or something required is missed."""
    command = command_line.parse(GallerySearchCommand, prog=prog, description=__doc__ or "")
    if (command.artifact is None) != (command.root is None):
        raise ConflictingOptions("--artifact needs --root, and --root needs --artifact", "--artifact", "--root")
    out = output_file(command.out)
    count, queries = (5000, BATCH) if fast_mode() else (command.rows, command.queries)
    people = (
        embedded_people(command.artifact, command.root, queries)
        if command.artifact and command.root
        else synthetic_people(32 if fast_mode() else command.dim, queries)
    )
    # BLAS's threads of the way before wait busily for a while
    plan = LatencyPlan(
        warmup=0,
        warmup_runs=2,
        samples=command.rounds,
        block=min(4, max(1, command.rounds)),
        settle=0.2,
        lead=1,
        budget=600.0,
    )
    folder = Path(tempfile.mkdtemp(prefix="pmm-gallery-", dir=command.scratch))
    try:
        found = bench(people, count, folder / "gallery", plan)
    finally:
        shutil.rmtree(folder)
    found = {**report_header(SCHEMA), "plan": dataclasses.asdict(plan), **found}
    write_file(out, json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    print(f"report: {out}")
    return int(bool(missed(found)) or not all(map(is_right, found["checks"].values())))


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
