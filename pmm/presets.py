"""The presets: named sets of the defaults of `pmm.config`. Loads no torch."""

from __future__ import annotations

import dataclasses

from pmm.config import Config, DataConfig, ModelConfig, RecipeConfig
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


def preset(name: str) -> Config:
    """The named preset. Raises InvalidValue naming the known ones."""
    if name not in PRESETS:
        raise InvalidValue("preset", name, choices=PRESETS)
    return PRESETS[name]
