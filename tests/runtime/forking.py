"""python tests/runtime/forking.py BACKEND ARTIFACT: what happens to a runner in forked children, a JSON line for each.

`said` is what the child found, `code` how it ended; one that hangs is ended by SIGALRM.
"""

import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pmm.runtime.base import Runner
from pmm.runtime.open import open_runner
from pmm.utils.errors import UserError

PATIENCE = 60  # seconds
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 128, 64, 3), np.uint8)


def opened() -> Runner:
    if sys.argv[1] == "openvino":
        from pmm.runtime.openvino import OpenVinoRunner

        return OpenVinoRunner(Path(sys.argv[2]), threads=2)
    return open_runner(sys.argv[2], device="cpu", threads=2)


def forked(name: str, work: Callable[[], object], leave: Callable[[int], object] = os._exit) -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(PATIENCE)
        os.write(write, json.dumps(work()).encode())
        leave(7)
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"name": name, "said": said and json.loads(said), "code": code}), flush=True)


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return "it ran"


def main() -> None:
    held: list[Any] = [opened()]
    held.append(held[0].bind(IMAGES[:2]))

    def inherited() -> list[str]:
        """Use all of it, and let go of it."""
        said = [refusal(lambda: held[0](IMAGES)), refusal(lambda: held[0].bind(IMAGES)), refusal(held[1])]
        with held[0]:
            held.clear()
        gc.collect()
        return said

    def anew() -> bool:
        with opened() as own:
            return np.array_equal(own(IMAGES), expected)

    forked("inherited before it ran", inherited)
    expected = held[0](IMAGES)
    held[1]()
    thread = threading.Thread(target=held[0], args=[IMAGES])  # another one has run it, and is gone
    thread.start()
    thread.join()
    forked("inherited", inherited, sys.exit)
    forked("anew", anew, sys.exit)
    forked("anew in a child's child", lambda: forked("anew in a child", anew))
    assert np.array_equal(held[0](IMAGES), expected)
    held[0].close()
    held.clear()
    gc.collect()
    forked("anew after the parent's is closed", anew)


main()
