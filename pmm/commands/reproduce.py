"""Train the rows of the paper's tables on its data sets, and set the figures beside the paper's.

pmm reproduce --dataset market1501 --root DIR [--rows pmm,bdb] [--seeds 5] [--devices cuda:0,cuda:1] ...

Each row has its method's own recipe, one run at a time on each GPU. Both definitions of average precision are
evaluated: the standard one and that of the paper's code. table.md and table.json in --out are rewritten after each run;
after an interruption, the same command continues.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from pmm.ablation.runs import RunOutcome
from pmm.ablation.study_command import run_study
from pmm.reproduction.report import make_report, markdown
from pmm.reproduction.study import Reproduction, ReproductionOptions
from pmm.utils import command_line
from pmm.utils.extras import check_installed
from pmm.utils.files import write_file


@dataclass(frozen=True, kw_only=True)
class ReproduceCommand:
    """`pmm reproduce ...`"""

    options: ReproductionOptions = field(default_factory=ReproductionOptions)


def main(prog: str) -> int:
    """Entry point; raises UserError if a run failed."""
    command = command_line.parse(ReproduceCommand, prog=prog, description=__doc__ or "")
    check_installed("torch")
    reproduction = Reproduction(command.options)
    out = reproduction.options.runs
    ended: dict[str, RunOutcome] = {}

    def write(outcomes: Sequence[RunOutcome]) -> str:
        report = make_report(reproduction, outcomes, shlex.join(["pmm", "reproduce", *sys.argv[1:]]))
        write_file(out / "table.json", json.dumps(report, indent=1) + "\n")
        write_file(out / "table.md", (table := markdown(report)) + "\n")
        return f"{table}\nreport: {out / 'table.md'}"

    def write_so_far(outcome: RunOutcome) -> None:
        ended[outcome.run.name] = outcome
        write(reproduction.outcomes(ended))

    return run_study(reproduction, write, prog=prog, after_each=write_so_far)
