"""The page of the command line: every command, its usage and its flags, from the dataclasses that parse them."""

from __future__ import annotations

import importlib
from types import ModuleType

from pmm.__main__ import COMMANDS, GROUPS
from pmm.training.flags import TrainCommand
from pmm.utils.arguments import Argument, arguments
from pmm.utils.help_text import by_group, explanation, metavar, split_description

HEAD = """# Command line

`pmm COMMAND --help` shows the same in a terminal. `python -m pmm COMMAND` is the same command where no script is
installed, and in a clone `python -m pmm.train`, `python export/to_onnx.py`, `python export/to_trt.py` and
`python bench/run.py` are `pmm train`, `pmm export onnx`, `pmm export trt` and `pmm bench`.

Every command ends with 0 if all went well, 1 if a run or a gate failed, and 2 for a command line that cannot be used.
"""


def cli_page() -> str:
    """Markdown of the whole page."""
    index = []
    for heading, commands in GROUPS.items():
        index += [f"**{heading}**", "", "| command | what it does |", "|---|---|"]
        index += [f"| [`pmm {name}`](#{_anchor(name)}) | {text} |" for name, (_, text) in commands.items()]
        index.append("")
    return "\n".join([HEAD, *index, *(_section(name, importlib.import_module(_module(name))) for name in COMMANDS)])


def _module(name: str) -> str:
    return f"pmm.commands.{COMMANDS[name][0]}"


def _anchor(name: str) -> str:
    return f"pmm-{name.replace(' ', '-')}"


def _section(name: str, module: ModuleType) -> str:
    """A command: usage, text, and a table of its flags for each group."""
    usages, texts = split_description(module.__doc__ or "")
    lines = [f"## pmm {name} {{#{_anchor(name)}}}", "", *(f"{text}\n" for text in texts)]
    lines += ["```text", *usages, "```", ""]
    for title, group in by_group(arguments(_command(module))).items():
        lines += ["" if title == "options" else f"**{title.capitalize()}**\n", "| | |", "|---|---|"]
        lines += [f"| {_given(each)} | {_cell(explanation(each))} |" for each in group]
        lines.append("")
    return "\n".join(lines)


def _command(module: ModuleType) -> type:
    return next((kind for key, kind in vars(module).items() if key.endswith("Command")), TrainCommand)


def _given(argument: Argument) -> str:
    """How it is given, as `-o, --out DIR`."""
    flags = ", ".join(flag for flag in (argument.arg.short, argument.flag) if flag)
    value = "" if argument.arg.positional else metavar(argument)
    return f"`{f'{flags} {value}'.strip()}`".replace("|", "\\|")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
