"""Compare methods, or presets, over several seeds: mean, spread, and paired differences with 95 % intervals.

pmm ablation [--methods pmm,bdb,pmm:k=0] [--compare-presets tiny,paper] [--seeds 5] [--jobs N] ...

Writes a JSON file, and a table (.md) and a plot (.png) beside it. After an interruption, the same command continues.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.ablation.plot import plot
from pmm.ablation.report import default_out, make_report, markdown
from pmm.ablation.runs import RunOutcome
from pmm.ablation.study import Ablation, AblationOptions
from pmm.ablation.study_command import run_study
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.extras import check_installed
from pmm.utils.files import output_file, write_file


@dataclass(frozen=True, kw_only=True)
class AblationCommand:
    """`pmm ablation ...`"""

    options: AblationOptions = field(default_factory=AblationOptions)
    out: Annotated[Path | None, Arg("FILE.json", short="-o")] = None
    """JSON file to write (default: DATE-MACHINE-ablation.json in bench/results of a clone, or else in --runs)."""


def main(prog: str) -> int:
    """Entry point; raises UserError if a run failed."""
    command = command_line.parse(AblationCommand, prog=prog, description=__doc__ or "")
    check_installed("torch", "matplotlib")  # matplotlib for the plot, at the end
    ablation = Ablation(command.options)
    out = output_file(command.out or default_out(ablation), suffixes=(".json",))

    def write(outcomes: Sequence[RunOutcome]) -> str:
        results = make_report(ablation, outcomes, shlex.join(["pmm", "ablation", *sys.argv[1:]]))
        table = markdown(results)
        write_file(out, json.dumps(results, indent=1) + "\n")
        write_file(out.with_suffix(".md"), table + "\n")
        out.with_suffix(".png").unlink(missing_ok=True)  # of another report, if nothing can be compared in this one
        if picture := plot(results):
            write_file(out.with_suffix(".png"), picture)
        return f"{table}\nreport: {out}"

    return run_study(ablation, write, prog=prog)
