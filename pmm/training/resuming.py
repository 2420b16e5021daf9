"""What an interrupted run left in its folder: last.pth, from which it goes on, and the best model so far."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pmm.artifacts import checkpoint
from pmm.artifacts.run_folder import BEST, LAST
from pmm.config import Config
from pmm.training.data_setup import check_unchanged
from pmm.training.flags import saved_config
from pmm.utils.errors import UserError


def load_last(out: Path, config: Config, *, extend: bool) -> dict[str, Any]:
    """last.pth of the run in `out`, which goes on as `config` says.

    Raises UserError if it cannot be read, or is of another configuration; with `extend` it may have fewer epochs.
    """
    saved = checkpoint.load(out / LAST)
    before, epochs = Config.from_dict(saved["config"]), config.recipe.epochs
    if before.recipe.epochs != epochs:  # extended, and ended before its first save, it is so in config.json alone
        extend = extend or saved_config(out).recipe.epochs == epochs
    check_unchanged(out, before, config, extend=extend)
    return saved


def best_so_far(saved: dict[str, Any], out: Path, config: Config) -> float:
    """The best mAP on held-out identities of the run in `out`, whose last.pth is `saved`.

    A run that was killed may have left a best.pth of an epoch that last.pth does not know of: no worse model replaces
    it while those epochs are repeated. A best.pth that cannot be read, or is of another run, counts for nothing.
    """
    with contextlib.suppress(UserError):
        found = checkpoint.load(out / BEST)
        check_unchanged(out, Config.from_dict(found["config"]), config, extend=True)
        same_start = found["versions"].get("init") == saved["versions"].get("init")
        if same_start and found["epoch"] > saved["epoch"]:
            return max(saved["best"], found["best"])
    return float(saved["best"])
