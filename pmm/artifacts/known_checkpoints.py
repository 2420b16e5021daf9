"""Checkpoints of other code bases, known by the names of their weights: those that can be imported, and what to do with
others.

BDB is the Batch DropBlock Network (Dai et al., ICCV 2019), on which the PMM authors' code is built; both save
`{"state_dict": ..., "epoch": ...}`. Loads no torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
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
    ("an OSNet-AIN checkpoint of torchreid", (r"conv2\.0\.conv2\.0\.layers\.",)),
    ("an MLFN checkpoint of torchreid", (r"feature\.0\.fm_conv1\.", r"fc_s\.")),
    ("a HACNN checkpoint of torchreid", (r"classifier_global\.", r"classifier_local\.")),
    ("a MobileNetV2 checkpoint of torchreid", (r"conv1\.conv\.", r"conv9\.conv\.")),
    ("a torchreid checkpoint", (r"layer4\.", r"classifier\.")),
    ("a ResNet-152", (r"conv1\.weight$", r"layer3\.35\.conv3\.")),
    ("a ResNet-101", (r"conv1\.weight$", r"layer3\.22\.conv3\.")),
    ("a ResNet-50", (r"conv1\.weight$", r"layer3\.5\.conv3\.")),
)

OSNETS = {64: "x1_0", 48: "x0_75", 32: "x0_5", 16: "x0_25"}
"""Channels of the first convolution of an OSNet -> end of its name in torchreid."""
TORCHREID = (
    "densenet121", "densenet121_fc512", "densenet161", "densenet169", "densenet201", "hacnn", "inceptionresnetv2",
    "inceptionv4", "mlfn", "mobilenetv2_x1_0", "mobilenetv2_x1_4", "mudeep", "nasnsetmobile", "osnet_ain_x0_25",
    "osnet_ain_x0_5", "osnet_ain_x0_75", "osnet_ain_x1_0", "osnet_ibn_x1_0", "osnet_x0_25", "osnet_x0_5",
    "osnet_x0_75", "osnet_x1_0", "pcb_p4", "pcb_p6", "resnet101", "resnet152", "resnet18", "resnet34", "resnet50",
    "resnet50_fc512", "resnet50_ibn_a", "resnet50_ibn_b", "resnet50mid", "resnext101_32x8d", "resnext50_32x4d",
    "se_resnet101", "se_resnet50", "se_resnet50_fc512", "se_resnext101_32x4d", "se_resnext50_32x4d", "shufflenet",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "squeezenet1_0",
    "squeezenet1_0_fc512", "squeezenet1_1", "xception",
)  # fmt: skip
"""Its networks, by which its files and those of BoxMOT are named: osnet_x1_0_msmt17.pt."""
BOXMOT = "--no-antialias --metric cosine"
"""BoxMOT resizes with OpenCV and compares by cosine. Its files end in .pt; some of torchreid's users name theirs so."""
_SIZES = {"hacnn": (160, 64), "inception": (299, 299), "xception": (299, 299), "nasnsetmobile": (224, 224)}
_IMAGES = (
    # name, height and width, and what its own code normalises by
    (r"a fast-reid", "--height 256 --width 128 --scale 1 --mean 0 0 0 --std 1 1 1"),  # its network does that itself
    (r"a TransReID", "--height 256 --width 128 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"),
)


def known_method(content: Any) -> str | None:
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


def describe_known(content: Any, path: str | Path = "FILE", out: Path | None = None) -> str | None:
    """`what it is; what to do with it` for a checkpoint of another known code base; None for all others.

    Args:
        path: of the file that holds it.
        out: file to write, for the command that adopts its network (default: beside it).
    """
    name, keys = name_of(content), state_dict_of(content)
    if name is None:
        return None
    if name == _PMM_WEIGHTS:
        return f"{name}; give the checkpoint that they come from, as it is"
    adopt = f"as it is, it can be adopted: {proposed_adoption(content, path, out)}"
    if not _any_match(keys, r".*layer4\."):
        return f"{name}; {adopt}"
    if not _any_match(keys, r".*layer3\.5\.conv3\.") or _any_match(keys, r".*(layer3\.6|\.se)\."):
        train = "if timm has it, a training can start from it (pmm train --init FILE --backbone timm:NAME)"
        return f"{name}; its network is none of pmm's, but {train}; {adopt}"
    backbone = " --backbone resnet50-ibn-a" if _any_match(keys, r".*\.bn1\.IN\.") else ""
    return f"{name}; a training can start from its backbone (pmm train --init FILE{backbone}); {adopt}"


def proposed_adoption(content: Any, path: str | Path, out: Path | None = None) -> str:
    """`adoption_command`, and the assumptions in it that the user may have to drop."""
    command = adoption_command(content, path, out)
    return command + f" ({BOXMOT} as BoxMOT uses it: without them as torchreid does)" * (BOXMOT in command)


def adoption_command(content: Any, path: str | Path, out: Path | None = None) -> str:
    """The command that adopts the network of the file `path`, which holds `content`, as `out`: whole where torchreid
    has the network, else with the names that its user has to put in."""
    name, keys, file = name_of(content) or "", state_dict_of(content), shlex.quote(str(path))
    to = shlex.quote(str(out or Path(path).with_name("adopted.pth")))
    network = _network_of_torchreid(name, keys, Path(path).name)
    if not network:
        flags = next((flags for start, flags in _IMAGES if name.startswith(start)), "--height 256 --width 128")
        return f"pmm adopt MODULE:FACTORY --weights {file} {flags} -o {to}"
    classifiers = [value for key, value in keys.items() if re.fullmatch(r"classifier\w*(\.0)?\.weight", key)]
    classes = next((value.shape[0] for value in classifiers if getattr(value, "shape", ())), 1)
    gpu = ", use_gpu=False" if network == "hacnn" else ""  # which else asks for one
    call = f"torchreid.reid.models:build_model('{network}', num_classes={classes}, pretrained=False{gpu})"
    sides = next((sides for start, sides in _SIZES.items() if network.startswith(start)), (256, 128))
    if stated := re.search(r"_(\d+)x(\d+)_", Path(path).name):
        sides = (int(stated[1]), int(stated[2]))
    flags = f"--height {sides[0]} --width {sides[1]}" + f" {BOXMOT}" * (Path(path).suffix == ".pt")
    return f'pmm adopt "{call}" --weights {file} {flags} -o {to}'


def _network_of_torchreid(name: str, keys: Mapping[str, Any], file: str) -> str:
    """As torchreid calls the network, by its weights or by the name of the file; empty if they are of another code."""
    first = keys.get("conv1.conv.weight")
    channels = next(iter(getattr(first, "shape", ())), 0)
    if name.startswith("an OSNet") and channels in OSNETS:
        kind = "ain_" if "AIN" in name else "ibn_" if _any_match(keys, r"conv2\.0\.IN\.") else ""
        return f"osnet_{kind}{OSNETS[channels]}"
    if name.startswith("a MobileNetV2"):
        return "mobilenetv2_x1_4" if channels == 44 else "mobilenetv2_x1_0"
    for word in ("MLFN", "HACNN"):
        if word in name:
            return word.lower()
    named = [each for each in TORCHREID if re.match(rf"{each}(?![a-z0-9])", file.lower())]
    return max(named, key=len, default="") if _any_match(keys, r"classifier") else ""


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
