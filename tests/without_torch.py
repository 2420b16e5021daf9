"""Commands, one after another, in one process where torch cannot be imported: a start of Python for all of them."""

import json
import subprocess
from pathlib import Path

from tests.conftest import run_python

RUN_ALL = """
import contextlib, io, json, runpy, sys, traceback

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision"):
            raise KIND("no torch here")

sys.meta_path.insert(0, NoTorch())
sys.path.insert(0, "")
results = []
for command in json.loads(sys.argv[1]):
    module = command[0] == "-m"
    sys.argv = command[module:]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if module:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            code = traceback.print_exc() or 1
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def run_all_without_torch(
    *commands: tuple[str | Path, ...], kind: type[Exception] = ImportError
) -> list[subprocess.CompletedProcess[str]]:
    """Each of `commands` as `run_without_torch` runs it; an attempt to import torch raises `kind`."""
    words = [[str(word) for word in command] for command in commands]
    done = run_python("-c", RUN_ALL.replace("KIND", kind.__name__), json.dumps(words))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    return [subprocess.CompletedProcess(command, *result) for command, result in zip(words, results, strict=True)]
