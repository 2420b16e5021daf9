"""Time evaluation at the size of Market-1501 beside its matrix product, and measure its memory at MSMT17's size.

python -m bench.lab.ranking [--memory-limit 2GB] [--rerank] [--out FILE.json]

Embeddings are synthetic: like those of a trained network and, as the worst case, uniformly random in every dimension.
A result is compared with a brute-force one in float64 before it is timed.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from bench.lab.mix_report import interval
from pmm.bench.latency import LatencyPlan, measure
from pmm.bench.statistics import median_ratio, stability_flags
from pmm.config import fast_mode
from pmm.evaluation.distances import squared_distances
from pmm.evaluation.metrics import RankingResult, evaluate_distances, evaluate_ranking
from pmm.evaluation.reranking import reranked
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.arrays import Ints, Singles
from pmm.utils.environment import report_header
from pmm.utils.files import output_file, write_file

SCHEMA = "pmm-ranking-bench-1"
PRODUCT = "query @ gallery.T"
KINDS = ("as a trained network's", "uniformly random")
CHECKED = 48
"""Queries whose result is compared with brute force."""
AGREEMENT = 1e-9

LATENT, NOISE = 24, np.float32(0.6)
"""Dimensions in which the synthetic embeddings vary, and their noise beside centres of norm 1 in each."""


class Size(NamedTuple):
    """Size of a data set's test part."""

    name: str
    queries: int
    gallery: int
    identities: int
    distractors: int
    cameras: int


MARKET = Size("Market-1501", 3_368, 15_913, 750, 2_798, 6)
MSMT17 = Size("MSMT17", 11_659, 82_161, 3_060, 0, 15)


class SyntheticEmbeddings(NamedTuple):
    """Synthetic embeddings [Q, D] and [G, D], pids and cameras."""

    query: Singles
    gallery: Singles
    query_pids: Ints
    gallery_pids: Ints
    query_camids: Ints
    gallery_camids: Ints

    @property
    def labels(self) -> tuple[Ints, ...]:
        """The arguments of `evaluate_ranking` after the embeddings."""
        return self[2:]


def synthetic_embeddings(size: Size, dim: int, kind: str = KINDS[0]) -> SyntheticEmbeddings:
    """Embeddings of `size`.

    Like a trained network's: clusters and noise in the few dimensions in which they vary (about 21 of the demo's 384),
    spread over all dimensions and clipped at 0. Or `kind` "uniformly random".
    """
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((size.identities + 1, LATENT), np.float32)
    spread = rng.standard_normal((LATENT, dim), np.float32) / np.float32(LATENT**0.5)
    query_pids, gallery_pids = (rng.integers(1, size.identities + 1, n) for n in (size.queries, size.gallery))
    gallery_pids[: size.distractors] = 0

    def embeddings(pids: Ints) -> Singles:
        rows = rng.random((len(pids), dim), np.float32)
        for start in range(0, len(pids) if kind == KINDS[0] else 0, 4096):
            chunk = pids[start : start + 4096, None]
            anyone = rng.standard_normal((len(chunk), LATENT), np.float32)
            noise = NOISE * rng.standard_normal((len(chunk), LATENT), np.float32)
            place = (np.where(chunk > 0, centres[chunk[:, 0]], anyone) + noise) @ spread
            place += np.float32(0.1) * rng.standard_normal(place.shape, np.float32)
            rows[start : start + 4096] = place.clip(min=0)
        return rows

    query, gallery = embeddings(query_pids), embeddings(gallery_pids)
    query_camids, gallery_camids = (rng.integers(0, size.cameras, n) for n in (size.queries, size.gallery))
    return SyntheticEmbeddings(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids)


def bench_market(plan: LatencyPlan, *, size: Size = MARKET, dim: int = 1536) -> dict[str, Any]:
    """Evaluation beside the matrix product that it contains, in turns; times in ms."""
    settings = []
    for kind in KINDS:
        data = synthetic_embeddings(size, dim, kind)
        result = evaluate_ranking(*data)
        wrong = _largest_ap_error(data, result)
        rows: list[dict[str, Any]] = []
        if wrong <= AGREEMENT:

            def product(data: SyntheticEmbeddings = data) -> None:
                data.query @ data.gallery.T  # which allocates its result each time, too

            def evaluation(data: SyntheticEmbeddings = data) -> None:
                evaluate_ranking(*data)

            times = measure({PRODUCT: product, "evaluation": evaluation}, plan)
            rows = [
                {
                    "name": name,
                    "ms": found.p50,
                    "samples_ms": [round(value, 1) for value in found.samples_ms],
                    **interval(median_ratio(found, times[PRODUCT], block=plan.block)),
                    "flags": list(stability_flags(found.samples_ms, found.turns_s, block=plan.block)),
                }
                for name, found in times.items()
            ]
        settings.append({"embeddings": kind, "mAP": result.mAP, "off_by": wrong, "rows": rows})
    return {"size": size._asdict(), "dim": dim, "settings": settings}


