"""Who a synthetic person is: a handful of independent visual clues, and how identities of one data set are sampled.

Real re-identification is hard because people look alike, not because pictures are noisy. So many identities are
near-copies of another one, and no two identities of a data set may look the same from every side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

RGB = tuple[int, int, int]

# One palette for every garment: a trouser colour of one person is the shirt colour of the next, so a colour histogram
# of the whole crop does not tell them apart.
PALETTE: dict[str, RGB] = {
    "black": (44, 44, 50),
    "white": (238, 236, 230),
    "grey": (144, 148, 154),
    "red": (202, 54, 52),
    "yellow": (240, 196, 62),
    "green": (60, 142, 86),
    "sky": (98, 172, 222),
    "navy": (44, 66, 128),
    "purple": (138, 84, 164),
    "brown": (128, 88, 58),
}
SKIN: dict[str, RGB] = {"pale": (246, 212, 186), "tan": (222, 174, 134), "brown": (166, 114, 78), "dark": (98, 66, 48)}
HAIR: dict[str, RGB] = {
    "black": (34, 30, 32),
    "brown": (96, 62, 40),
    "blond": (224, 186, 108),
    "red": (170, 78, 40),
    "grey": (178, 178, 180),
}

COLOURS = tuple(PALETTE)
PATTERNS = ("plain", "horizontal", "vertical", "check", "dots", "diagonal", "yoke", "logo")
SLEEVES = ("long", "short", "none")
LOWER_KINDS = ("trousers", "shorts", "skirt")
HAIR_STYLES = ("short", "long", "bun")
# "none" more than once: most people wear no hat, many carry no bag.
BAGS = ("none", "none", "back", "left", "right")
HATS = ("none", "none", "none", "cap", "beanie")
BUILDS = ("slim", "regular", "broad")

COPY_PROBABILITY = 0.4
REDRAWN_CLUES = 3

Choice = TypeVar("Choice")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The clues of one person. Colours are names of `PALETTE`, `SKIN` or `HAIR`."""

    upper: str
    second: str
    """Colour of the pattern on the upper garment; not seen on a plain one."""
    pattern: str
    """One of `PATTERNS`; "logo" is seen from the front only, "yoke" colours the shoulders."""
    sleeves: str
    lower_kind: str
    lower: str
    lower_striped: bool
    shoes: str
    hair: str
    hair_style: str
    skin: str
    bag: str
    """none, back (a backpack), or a shoulder bag at the person's own left or right hip."""
    bag_colour: str
    hat: str
    hat_colour: str
    build: str

    @property
    def appearance(self) -> tuple[Any, ...]:
        """What can be seen: every clue, with colours of things not worn left out. Equal appearance = same look."""
        return (
            self.upper,
            None if self.pattern == "plain" else self.second,
            self.pattern,
            self.sleeves,
            self.lower_kind,
            self.lower,
            self.lower_striped,
            self.shoes,
            # A beanie hides the bun and makes it short hair.
            "short" if (self.hat, self.hair_style) == ("beanie", "bun") else self.hair_style,
            self.hair,
            self.skin,
            self.bag,
            None if self.bag == "none" else self.bag_colour,
            self.hat,
            None if self.hat == "none" else self.hat_colour,
            self.build,
        )


# What is redrawn together when an identity is made from another one: 12 clues, each of which can be seen by itself.
CLUES: tuple[tuple[str, ...], ...] = (
    ("upper",),
    ("pattern", "second"),
    ("sleeves",),
    ("lower_kind",),
    ("lower",),
    ("lower_striped",),
    ("shoes",),
    ("hair", "hair_style"),
    ("skin",),
    ("bag", "bag_colour"),
    ("hat", "hat_colour"),
    ("build",),
)


def sample_identities(rng: np.random.Generator, n: int, forbidden: Iterable[Identity] = ()) -> list[Identity]:
    """Draw `n` identities whose appearances differ from each other and from every one in `forbidden`.

    With probability 0.4 an identity copies an earlier one of the list, changes 3 of its clues, and half the time swaps
    the colours of upper and lower garment: the same colours at the same sizes, in other places.
    """
    seen = {identity.appearance for identity in forbidden}
    identities: list[Identity] = []
    while len(identities) < n:
        if identities and rng.random() < COPY_PROBABILITY:
            candidate = _near_copy(identities[int(rng.integers(len(identities)))], rng)
        else:
            candidate = _random_identity(rng)
        if candidate.appearance not in seen:
            seen.add(candidate.appearance)
            identities.append(candidate)
    return identities


def _random_identity(rng: np.random.Generator) -> Identity:
    return _with_distinct_second(
        Identity(
            upper=_pick(rng, COLOURS),
            second=_pick(rng, COLOURS),
            pattern=_pick(rng, PATTERNS),
            sleeves=_pick(rng, SLEEVES),
            lower_kind=_pick(rng, LOWER_KINDS),
            lower=_pick(rng, COLOURS),
            lower_striped=bool(rng.random() < 0.3),
            shoes=_pick(rng, COLOURS),
            hair=_pick(rng, tuple(HAIR)),
            hair_style=_pick(rng, HAIR_STYLES),
            skin=_pick(rng, tuple(SKIN)),
            bag=_pick(rng, BAGS),
            bag_colour=_pick(rng, COLOURS),
            hat=_pick(rng, HATS),
            hat_colour=_pick(rng, COLOURS),
            build=_pick(rng, BUILDS),
        ),
        rng,
    )


def _near_copy(original: Identity, rng: np.random.Generator) -> Identity:
    copy = original
    for clue in rng.choice(len(CLUES), size=REDRAWN_CLUES, replace=False):
        changed = copy
        # Until it shows: a new bag colour for somebody without a bag is no change.
        while changed.appearance == copy.appearance:
            other = _random_identity(rng)
            changed = replace(copy, **{name: getattr(other, name) for name in CLUES[clue]})
            changed = _with_distinct_second(changed, rng)
        copy = changed
    if rng.random() < 0.5:
        copy = _with_distinct_second(replace(copy, upper=copy.lower, lower=copy.upper), rng)
    return copy


def _with_distinct_second(identity: Identity, rng: np.random.Generator) -> Identity:
    if identity.second != identity.upper:
        return identity
    others = tuple(colour for colour in COLOURS if colour != identity.upper)
    return replace(identity, second=_pick(rng, others))


def _pick(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
    return choices[int(rng.integers(len(choices)))]
