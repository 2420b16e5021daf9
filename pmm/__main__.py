"""`pmm COMMAND ...`, or `python -m pmm COMMAND ...`: every command. Loads no more than the command does."""

from __future__ import annotations

import difflib
import importlib
import sys

from pmm.utils import command_line
from pmm.utils.build_info import __version__

PROG = "pmm"
COMMANDS = {
    "train": ("train", "train a model"),
    "evaluate": ("evaluate", "mAP, CMC and mINP of a checkpoint or an exported file"),
    "export onnx": ("export_onnx", "checkpoint to ONNX file, verified against it"),
    "export trt": ("export_trt", "checkpoint or ONNX file to TensorRT(-RTX) engine"),
    "export aoti": ("export_aoti", "checkpoint to AOTInductor package"),
    "export triton": ("export_triton", "ONNX files and engines to a Triton model repository"),
    "export boxmot": ("export_boxmot", "checkpoint to what BoxMOT takes"),
    "export deepstream": ("export_deepstream", "checkpoint to what DeepStream's tracker takes"),
    "export openvino": ("export_openvino", "checkpoint to OpenVINO's IR, for crops of any size"),
    "selftest": ("selftest", "whether a client of a file gives the right embeddings"),
    "bench": ("bench", "accuracy and latency of every backend"),
    "ship": ("ship", "one folder to hand over: what may ship, with its proof"),
    "compare": ("compare", "two reports of bench: what is slower or less accurate"),
    "ablation": ("ablation", "methods or presets, compared over several seeds"),
    "reproduce": ("reproduce", "the rows of the paper's tables, beside its figures"),
    "embed": ("embed", "a folder of crops to a gallery"),
    "search": ("search", "the crops of a gallery that are most like an image"),
    "threshold": ("threshold", "up to which distance two crops show one person"),
    "gallery info": ("gallery_info", "what a gallery holds"),
    "gallery add": ("gallery_add", "embeddings of another program into a gallery"),
    "gallery remove": ("gallery_remove", "crops out of a gallery"),
    "gallery compact": ("gallery_compact", "a gallery without what was removed"),
    "gallery verify": ("gallery_verify", "whether a gallery is as it was written"),
    "gallery import": ("gallery_import", "an index of an earlier version to a gallery"),
    "gallery export": ("gallery_export", "a gallery to faiss, Milvus or Parquet"),
    "gallery upgrade": ("gallery_upgrade", "a gallery to another model"),
    "visualize": ("visualize", "pictures of what a trained model does"),
    "info": ("info", "what a file is, and what this machine has"),
    "check": ("check", "what is wrong with a data set"),
    "adopt": ("adopt", "a network that other code made, for all other commands"),
    "import": ("import_checkpoint", "checkpoint of the PMM authors' code, or BDB's, to ours"),
    "synthetic": ("synthetic", "draw a data set of synthetic identities"),
}
"""Words of the command line -> module of pmm.commands, and what it does."""


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
        print(_help(group or list(COMMANDS)))
        return 0
    known = f"known: {', '.join(group or COMMANDS)}"
    if not rest:
        problem = f"{words[0]} takes one more word; {known}"
    else:
        ends = {name.split()[-1]: name for name in group} or {name: name for name in COMMANDS}
        close = difflib.get_close_matches(rest[0].lower(), ends, n=1)
        advice = f"did you mean {PROG} {ends[close[0]]}?" if close else known
        problem = f"unknown command '{' '.join(words[: 1 + bool(group)])}'; {advice}"
    print(f"{PROG}: error: {problem}; see {PROG} --help", file=sys.stderr)
    return 2


def _help(names: list[str]) -> str:
    wide = max(map(len, names))
    lines = [f"  {PROG} {name:<{wide}}  {COMMANDS[name][1]}" for name in names]
    return "\n".join(
        (f"usage: {PROG} COMMAND ...", "", *lines, "", f"{PROG} COMMAND --help lists the flags of a command.")
    )


if __name__ == "__main__":
    main()
