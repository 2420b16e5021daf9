"""MODULE:FACTORY: what is found, how it is called, and one line for each way that it is not."""

import sys

import pytest

from pmm.adoption.factory import Factory
from pmm.adoption.user_code import CannotAdopt
from pmm.utils.errors import InvalidValue
from tests.refusals import refuses

HERE = "tests.adoption.networks"


def call(text):
    factory = Factory.parse(text)
    with factory.importable():
        return factory()


def test_a_factory_is_called_with_literals():
    assert call(f"{HERE}:Plain").conv.out_channels == 8
    built = call(f"{HERE}:Owner.build(4, classes=9)")
    assert (built.conv.out_channels, built.classifier.out_features) == (4, 9)
    factory = Factory.parse("a.b:C.d((1, 2.5), x=[None, {'k': -1}], y=True)")
    assert (factory.module, factory.name) == ("a.b", "C.d")
    assert (factory.args, factory.kwargs) == (((1, 2.5),), {"x": [None, {"k": -1}], "y": True})


@pytest.mark.parametrize("text", ["my_net_of_a_user:build", "my_net_of_a_user.py:build"])
def test_modules_are_found_in_the_current_folder_and_as_files(text, tmp_path, monkeypatch):
    (tmp_path / "my_net_of_a_user.py").write_text(
        "import helper_of_a_user\ndef build(): return helper_of_a_user.VALUE\n"
    )
    (tmp_path / "helper_of_a_user.py").write_text("VALUE = 'built'\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert call(text) == "built"
    assert sys.path == before
    for name in ("my_net_of_a_user", "helper_of_a_user"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    "text",
    ["model", "model:", ":build", "a b:build", "model:build(", "model:build()()", "model:1", "model:build; x", "a:b:c",
     "model:build(x)", "model:build(**{'a': 1})", "model:build(*[1])", "model:build(open('f'))", "model:[build][0]"],
)  # fmt: skip
def test_what_is_no_factory_with_literals_is_refused_before_code_runs(text):
    with refuses(InvalidValue, name="SOURCE", value=text):
        Factory.parse(text)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("no_such_module:build", ("no_such_module", "PYTHONPATH")),
        (f"{HERE}_of_nobody:build", ("networks_of_nobody",)),
        (f"{HERE}:Plainn", ("Plainn", "Plain")),
        (f"{HERE}:VALUE", ("int", "function")),
        (f"{HERE}:raises('why')", ("KeyError", "why", "networks.py:")),
        (f"{HERE}:exits", ("SystemExit", "networks.py:")),
        (f"{HERE}:Plain(no=1)", ("TypeError", "'no'", "networks.py:")),
    ],
)
def test_a_factory_that_makes_nothing_is_one_line(text, facts):
    with refuses(CannotAdopt, *facts):
        call(text)


@pytest.mark.parametrize(
    ("source", "facts"),
    [
        ("import no_such_library\n", ("no_such_library", "broken_of_a_user.py:1")),
        ("x = 1\ndef build(:\n", ("SyntaxError", "broken_of_a_user.py:2")),
        ("\n1 / 0\n", ("ZeroDivisionError", "broken_of_a_user.py:2")),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_by_its_line(source, facts, tmp_path, monkeypatch):
    (tmp_path / "broken_of_a_user.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with refuses(CannotAdopt, *facts):
        call("broken_of_a_user:build")
