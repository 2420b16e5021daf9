"""Answers as the bench's workers do, with neither torch nor a runner; a turn never ends.

PMM_SCRIPTED names a folder: the answer about the checkpoint is in its checkpoint.json, and a file is left there per
process (its number) and when a turn begins (`turn`).
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ["PMM_SCRIPTED"])


def answer(method: str, arguments: dict) -> object:
    if method == "describe":
        return json.loads((FOLDER / "checkpoint.json").read_text())
    if method == "open":
        return {"provider": "a script", "device": "cpu", "load_s": 0.1, "first_inference_s": 0.1, "dim": 8,
                "normalised": False, "flip_tta": False}  # fmt: skip
    if method == "embed":
        count = len(json.loads(Path(arguments["paths"]).read_text()))
        np.save(arguments["out"], np.random.default_rng(0).standard_normal((count, 8)).astype(np.float32))
        return None
    same = {"min_cosine": 1.0, "norm_error": 0.0}
    if method == "turn":
        (FOLDER / "turn").touch()
        time.sleep(600)
    return same | ({"warmup_s": 0.1, "steady": True, "run_ms": 1.0} if method == "bind" else {})


if __name__ == "__main__":
    (FOLDER / str(os.getpid())).touch()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"answer": answer(request["method"], request["arguments"])}), flush=True)
