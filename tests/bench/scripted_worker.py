"""Answers as the bench's workers do, with neither torch nor a runner; asked for a turn, it goes on for ever.

PMM_SCRIPTED names a folder: what is to be said of the checkpoint is in its checkpoint.json, and a file is left there
per process (its number) and when a turn begins (`turn`).
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ["PMM_SCRIPTED"])


def answer(do: str, given: dict) -> object:
    if do == "describe":
        return json.loads((FOLDER / "checkpoint.json").read_text())
    if do == "open":
        return {"provider": "a script", "device": "cpu", "load_s": 0.1, "first_inference_s": 0.1, "dim": 8,
                "normalised": False, "flip_tta": False}  # fmt: skip
    if do == "embed":
        count = len(json.loads(Path(given["paths"]).read_text()))
        np.save(given["out"], np.random.default_rng(0).standard_normal((count, 8)).astype(np.float32))
        return None
    same = {"least_cosine": 1.0, "length_error": 0.0}
    if do == "turn":
        (FOLDER / "turn").touch()
        time.sleep(600)
    return same | ({"warmup_s": 0.1, "steady": True, "run_ms": 1.0} if do == "bind" else {})


if __name__ == "__main__":
    (FOLDER / str(os.getpid())).touch()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"answer": answer(request["do"], request["with"])}), flush=True)
