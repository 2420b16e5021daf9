"""Checkpoints of other code bases, known by the names of their weights: those that can be imported, and some more.

BDB is the Batch DropBlock Network (Dai et al., ICCV 2019), on which the PMM authors' code is built; both save
`{"state_dict": ..., "epoch": ...}`. Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

CODE = {"pmm": "the PMM authors' code", "bdb": "the BDB code"}
"""Method -> who writes such checkpoints."""
SHARED = {
    "backbone.0.": "backbone.trunk.conv1.",
    "backbone.1.": "backbone.trunk.bn1.",
    "backbone.4.": "backbone.trunk.layer1.",
    "backbone.5.": "backbone.trunk.layer2.",
    "backbone.6.": "backbone.trunk.layer3.",
    "res_part.": "backbone.layer4.",
    "global_reduction.0.": "stages.0.reduction.",
    "global_reduction.1.": "stages.0.bn.",
    "global_softmax.": "stages.0.classifier.",
    "res_part2.": "bottleneck.",
}
"""Prefix of the authors' keys -> of pmm's, in every method."""


def _branch(number: str, stage: int) -> dict[str, str]:
    prefix = f"stages.{stage}."
    return {
        f"reduction{number}.0.": f"{prefix}reduction.",
        f"reduction{number}.1.": f"{prefix}bn.",
        f"softmax{number}.": f"{prefix}classifier.",
    }


BRANCHES = {"pmm": _branch("1", 1) | _branch("2", 2), "bdb": _branch("", 1)}
"""Method -> the further prefixes."""
_PMM_WEIGHTS = "the bare weights of a PMM model"
FAST_REID = "a fast-reid checkpoint"
_FOREIGN = (
    # name, patterns that some key matches each
    (_PMM_WEIGHTS, (r"backbone\.trunk\.", r"stages\.0\.")),
    (FAST_REID, (r"(heads|b1_head)\.|pixel_mean$",)),
    ("a TransReID or CLIP-ReID checkpoint", (r"base\.(blocks|cls_token|patch_embed)|image_encoder\.",)),
    ("a checkpoint of reid-strong-baseline", (r"base\.layer4\.", r"(classifier|bottleneck)\.")),
    ("a MoCo checkpoint", (r"encoder_q\.",)),
    ("an OSNet checkpoint of torchreid", (r"conv2\.0\.conv2a\.",)),
    ("a torchreid checkpoint", (r"layer4\.", r"classifier\.")),
    ("a ResNet-152", (r"conv1\.weight$", r"layer3\.35\.conv3\.")),
    ("a ResNet-101", (r"conv1\.weight$", r"layer3\.22\.conv3\.")),
    ("a ResNet-50", (r"conv1\.weight$", r"layer3\.5\.conv3\.")),
)


def method_of(content: Any) -> str | None:
    """The method whose weights `content`, as torch.load returns it, holds by the authors' names; else None."""
    keys = state_dict_of(content)
    if not _any_match(keys, r"(res_part2?|global_reduction|global_softmax)\."):
        return None
    return max(BRANCHES, key=lambda method: sum(key.startswith(tuple(BRANCHES[method])) for key in keys))


def name_of(content: Any) -> str | None:
    """What a checkpoint of another known code base is; None for all others."""
    keys = state_dict_of(content)
    fits = (name for name, patterns in _FOREIGN if all(_any_match(keys, pattern) for pattern in patterns))
    return next(fits, None)


def describe(content: Any) -> str | None:
    """`what it is; what to do with it` for a checkpoint of another known code base; None for all others."""
    name, keys = name_of(content), state_dict_of(content)
    if name is None:
        return None
    if name == _PMM_WEIGHTS:
        return f"{name}; give the checkpoint that they come from, as it is"
    if not _any_match(keys, r".*layer4\."):
        return f"{name}; its network is none of pmm's: train one (pmm train)"
    if not _any_match(keys, r".*layer3\.5\.conv3\.") or _any_match(keys, r".*(layer3\.6|\.se)\."):
        command = "pmm train --init FILE --backbone timm:NAME"
        return f"{name}; its network is none of pmm's, but if timm has it, a training can start from it ({command})"
    backbone = " --backbone resnet50-ibn-a" if _any_match(keys, r".*\.bn1\.IN\.") else ""
    return f"{name}; a training can start from its backbone (pmm train --init FILE{backbone})"


def state_dict_of(content: Any) -> dict[str, Any]:
    """The state dict in `content`, bare or below a key, without DataParallel's prefix; empty if there is none."""
    if not isinstance(content, Mapping):
        return {}
    inner = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), content)
    if not all(isinstance(key, str) for key in inner):
        return {}
    prefix = "module." if inner and all(key.startswith("module.") for key in inner) else ""
    return {key.removeprefix(prefix): value for key, value in inner.items()}


def _any_match(keys: Iterable[str], pattern: str) -> bool:
    return any(re.match(pattern, key) for key in keys)
