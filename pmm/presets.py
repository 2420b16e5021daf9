"""The presets: named sets of the defaults of `pmm.config`. Loads no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from pmm.config import Config, DataConfig, ModelConfig
from pmm.recipe import RecipeConfig
from pmm.utils.errors import InvalidValue

PRESETS: dict[str, Config] = {
    "paper": Config(),
    "tiny": Config(
        preset="tiny",
        data=DataConfig(height=128, width=64, val_identities=0.1, workers=1),
        model=ModelConfig(backbone="resnet10", feature_dim=128, block=(1, 1)),
        recipe=RecipeConfig(
            epochs=60,
            batch_size=32,
            schedule="flat-cosine",
            lr=5e-3,
            warmup=0.22,
            shift=4,
            cutout_size=(32, 21),
            val_every=4,
        ),
    ),
}
PRESETS |= {
    "strong": dataclasses.replace(
        PRESETS["paper"],
        preset="strong",
        model=dataclasses.replace(PRESETS["paper"].model, neck="bn", metric="cosine"),
        recipe=RecipeConfig(
            epochs=120,
            batch_size=64,
            schedule="flat-cosine",
            lr=3.5e-4,
            warmup=1 / 12,
            flat=1 / 12,
            shift=10,
        ),
    ),
    "tiny-strong": dataclasses.replace(
        PRESETS["tiny"],
        preset="tiny-strong",
        model=dataclasses.replace(PRESETS["tiny"].model, neck="bn", metric="cosine"),
        recipe=dataclasses.replace(PRESETS["tiny"].recipe, flat=PRESETS["tiny"].recipe.warmup),
    ),
}


_WITHOUT_TRIPLET_LOSS: dict[str, Any] = {"model.metric": "cosine", "model.neck": "none", "recipe.label_smoothing": 0.0}
"""Values of methods without a triplet loss, whose embeddings have norm 1."""
_PCB = {
    "": {**_WITHOUT_TRIPLET_LOSS, "model.feature_dim": 256},
    # a network as small as this one is not too sure of itself: with dropout it learns less (mAP 70 for 84 %, one seed)
    "tiny": {"model.feature_dim": 64, "model.parts": 4, "model.dropout": 0.0},
    "paper": {
        "recipe.sampler": "shuffle",
        "recipe.optimizer": "nesterov",
        "recipe.batch_size": 64,
        "recipe.schedule": "milestones",
        "recipe.lr": 0.1,
        "recipe.backbone_lr": 0.1,
        "recipe.warmup": 0.0,
        "recipe.cutout": 0.0,
    },
}

METHOD_VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "pcb": {**_PCB, "paper": {**_PCB["paper"], "recipe.epochs": 60, "recipe.milestones": (2 / 3,)}},
    "pcb-rpp": {**_PCB, "paper": {**_PCB["paper"], "recipe.epochs": 50}},
    "aos": {
        # else a window would not lie where it was tried
        "": {**_WITHOUT_TRIPLET_LOSS, "recipe.cutout": 0.0, "recipe.shift": 0},
        "tiny": {"model.neck": "bn", "model.dropout": 0.0},
        "paper": {
            "data.height": 256,
            "model.last_stride": 2,
            "recipe.epochs": 120,
            "recipe.sampler": "shuffle",
            "recipe.optimizer": "sgd",
            "recipe.batch_size": 32,
            "recipe.schedule": "milestones",
            "recipe.lr": 0.02,
            "recipe.backbone_lr": 0.5,
            "recipe.warmup": 0.0,
            "recipe.milestones": (25 / 60, 50 / 60),
        },
    },
    "cama": {
        "": {**_WITHOUT_TRIPLET_LOSS, "model.neck": "bn"},
        "paper": {
            "data.height": 256,
            "recipe.epochs": 70,
            "recipe.sampler": "shuffle",
            "recipe.batch_size": 64,
            "recipe.schedule": "milestones",
            "recipe.lr": 3.5e-4,
            "recipe.warmup": 10 / 70,
            "recipe.milestones": (40 / 70, 60 / 70),
            "recipe.shift": 10,
            "recipe.cutout": 0.0,
        },
    },
}
"""Method -> values that it has in every preset (""), in those for CPUs ("tiny") and in `paper`, its own recipe."""


def preset(name: str, method: str = "") -> Config:
    """The named preset, as `method` has it (default: its own). Raises InvalidValue naming the known presets.

    Examples:
        >>> preset("paper", "pcb").recipe.optimizer
        'nesterov'
    """
    if name not in PRESETS:
        raise InvalidValue("preset", name, choices=PRESETS)
    return with_method(PRESETS[name], method) if method else PRESETS[name]


def with_method(config: Config, method: str) -> Config:
    """`config` with `method`, and with the values that the preset of `config` has for that method alone."""
    values = METHOD_VALUES.get(method, {})
    kind = "tiny" if config.preset.startswith("tiny") else config.preset
    own = {**values.get("", {}), **values.get(kind, {}), "model.method": method}
    for section in ("data", "model", "recipe"):
        of_section = {key.removeprefix(f"{section}."): own[key] for key in own if key.startswith(f"{section}.")}
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **of_section)})
    return config
