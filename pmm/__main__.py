"""`pmm COMMAND ...`, or `python -m pmm COMMAND ...`: every command. Loads no more than the command does."""

from __future__ import annotations

import difflib
import importlib
import sys

import pmm
from pmm.utils import command_line

PROG = "pmm"
COMMANDS = {
    "train": ("train", "train a model on people on disk"),
    "evaluate": ("evaluate", "mAP, CMC and mINP of a checkpoint or of any exported file"),
    "export onnx": ("export_onnx", "checkpoint to ONNX file, proved against the checkpoint"),
    "export trt": ("export_trt", "checkpoint or ONNX file to TensorRT or TensorRT-RTX engine"),
    "export aoti": ("export_aoti", "checkpoint to AOTInductor package"),
    "export triton": ("export_triton", "ONNX files and engines to a Triton model repository"),
    "bench": ("bench", "per backend: does the ranking survive, and how long does inference take"),
    "compare": ("compare", "two reports of bench: what got slower or less accurate"),
    "ablation": ("ablation", "methods or presets over several seeds, with intervals"),
    "embed": ("embed", "a folder of crops to an index"),
    "search": ("search", "the crops of an index that are most like one image"),
    "visualize": ("visualize", "pictures of what a trained model does"),
    "info": ("info", "what a file is, and what this machine has"),
    "check": ("check", "what is wrong with a data set"),
    "import": ("import_checkpoint", "checkpoint of the PMM authors' code, or of BDB's, to one of ours"),
    "synthetic": ("synthetic", "draw a data set of synthetic people"),
}
"""Words of the command line -> module of pmm.commands, and what it does."""


def main() -> None:
    """Entry point of the console script: the command that the first words name runs, with the rest as its own."""
    words = sys.argv[1:]
    if not words or words[0] in ("--help", "-h", "help"):
        print(_help())
        raise SystemExit(0)
    if words == ["--version"]:
        print(pmm.__version__)
        raise SystemExit(0)
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    if name not in COMMANDS:
        _refuse(words)
    module, _ = COMMANDS[name]
    prog = f"{PROG} {name}"
    sys.argv = [prog, *words[len(name.split()) :]]
    command_line.run(lambda prog: importlib.import_module(f"pmm.commands.{module}").main(prog), prog=prog)


def _help(group: str = "") -> str:
    listed = {name: what for name, (_, what) in COMMANDS.items() if name.startswith(group)}
    wide = max(map(len, listed))
    lines = [f"  {PROG} {name:<{wide}}  {what}" for name, what in listed.items()]
    return "\n".join(
        (f"usage: {PROG} COMMAND ...", "", *lines, "", f"{PROG} COMMAND --help says what a command takes.")
    )


def _refuse(words: list[str]) -> None:
    """One line on stderr and exit code 2; for `pmm export --help`, the commands that begin so, and 0."""
    group = f"{words[0]} "
    inside = [name for name in COMMANDS if name.startswith(group)]
    if inside and words[1:] in (["--help"], ["-h"]):
        print(_help(group))
        raise SystemExit(0)
    known = f"known: {', '.join(inside or COMMANDS)}"
    if inside and not words[1:]:
        print(f"{PROG}: error: {PROG} {words[0]} needs another word; {known}. See {PROG} --help", file=sys.stderr)
        raise SystemExit(2)
    given = " ".join(words[:2]) if inside else words[0]
    close = difflib.get_close_matches(given, inside or COMMANDS, n=1)
    advice = f"did you mean {PROG} {close[0]}?" if close else f"{known}."
    print(f"{PROG}: error: unknown command '{given}'; {advice} See {PROG} --help", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