def bench_memory(
    *, memory_limit: int, rerank: bool, label: str = "", size: Size = MSMT17, dim: int = 1536
) -> dict[str, Any]:
    """Evaluation, and with `rerank` re-ranking, under `memory_limit`: seconds and peak memory beyond the embeddings."""
    data = synthetic_embeddings(size, dim)
    rows: list[dict[str, Any]] = []
    ways: dict[str, Callable[[], RankingResult]] = {
        "evaluation": lambda: evaluate_ranking(*data, memory_limit=memory_limit)
    }
    if rerank:
        ways["re-ranking and evaluation"] = lambda: evaluate_distances(
            reranked(data.query, data.gallery, memory_limit=memory_limit, label=label),
            *data.labels,
            memory_limit=memory_limit,
        )
    for name, way in ways.items():
        before = _reset_peak()
        begin = time.perf_counter()
        result = way()
        seconds = time.perf_counter() - begin
        peak = _memory("VmHWM")
        # what was freed meanwhile can be more than what was needed
        above = None if before is None or peak is None else max(0, peak - before)
        rows.append({"name": name, "seconds": seconds, "mAP": result.mAP, "bytes_above": above})
    return {"size": size._asdict(), "dim": dim, "memory_limit": memory_limit, "rows": rows}


def report(market: Mapping[str, Any] | None, msmt17: Mapping[str, Any] | None, plan: LatencyPlan) -> dict[str, Any]:
    """Both, with the machine; see `SCHEMA`."""
    return {
        **report_header(SCHEMA),
        "plan": dataclasses.asdict(plan),
        "market": market,
        "msmt17": msmt17,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The report as tables."""
    lines = []
    if market := found["market"]:
        size = "{queries:,} x {gallery:,}".format(**market["size"])
        lines += [f"| {size} x {market['dim']:,} | ms | time / {PRODUCT} |", "|---|---:|---:|"]
        for setting in market["settings"]:
            for row in setting["rows"]:
                bounds = "({:.2f}-{:.2f})".format(*row["interval"]) if row["interval"] else ""
                lines.append(
                    f"| {row['name']}, {setting['embeddings']} | {row['ms']:.0f} | {row['ratio']:.2f} {bounds} |"
                )
            if not setting["rows"]:
                lines.append(f"| {setting['embeddings']} | wrong by {setting['off_by']:.1g}, not timed | |")
    if msmt17 := found["msmt17"]:
        size = "{queries:,} x {gallery:,}".format(**msmt17["size"])
        limit = msmt17["memory_limit"] / 1e9
        lines += ["", f"| {size} x {msmt17['dim']:,}, limit {limit:g} GB | s | peak memory beyond the embeddings |"]
        lines += ["|---|---:|---:|"]
        for row in msmt17["rows"]:
            above = "unknown" if row["bytes_above"] is None else f"{row['bytes_above'] / 1e9:.2f} GB"
            lines.append(f"| {row['name']} | {row['seconds']:.0f} | {above} |")
    return "\n".join(lines)


def _largest_ap_error(data: SyntheticEmbeddings, result: RankingResult) -> float:
    """Largest difference of AP to brute force, over the first queries."""
    gallery = data.gallery.astype(np.float64)
    distances = squared_distances(data.query[:CHECKED], gallery)
    worst = 0.0
    for query, row in enumerate(distances):
        same = data.gallery_pids == data.query_pids[query]
        valid = ~(same & (data.gallery_camids == data.query_camids[query]))
        order = np.argsort(row[valid], kind="stable")
        ranks = np.flatnonzero(same[valid][order]) + 1
        if len(ranks):
            ap = (np.arange(1, len(ranks) + 1) / ranks).mean()
            worst = max(worst, abs(float(ap - result.per_query_ap[query])))
    return worst


def _reset_peak() -> int | None:
    """Reset the peak memory of this process; its present memory, in bytes. None if the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _memory("VmRSS")


def _memory(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


PROG = "bench.lab.ranking"


@dataclass(frozen=True, kw_only=True)
class RankingCommand:
    """`python -m bench.lab.ranking ...`"""

    rounds: Annotated[int, Arg(least=0)] = 12
    """Times that each way is timed at the size of Market-1501 (0: leave that out)."""
    memory_limit: str = "2GB"
    """Memory beyond the embeddings, at the size of MSMT17."""
    rerank: bool = False
    """Re-rank at the size of MSMT17 too: minutes."""
    out: Path = Path("runs/ranking-bench/ranking.json")
    """JSON file to write."""


def main(prog: str) -> int:
    """Entry point; 1 if a result is wrong."""
    command = command_line.parse(RankingCommand, prog=prog, description=__doc__ or "")
    limit = command_line.size(command.memory_limit, flag="--memory-limit")
    out = output_file(command.out)

    from pmm.bench.latency import LatencyPlan

    plan = LatencyPlan(warmup=0, warmup_runs=1, samples=max(1, command.rounds), block=1, settle=0, lead=0, budget=600.0)
    small = {"dim": 64} if fast_mode() else {}
    sizes = [size._replace(queries=300, gallery=3000) if fast_mode() else size for size in (MARKET, MSMT17)]
    market = bench_market(plan, size=sizes[0], **small) if command.rounds else None
    msmt17 = bench_memory(memory_limit=limit, rerank=command.rerank, label=prog, size=sizes[1], **small)
    found = report(market, msmt17, plan)
    write_file(out, json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    print(f"report: {out}")
    return int(any(setting["off_by"] > AGREEMENT for setting in (market or {"settings": []})["settings"]))


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
