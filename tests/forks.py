"""Processes of their own that need not load torch: forked from one that has done that, and has loaded nothing of ours.

There is one such process for all of them, and this file imports nothing of ours either: a command that `run_forked`
runs takes all of that from where it runs.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "onnxscript"])


def run_forked(words: list[str], folder: Path, env: dict[str, str], log: Path) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in `folder`, which is where `env` looks for packages too; its output passes through `log`."""
    process = FORKS.Process(target=_run, args=(words, folder, env, log))
    process.start()
    process.join()
    code = process.exitcode
    return subprocess.CompletedProcess(words, -1 if code is None else code, log.read_text(), "")


def _run(words: list[str], folder: Path, env: dict[str, str], log: Path) -> None:
    assert "pmm" not in sys.modules
    multiprocessing.set_start_method(None, force=True)  # the default again
    number = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.environ |= env
    os.chdir(folder)
    module = words[0] == "-m"
    sys.argv = words[module:]
    begin = folder if module else (folder / words[0]).parent
    here = Path(__file__).resolve().parents[1]
    sys.path[:] = [str(begin), str(folder), *(path for path in sys.path if path and Path(path).resolve() != here)]
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
