"""`pmm COMMAND ...`, or `python -m pmm COMMAND ...`: every command. Loads no more than the command does."""

from __future__ import annotations

import difflib
import importlib
import sys

from pmm.utils import command_line
from pmm.utils.build_info import __version__

PROG = "pmm"
GROUPS = {
    "Train": {
        "train": ("train", "train a model"),
        "evaluate": ("evaluate", "compute mAP, CMC and mINP of a model on a data set"),
        "visualize": ("visualize", "draw what a trained model does"),
        "ablation": ("ablation", "compare methods or presets over several seeds"),
        "reproduce": ("reproduce", "train the rows of the paper's tables, and compare"),
    },
    "Adopt": {
        "adopt": ("adopt", "let all commands use a network that other code made"),
        "import": ("import_checkpoint", "convert a PMM authors' or BDB checkpoint"),
    },
    "Export": {
        "export onnx": ("export_onnx", "write a checkpoint as an ONNX file, proved equal"),
        "export trt": ("export_trt", "build a TensorRT engine from a checkpoint or ONNX file"),
        "export aoti": ("export_aoti", "compile a checkpoint to an AOTInductor package"),
        "export triton": ("export_triton", "make a Triton repository of ONNX files and engines"),
        "export boxmot": ("export_boxmot", "write a checkpoint as files for BoxMOT"),
        "export deepstream": ("export_deepstream", "write a checkpoint as files for DeepStream's tracker"),
        "export openvino": ("export_openvino", "convert a checkpoint to OpenVINO, for crops of any size"),
    },
    "Prove": {
        "bench": ("bench", "measure accuracy and latency of every backend"),
        "compare": ("compare", "find what got slower or less accurate between reports"),
        "selftest": ("selftest", "check that a client computes the right embeddings"),
        "ship": ("ship", "pack what may ship, with its proof, into one folder"),
    },
    "Gallery": {
        "embed": ("embed", "embed a folder of crops into a gallery"),
        "search": ("search", "find the crops of a gallery that are most like an image"),
        "threshold": ("threshold", "set the distance below which two crops are one person"),
        "gallery info": ("gallery_info", "show what a gallery holds"),
        "gallery add": ("gallery_add", "add embeddings that another program made"),
        "gallery remove": ("gallery_remove", "remove crops from a gallery"),
        "gallery compact": ("gallery_compact", "write a gallery anew without what was removed"),
        "gallery verify": ("gallery_verify", "check that a gallery is as it was written"),
        "gallery import": ("gallery_import", "turn an index of an earlier version into a gallery"),
        "gallery export": ("gallery_export", "write a gallery for faiss, Milvus or Parquet"),
        "gallery upgrade": ("gallery_upgrade", "embed a gallery's crops again with another model"),
    },
    "Data": {
        "check": ("check", "find what is wrong with a data set"),
        "synthetic": ("synthetic", "draw a data set of synthetic identities"),
    },
    "Other": {
        "info": ("info", "show what a file is, and what this machine has"),
    },
}
"""Heading of the help -> words of the command line -> module of pmm.commands, and what the command does."""
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def main() -> None:
    """Entry point of the console script: the command that the first words name runs, with the rest as its own."""
    words = sys.argv[1:]
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    name = next((" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in COMMANDS), "")
    if not name:
        command_line.run(lambda prog: _without_command(words), prog=PROG)
    module, _ = COMMANDS[name]
    sys.argv = [f"{PROG} {name}", *words[len(name.split()) :]]
    command_line.run(lambda prog: importlib.import_module(f"pmm.commands.{module}").main(prog), prog=sys.argv[0])


def _without_command(words: list[str]) -> int:
    """Print the commands, and return 0; or print in one line on stderr why `words` are no command, and return 2."""
    if words == ["--version"]:
        print(__version__)
        return 0
    group = [name for name in COMMANDS if words and name.startswith(f"{words[0]} ")]
    rest = words[1:] if group else words
    if rest in ([], ["--help"], ["-h"]) and (rest or not words):
        print(_help(group))
        return 0
    known = f"known: {', '.join(group or COMMANDS)}"
    if not rest:
        problem = f"{words[0]} needs a subcommand: {', '.join(name.split()[1] for name in group)}"
    else:
        ends = {name.split()[-1]: name for name in group} or {name: name for name in COMMANDS}
        close = difflib.get_close_matches(rest[0].lower(), ends, n=1)
        advice = f"did you mean {PROG} {ends[close[0]]}?" if close else known
        problem = f"unknown command '{' '.join(words[: 1 + bool(group)])}'; {advice}"
    print(f"{PROG}: error: {problem}; see {PROG} --help", file=sys.stderr)
    return 2


def _help(group: list[str]) -> str:
    """The commands of `group`, or all of them under their headings."""
    parts = {"": group} if group else GROUPS
    wide = max(len(name) for names in parts.values() for name in names)
    lines = []
    for heading, names in parts.items():
        lines += ["", heading] if heading else [""]
        lines += [f"  {PROG} {name:<{wide}}  {COMMANDS[name][1]}" for name in names]
    command = f"{PROG} {group[0].split()[0]} COMMAND" if group else f"{PROG} COMMAND"
    return "\n".join((f"usage: {command} ...", *lines, "", f"{command} --help lists the flags of a command."))


if __name__ == "__main__":
    main()
