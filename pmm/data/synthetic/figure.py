"""Draws a person: a small 3-D skeleton turned to the wanted side, dressed in the clues of an `Identity`.

A body is measured in its own height: x to the person's left, y up from the soles, z forward. Turning it by the azimuth
decides what is seen: a logo from the front only, a backpack from behind (its straps from the front), a bag at the left
hip hardly from the right. Parts are painted from far to near.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from pmm.data.synthetic.brush import Brush, Point, contrast, pairs, shade, weave
from pmm.data.synthetic.identity import HAIR, PALETTE, RGB, SKIN, Identity

TILT = 0.2
"""Cameras look slightly down: one unit nearer to the camera is this much lower in the picture."""

_BUILD = {"slim": 0.86, "regular": 1.0, "broad": 1.18}
# Light from above left: bright inside, dark rims, so flat colours look round.
_ROUND = [round(255 * min(1.0, 0.62 + 0.46 * level / 255)) for level in range(256)]


@dataclass(frozen=True, kw_only=True)
class Pose:
    """One moment of a walk."""

    phase: float
    """Where in the step, in radians."""
    stride: float
    """Largest angle of a leg from upright, in radians."""
    swing: float
    """Largest angle of an arm, in radians."""


def sample_pose(rng: np.random.Generator) -> Pose:
    """Draw a moment of an easy walk."""
    return Pose(
        phase=float(rng.uniform(0, 2 * math.pi)),
        stride=float(rng.uniform(0.08, 0.5)),
        swing=float(rng.uniform(0.1, 0.55)),
    )


def draw_person(
    scene: Image.Image, identity: Identity, *, azimuth: float, foot: Point, height: float, pose: Pose
) -> None:
    """Paint a person into `scene` (RGB): feet at pixel `foot`, `height` pixels tall, seen from `azimuth` degrees."""
    u, v = foot
    shadow = Image.new("L", (round(0.4 * height), round(0.06 * height)), 0)
    ImageDraw.Draw(shadow).ellipse((0, 0, shadow.width - 1, shadow.height - 1), fill=90)
    scene.paste((20, 20, 24), (round(u - 0.21 * height), round(v - 0.035 * height)), shadow)

    # On a layer of its own: where the layer is opaque is the person, which is what shading needs.
    layer = Image.new("RGBA", scene.size, (0, 0, 0, 0))
    _Figure(layer, identity, math.radians(azimuth), foot, height, pose).paint()
    opaque = layer.getchannel("A")
    rims = opaque.reduce(2).filter(ImageFilter.BoxBlur(max(1.0, 0.014 * height)))
    rims = ImageChops.offset(rims, round(0.008 * height), round(0.005 * height)).point(_ROUND)
    rims = rims.resize(scene.size, Image.Resampling.BILINEAR)
    shaded = ImageChops.multiply(layer.convert("RGB"), Image.merge("RGB", (rims, rims, rims)))
    scene.paste(shaded, (0, 0), opaque)


class _Figure:
    """One person on one RGBA layer."""

    def __init__(
        self, layer: Image.Image, identity: Identity, azimuth: float, foot: Point, height: float, pose: Pose
    ) -> None:
        self.who = identity
        self.foot = foot
        self.height = height
        self.pose = pose
        self.sin = math.sin(azimuth)
        self.cos = math.cos(azimuth)
        self.build = _BUILD[identity.build]
        self.upper = PALETTE[identity.upper]
        self.lower = PALETTE[identity.lower]
        self.skin = SKIN[identity.skin]
        self.hair = HAIR[identity.hair]
        second, chest = PALETTE[identity.second], self.at(0, 0.66, 0)
        cloth = weave(layer.size, identity.pattern, self.upper, second, chest, 0.034 * height)
        self.brush = Brush(layer, cloth, height)
        self.draw = self.brush.draw

    def paint(self) -> None:
        """Paint all parts, far ones first. A part's key is roughly how near to the camera it is."""
        parts: list[tuple[float, Callable[[], None]]] = [
            (-0.005, self._hips),
            (0.0, self._torso),
            (0.004, self._front_details),
            (0.012, self._head),
            (0.13, self._hat),
            (-0.12 * self.cos, self._hair_behind),
        ]
        for side in (1, -1):
            near = -side * self.sin
            parts.append((-0.02 + 0.01 * near, partial(self._leg, side)))
            parts.append((0.02 + 0.15 * near, partial(self._arm, side)))
        if self.who.bag == "back":
            parts.append((-0.11 * self.cos - 0.001, self._backpack))
        elif self.who.bag != "none":
            side = 1 if self.who.bag == "left" else -1
            parts.append((0.03 - 0.17 * side * self.sin, partial(self._shoulder_bag, side)))
            parts.append((0.006, partial(self._shoulder_strap, side)))
        for _, paint in sorted(parts, key=lambda part: part[0]):
            paint()

    # Geometry

    def at(self, x: float, y: float, z: float) -> Point:
        """Pixel of a point of the body."""
        across = x * self.cos + z * self.sin
        near = z * self.cos - x * self.sin
        return self.foot[0] + across * self.height, self.foot[1] - (y - TILT * near) * self.height

    def half(self, x: float, z: float) -> float:
        """Half the seen width of an elliptic section of the body with half axes x and z."""
        return math.hypot(x * self.cos, z * self.sin)

    # The body

    def _leg(self, side: int) -> None:
        lift = self.pose.stride * math.sin(self.pose.phase) * side
        bend = max(0.0, -lift) * 0.9 + 0.06
        x = 0.052 * self.build * side
        hip = (x, 0.47, 0.0)
        knee = (x, 0.47 - 0.215 * math.cos(lift), 0.215 * math.sin(lift))
        shin = lift - bend
        ankle = (x, max(0.04, knee[1] - 0.215 * math.cos(shin)), knee[2] + 0.215 * math.sin(shin))
        dressed = self.who.lower_kind == "trousers"
        thick = 0.5 + 0.5 * self.build
        wide = [thick * radius for radius in ((0.056, 0.044, 0.034) if dressed else (0.048, 0.036, 0.024))]
        toe = self.at(x * 1.2, ankle[1] - 0.02, ankle[2] + 0.07)
        heel = self.at(x, ankle[1] - 0.02, ankle[2] - 0.012)
        self.brush.limb([self.at(*hip), self.at(*knee), self.at(*ankle)], wide, self.lower if dressed else self.skin)
        if dressed and self.who.lower_striped:
            self._rings([self.at(*hip), self.at(*knee), self.at(*ankle)], wide)
        self.brush.limb([heel, toe], (0.026, 0.023), PALETTE[self.who.shoes])
        if self.who.lower_kind == "shorts":
            hem = (x, 0.47 - 0.19 * math.cos(lift), 0.19 * math.sin(lift))
            self.brush.limb([self.at(*hip), self.at(*hem)], (0.056 * thick, 0.056 * thick), self.lower)
            if self.who.lower_striped:
                self._rings([self.at(*hip), self.at(*hem)], (0.056 * thick, 0.056 * thick))

    def _rings(self, points: Sequence[Point], radii: Sequence[float]) -> None:
        """Bands across the legs of striped trousers."""
        band = contrast(self.lower)
        for (start, end), (thick, thin) in zip(pairs(points), pairs(radii), strict=True):
            for share in (0.3, 0.58, 0.86):
                u = start[0] + share * (end[0] - start[0])
                v = start[1] + share * (end[1] - start[1])
                self._band(u, v, thick + share * (thin - thick), band)

    def _band(self, u: float, v: float, half: float, colour: RGB) -> None:
        wide, high = half * self.height, 0.011 * self.height
        self.draw.rectangle((u - wide, v - high, u + wide, v + high), fill=colour)

    def _hips(self) -> None:
        bare = self.half(0.096 * self.build, 0.072 * self.build)
        u, v = self.at(0, 0.47, 0)
        if self.who.lower_kind != "skirt":
            self.brush.disc((u, v - 0.01 * self.height), bare, 0.05, self.lower)
            return
        flare, hem = bare + 0.035, self.at(0, 0.29, 0)[1]
        corners = [(-bare, v - 0.05 * self.height), (bare, v - 0.05 * self.height), (flare, hem), (-flare, hem)]
        outline = [(u + x * self.height, y) for x, y in corners]
        self.draw.polygon(outline, fill=self.lower)
        self.brush.disc((u, hem), flare, 0.014, self.lower)
        if self.who.lower_striped:
            for share in (0.35, 0.62, 0.89):
                self._band(u, v + share * (hem - v), bare + share * (flare - bare), contrast(self.lower))

    def _torso(self) -> None:
        shoulder, chest, waist, hem = (
            self.half(x * self.build, z * self.build) * self.height
            for x, z in ((0.112, 0.052), (0.122, 0.074), (0.098, 0.07), (0.106, 0.076))
        )
        u = self.foot[0]
        rows = [(0.845, 0.35 * shoulder), (0.825, shoulder), (0.77, chest), (0.58, waist), (0.455, hem)]
        left = [(u - half, self.at(0, y, 0)[1]) for y, half in rows]
        right = [(u + half, self.at(0, y, 0)[1]) for y, half in reversed(rows)]
        self.brush.cut_out(lambda draw: draw.polygon(left + right, fill=255))
        low = left[-1][1]
        self.draw.line((u - hem, low, u + hem, low), fill=shade(self.upper, 0.62), width=2)
        neck, collar = self.at(0, 0.87, 0), self.at(0, 0.838, 0.02)
        self.brush.limb([neck, collar], (0.03, 0.03), shade(self.skin, 0.93))

    def _front_details(self) -> None:
        """What is printed or worn on the chest: hidden as soon as the chest turns away."""
        if self.cos < 0.2:
            return
        if self.who.pattern == "logo":
            u, v = self.at(0, 0.69, 0.07)
            self.brush.disc((u, v), 0.062 * self.cos * self.build, 0.062, PALETTE[self.who.second])
            self.brush.disc((u, v), 0.028 * self.cos * self.build, 0.028, self.upper)
        if self.who.bag == "back":
            for x in (-0.07, 0.07):
                ends = [self.at(x * self.build, 0.83, 0.04), self.at(x * 1.1 * self.build, 0.62, 0.07)]
                self.brush.limb(ends, (0.014, 0.014), PALETTE[self.who.bag_colour])

    def _arm(self, side: int) -> None:
        angle = -self.pose.swing * math.sin(self.pose.phase) * side
        x = 0.128 * self.build * side
        shoulder = (x * 0.94, 0.80, 0.0)
        elbow = (x * 1.16, 0.80 - 0.165 * math.cos(angle), 0.165 * math.sin(angle))
        fore = angle + 0.35
        hand = (x * 1.2, elbow[1] - 0.15 * math.cos(fore), elbow[2] + 0.15 * math.sin(fore))
        thick = 0.5 + 0.5 * self.build
        joints = [self.at(*shoulder), self.at(*elbow), self.at(*hand)]
        fingers = self.at(hand[0], hand[1] - 0.026 * math.cos(fore), hand[2] + 0.026 * math.sin(fore))
        self.brush.disc(fingers, 0.022, 0.026, self.skin)
        if self.who.sleeves == "long":
            self.brush.limb(joints, (0.04 * thick, 0.034 * thick, 0.026 * thick), self.upper, cloth=True)
            return
        self.brush.limb(joints, (0.032 * thick, 0.028 * thick, 0.021 * thick), self.skin)
        if self.who.sleeves == "short":
            cuff = tuple(s + 0.66 * (e - s) for s, e in zip(joints[0], joints[1], strict=True))
            self.brush.limb([joints[0], (cuff[0], cuff[1])], (0.042 * thick, 0.042 * thick), self.upper, cloth=True)

    # The head

    def _head(self) -> None:
        u, v = self.at(0, 0.92, 0.012)
        rx, ry = 0.064, 0.078
        self.brush.disc((u, v - 0.008 * self.height), rx + 0.006, ry, self.hair)
        # The face turns out of sight at the rim of the head.
        half = rx * (0.62 + 0.26 * self.cos if self.cos > 0 else 0.62 + 0.62 * self.cos)
        if half > 0.2 * rx:
            turn = math.copysign(min(1.0, abs(self.sin) * 1.1), self.sin)
            middle = u + turn * (rx - half) * self.height
            self.brush.disc((middle, v + 0.016 * self.height), half, ry - 0.013, self.skin)
            eye = 0.5 * half if self.cos > 0.35 else 0.0
            for x in (-eye, eye):
                ahead = turn * 0.3 * half
                self.brush.disc(
                    (middle + (x + ahead) * self.height, v + 0.008 * self.height), 0.0085, 0.011, (40, 34, 36)
                )

    def _hat(self) -> None:
        """After the hair, which it holds down."""
        if self.who.hat == "none":
            return
        colour, high = PALETTE[self.who.hat_colour], self.height
        u, v = self.at(0, 0.92, 0.012)
        rx, ry = 0.075, 0.09
        box = (u - rx * high, v - ry * high, u + rx * high, v + ry * high)
        if self.who.hat == "beanie":
            self.draw.chord(box, 195, 345, fill=colour)
            brim = v - 0.25 * ry * high
            self.draw.rounded_rectangle(
                (u - rx * high, brim - 0.016 * high, u + rx * high, brim + 0.01 * high), 2, fill=shade(colour, 0.8)
            )
            self.brush.disc((u, v - (ry + 0.008) * high), 0.02, 0.02, contrast(colour))
        else:
            self.draw.chord(box, 192, 348, fill=colour)
            if self.cos > -0.5:
                peak = self.at(0, 0.945, 0.095)[0]
                self.brush.disc((peak, v - 0.24 * ry * high), max(0.035, 0.06 * self.cos), 0.014, shade(colour, 0.75))

    def _hair_behind(self) -> None:
        if self.who.hair_style == "long":
            top, end = self.at(0, 0.885, -0.03), self.at(0, 0.775, -0.045)
            wide = self.half(0.066, 0.045)
            self.brush.limb([top, end], (wide, wide * 0.85), self.hair)
        elif self.who.hair_style == "bun" and self.who.hat != "beanie":
            high = 0.995 if self.who.hat == "none" else 0.9  # a cap pushes it down
            self.brush.disc(self.at(0, high, -0.055), 0.036, 0.034, shade(self.hair, 0.85))

    # Bags

    def _backpack(self) -> None:
        u, v = self.at(0, 0.68, -0.11)
        wide = self.half(0.092, 0.055) * self.height
        high = 0.125 * self.height
        colour = PALETTE[self.who.bag_colour]
        box = (u - wide, v - high, u + wide, v + high)
        self.draw.rounded_rectangle(box, 0.045 * self.height, fill=colour, outline=shade(colour, 0.6), width=2)
        if self.cos < -0.2:  # the pocket
            inner = (u - 0.65 * wide, v + 0.1 * high, u + 0.65 * wide, v + 0.8 * high)
            self.draw.rounded_rectangle(inner, 0.02 * self.height, fill=shade(colour, 0.82))

    def _shoulder_bag(self, side: int) -> None:
        u, v = self.at(0.15 * self.build * side, 0.45, 0.0)
        wide, high = self.half(0.05, 0.085) * self.height, 0.075 * self.height
        colour = PALETTE[self.who.bag_colour]
        box = (u - wide, v - high, u + wide, v + high)
        self.draw.rounded_rectangle(box, 0.02 * self.height, fill=colour, outline=shade(colour, 0.6), width=2)
        flap = (u - wide + 2, v - high + 2, u + wide - 2, v - 0.15 * high)
        self.draw.rounded_rectangle(flap, 0.015 * self.height, fill=shade(colour, 0.82))

    def _shoulder_strap(self, side: int) -> None:
        if abs(self.cos) < 0.15:  # from the side it runs along the rim
            return
        z = math.copysign(0.06, self.cos)
        ends = [self.at(-0.07 * self.build * side, 0.835, z * 0.4), self.at(0.11 * self.build * side, 0.5, z)]
        self.brush.limb(ends, (0.01, 0.01), PALETTE[self.who.bag_colour])
