"""Evaluate a checkpoint on a data set: mAP, CMC, mINP.

python -m pmm.evaluate CKPT --dataset NAME --root DIR [--json FILE]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pmm import cli
from pmm.data.readers import read_dataset
from pmm.embed import embed_samples, rank_split
from pmm.errors import UserError
from pmm.files import output_file, write_file
from pmm.metrics import RankingResult

PROG = "pmm.evaluate"
CMC_RANKS = (1, 5, 10, 20)


@dataclass(frozen=True, kw_only=True)
class Command:
    """`python -m pmm.evaluate CKPT --dataset NAME --root DIR [--json FILE]`"""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint or exported ONNX file."""
    dataset: str
    """Data set: market1501 or synthetic."""
    root: Path
    """Folder of the data set."""
    json: Path | None = None
    """Also write the figures to this file."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 64
    """Images at once."""


def main() -> None:
    """Entry point."""
    command = cli.parse(Command, prog=PROG, description=__doc__ or "")
    if command.batch_size < 1:
        raise UserError(f"--batch-size is {command.batch_size}; it must be at least 1")
    if command.json:
        output_file(command.json, source=command.checkpoint)
    split = read_dataset(command.dataset, command.root)

    from pmm.runtime.base import open_runner

    with open_runner(command.checkpoint, command.device) as runner:
        query = embed_samples(runner, split.query, batch_size=command.batch_size, label="query")
        gallery = embed_samples(runner, split.gallery, batch_size=command.batch_size, label="gallery")
    result = rank_split(split, query, gallery)
    print(f"{command.checkpoint} on {command.root}: {len(query)} queries, {len(gallery)} gallery crops")
    print(describe(result))
    if command.json:
        write_file(command.json, json.dumps(figures(result), indent=2) + "\n")


def figures(result: RankingResult) -> dict[str, float | int]:
    """The printed figures as plain numbers (fractions)."""
    cmc = {f"rank{rank}": float(result.cmc[rank - 1]) for rank in CMC_RANKS}
    return {"mAP": result.mAP, **cmc, "mINP": result.mINP, "skipped_queries": result.skipped}


def describe(result: RankingResult) -> str:
    """One line: mAP (standard AP over the whole list), CMC and mINP in percent, skipped queries."""
    cmc = "  ".join(f"rank-{rank} {result.cmc[rank - 1]:.1%}" for rank in CMC_RANKS)
    return f"mAP {result.mAP:.1%}  {cmc}  mINP {result.mINP:.1%}  ({result.skipped} queries without a match skipped)"


if __name__ == "__main__":
    cli.run(main, prog=PROG)
