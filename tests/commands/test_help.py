"""What every command's --help looks like, at the widths of an old and of a wide terminal."""

import importlib
import re
from itertools import pairwise

import pytest

from pmm.__main__ import COMMANDS
from pmm.training.flags import TrainCommand
from pmm.utils.arguments import arguments
from pmm.utils.help_text import COLUMN, explanation, help_text

WIDTHS = (80, 120)


def command_of(name):
    """The module of a command and the dataclass of its command line."""
    module = importlib.import_module(f"pmm.commands.{COMMANDS[name][0]}")
    kinds = [kind for key, kind in vars(module).items() if key.endswith("Command")]
    return module, (kinds or [TrainCommand])[0]


def shown(name, width):
    module, command = command_of(name)
    return help_text(arguments(command), prog=f"pmm {name}", description=module.__doc__, width=width)


def paragraphs(text):
    """The usage apart: runs of lines that are one paragraph, each line from where it begins."""
    _, *blocks = text.split("\n\n")
    for block in blocks:
        title, *lines = block.splitlines()
        if not title.endswith(":"):
            yield [title, *lines]
            continue
        entry = []
        for line in lines:
            if line[2] != " " and entry:
                yield entry
                entry = []
            if len(line) > COLUMN and line[COLUMN - 2 : COLUMN] == "  ":
                entry.append(line)
        yield entry


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMMANDS)
def test_lines_fill_the_terminal_and_no_more(name, width):
    text = shown(name, width)
    assert text.startswith(f"usage: pmm {name} ")
    assert max(map(len, text.splitlines())) <= width
    for lines in paragraphs(text):
        for line, after in pairwise(lines):
            assert len(line) + 1 + len(after.split()[0]) > width, (line, after)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_argument_is_explained_and_its_default_said_once(name):
    _, command = command_of(name)
    for argument in arguments(command):
        text = explanation(argument)
        assert len(text.split()) > 2, argument.flag
        assert text.endswith("."), text
        assert text.count("default: ") <= 1, text
        assert not re.search(r"default: (None|False|''|\)|\.)", text), text


@pytest.mark.parametrize("name", COMMANDS)
def test_groups_and_positional_arguments_have_names_for_users(name):
    text = shown(name, 80)
    usage, *blocks = text.split("\n\n")
    titles = [block.split(":\n")[0] for block in blocks if re.match(r"[\w ,]+:\n  ", block)]
    assert len(titles) == len(set(titles)) > 0
    assert not [title for title in titles if title in ("config", "Options") or "." in title or " options" in title]
    for argument in arguments(command_of(name)[1]):
        if argument.arg.positional:
            assert argument.flag in usage
            assert argument.flag.isupper() or "." in argument.flag
