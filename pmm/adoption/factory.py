"""MODULE:FACTORY or MODULE:FACTORY(ARGUMENTS): what makes the user's network, found and called where the user works."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmm.adoption.user_code import CannotAdopt, user_code
from pmm.utils.errors import InvalidValue

EXPECTED = "MODULE:FACTORY or MODULE:FACTORY(ARGUMENTS), as \"timm:create_model('resnet50', num_classes=0)\""
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, kw_only=True)
class Factory:
    """A callable of a module, by name, and its arguments."""

    text: str
    """As it was typed."""
    module: str
    name: str
    folder: Path
    """Where modules are looked for first."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Factory:
        """Of `my_model:build`, `my_package.models:Net.build(3, dropout=0.1)` or `path/my_model.py:build`; no code runs.

        Raises InvalidValue for anything else, and for arguments that are no literals.
        """
        module, colon, call = text.partition(":")
        folder = Path.cwd()
        if module.endswith(".py"):
            folder, module = Path(module).resolve().parent, Path(module).stem
        try:
            tree: ast.expr = ast.parse(call.strip(), mode="eval").body
            function = tree.func if isinstance(tree, ast.Call) else tree
            name = ast.unparse(function)
            if not (colon and _DOTTED.fullmatch(module) and _DOTTED.fullmatch(name)):
                raise ValueError
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise InvalidValue("SOURCE", text, EXPECTED) from None
        args, kwargs = (tree.args, tree.keywords) if isinstance(tree, ast.Call) else ([], [])
        try:
            values = tuple(ast.literal_eval(value) for value in args)
            named = {str(word.arg or ast.unparse(word)): ast.literal_eval(word.value) for word in kwargs if word.arg}
            if len(named) < len(kwargs):
                raise ValueError
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            hint = "write a function without arguments that makes the network, and name that"
            raise InvalidValue("SOURCE", text, "arguments that are numbers, texts, lists, ...", hint=hint) from None
        return cls(text=text, module=module, name=name, folder=folder, args=values, kwargs=named)

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Modules of the user's folder can be imported, as on PYTHONPATH: a network may import more when it runs."""
        sys.path.insert(0, str(self.folder))
        try:
            yield
        finally:
            sys.path.remove(str(self.folder))

    def __call__(self) -> Any:
        """What the factory returns. Raises CannotAdopt if it is not found or raises."""
        function = self._function()
        with user_code(f"{self.text} raises", self._place(function)):
            return function(*self.args, **self.kwargs)

    def _function(self) -> Callable[..., Any]:
        try:
            with user_code(f"{self.module} cannot be imported", passes=ModuleNotFoundError):
                value: Any = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if f"{self.module}.".startswith(f"{missing}."):
                hint = f"expected {missing}.py or an installed package: run this where it is, or set PYTHONPATH"
                raise CannotAdopt(f"no module {missing} in {self.folder} or on PYTHONPATH", hint=hint) from error
            with user_code(f"{self.module} cannot be imported"):
                raise
        for word in self.name.split("."):
            if not hasattr(value, word):
                names = ", ".join(name for name, each in vars(value).items() if callable(each) and name[0] != "_")
                raise CannotAdopt(f"{self.module} has no {self.name}", expected=f"one of {names[:200]}")
            value = getattr(value, word)
        if not callable(value):
            raise CannotAdopt(
                f"{self.module}:{self.name} is of type {type(value).__name__}", expected="a function or a class"
            )
        return value

    @staticmethod
    def _place(function: Callable[..., Any]) -> str:
        """Where `function` is written, for errors of the call itself."""
        code = getattr(function, "__code__", None) or getattr(getattr(function, "__init__", None), "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code else ""
