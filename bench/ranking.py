"""Time evaluation at the size of Market-1501 beside its matrix product, and see what memory MSMT17's size takes.

python bench/ranking.py [--memory-limit 2GB] [--rerank] [--out FILE.json]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pmm import cli
from pmm.config import fast_mode
from pmm.files import output_file, write_file

PROG = "bench/ranking.py"


@dataclass(frozen=True, kw_only=True)
class Command:
    """`python bench/ranking.py ...`"""

    rounds: int = 12
    """Times that each way is timed at the size of Market-1501 (0: leave that out)."""
    memory_limit: str = "2GB"
    """Memory beyond the embeddings, at the size of MSMT17."""
    rerank: bool = False
    """Re-rank at the size of MSMT17 too: minutes."""
    out: Path = Path("runs/ranking-bench/ranking.json")
    """JSON file to write."""


def main() -> int:
    """Entry point; 1 if a result is wrong."""
    command = cli.parse(Command, prog=PROG, description=__doc__ or "")
    limit = cli.size(command.memory_limit, flag="--memory-limit")
    rounds = cli.numbers(str(command.rounds), flag="--rounds", least=0)[0]
    out = output_file(command.out)

    from pmm.bench.latency import LatencyPlan
    from pmm.bench.ranking import AGREEMENT, MARKET, MSMT17, bench_market, bench_memory, markdown, report

    plan = LatencyPlan(warmup=0, warmup_runs=1, samples=max(1, rounds), block=1, settle=0, lead=0, budget=600.0)
    small = {"dim": 64} if fast_mode() else {}
    sizes = [size._replace(queries=300, gallery=3000) if fast_mode() else size for size in (MARKET, MSMT17)]
    market = bench_market(plan, size=sizes[0], **small) if rounds else None
    msmt17 = bench_memory(memory_limit=limit, rerank=command.rerank, label=PROG, size=sizes[1], **small)
    found = report(market, msmt17, plan)
    write_file(out, json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    print(f"report: {out}")
    return int(any(setting["off_by"] > AGREEMENT for setting in (market or {"settings": []})["settings"]))


if __name__ == "__main__":
    cli.run(main, prog=PROG)
