"""Train a re-identification model.

pmm train [--preset NAME] [--method NAME] [--dataset market1501 --root DIR] [--out DIR] [--resume] ...

Without arguments: preset paper on a machine with an NVIDIA GPU, else tiny, on synthetic identities, which are drawn the
first time.
"""

from __future__ import annotations

import os
import signal
import sys

from pmm.artifacts.run_folder import LAST
from pmm.training.flags import epochs_note, new_run, parse, resume_command
from pmm.training.launch import is_first, train
from pmm.utils import command_line
from pmm.utils.errors import TrainingInterrupted, UserError
from pmm.utils.hardware import hide_gpus


def main(prog: str) -> int:
    """Parse, then train."""
    try:
        command = parse(sys.argv[1:], prog=prog, description=__doc__ or "")
    except UserError:
        if not is_first() and os.environ.get("LOCAL_RANK", "0") != "0":  # the first one on this machine says the same
            return 1
        raise
    if command.options.device == "cpu":
        hide_gpus()
    file = command.files.config_file
    if file and command.config.recipe.amp == "auto" and is_first():
        command_line.note(prog, f"the precision is not taken from {file}; give --amp for another than the fastest")
    if (note := epochs_note(command, command_line.flags_in())) and is_first():
        command_line.note(prog, note)
    out = command.files.out or new_run(command)
    advice = f"continue with: {resume_command(command, out)} --resume"
    try:
        train(command.config, out, command.options)
    except TrainingInterrupted as stop:
        name = "Ctrl-C" if stop.number == signal.SIGINT else signal.Signals(stop.number).name
        if is_first():
            print(f"\n{prog}: stopped by {name}; {stop.where}: saved; {advice}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        if not (out / LAST).exists():
            advice = "nothing was trained yet"
        print(f"\n{prog}: interrupted; {advice}", file=sys.stderr)
        return command_line.INTERRUPTED
    return 0
