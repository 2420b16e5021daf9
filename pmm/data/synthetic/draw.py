"""Draws a crop: the camera's place, a person in it, and now and then something or somebody in the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pmm.data.synthetic.brush import Point, shade
from pmm.data.synthetic.camera import HEIGHT, WIDTH, Camera
from pmm.data.synthetic.figure import draw_person, sample_pose
from pmm.data.synthetic.identity import RGB, Identity

# Scenes are drawn larger than the crop and averaged down: smooth edges for little time.
SCALE = 2
SCENE = (WIDTH * SCALE, HEIGHT * SCALE)

OCCLUDED = 0.25
"""Share of crops in which something or somebody else is seen too."""


def draw_crop(identity: Identity, camera: Camera, rng: np.random.Generator, others: Sequence[Identity]) -> np.ndarray:
    """One crop [128, 64, 3] uint8 of `identity` as `camera` sees it; one of `others` may walk by.

    `others` holds at least one other identity; `identity` itself may be among them.
    """
    scene = draw_background(camera, rng)
    occluder = ""
    if rng.random() < OCCLUDED:
        occluder = "behind" if rng.random() < 0.25 else ("below", "side", "pole", "before")[int(rng.integers(4))]
    height = SCENE[1] * camera.tightness * (1 + float(rng.uniform(-0.06, 0.06)))
    foot = (
        SCENE[0] * (0.5 + float(rng.uniform(-0.06, 0.06))),
        (SCENE[1] + height) / 2 + SCENE[1] * float(rng.uniform(-0.03, 0.03)),
    )
    stranger = identity
    while occluder in ("behind", "before") and stranger == identity:  # nobody walks beside herself
        stranger = others[int(rng.integers(len(others)))]
    if occluder == "behind":
        _draw_other(scene, camera, rng, stranger, foot, height * float(rng.uniform(0.78, 0.92)), lower=-0.05)
    azimuth = camera.sample_azimuth(rng)
    draw_person(scene, identity, azimuth=azimuth, foot=foot, height=height, pose=sample_pose(rng))
    if occluder == "before":
        _draw_other(scene, camera, rng, stranger, foot, height * float(rng.uniform(0.98, 1.1)), lower=0.06)
    elif occluder in ("below", "side", "pole"):
        _draw_obstacle(scene, occluder, rng)
    return camera.photograph(scene, rng)


def draw_junk(camera: Camera, rng: np.random.Generator, others: Sequence[Identity]) -> np.ndarray:
    """A bad detection, crop [128, 64, 3] uint8: a small part of a person, two people at once, or nobody."""
    scene = draw_background(camera, rng)
    width, height = SCENE
    kind = ("cut", "double", "empty")[int(rng.integers(3))]
    if kind == "cut":
        size = height * float(rng.uniform(1.9, 2.5))
        places = [(width * float(rng.uniform(-0.1, 1.1)), height * float(rng.uniform(1.0, 2.2)), size)]
    elif kind == "double":
        size = height * camera.tightness * 0.8
        places = [(width * float(x + rng.uniform(-0.06, 0.06)), height * 0.92, size) for x in (0.2, 0.8)]
    else:
        places = []
    for x, y, size in places:
        other = others[int(rng.integers(len(others)))]
        azimuth = camera.sample_azimuth(rng)
        draw_person(scene, other, azimuth=azimuth, foot=(x, y), height=size, pose=sample_pose(rng))
    return camera.photograph(scene, rng)


def draw_background(camera: Camera, rng: np.random.Generator) -> Image.Image:
    """The camera's wall and floor [256, 128] with up to 6 things standing or hanging about."""
    width, height = SCENE
    scene = Image.new("RGB", SCENE, camera.wall)
    draw = ImageDraw.Draw(scene)
    horizon = round(height * (camera.horizon + float(rng.uniform(-0.03, 0.03))))
    for step in range(6):  # the wall gets a little darker towards the floor
        top = horizon * step // 6
        draw.rectangle((0, top, width, horizon), fill=shade(camera.wall, 1.06 - 0.03 * step))
    panel = camera.panel * width
    x = float(rng.uniform(0, panel))
    while x < width:
        draw.line((x, 0, x, horizon), fill=shade(camera.wall, 0.86), width=2)
        x += panel
    for _ in range(int(rng.integers(0, 7))):
        _draw_clutter(draw, horizon, camera, rng)
    draw.rectangle((0, horizon, width, height), fill=camera.floor)
    draw.rectangle((0, horizon - 5, width, horizon), fill=shade(camera.wall, 0.68))
    # Joints of the floor run to one far point above the horizon.
    far = width * float(rng.uniform(0.2, 0.8))
    for k in range(-4, 6):
        draw.line((far + k * 12, horizon, far + k * 60, height), fill=shade(camera.floor, 0.9), width=2)
    y = float(horizon + 6)
    while y < height:
        draw.line((0, y, width, y), fill=shade(camera.floor, 0.9), width=1)
        y += 6 + (y - horizon) * 0.6
    return scene


def _draw_other(
    scene: Image.Image,
    camera: Camera,
    rng: np.random.Generator,
    other: Identity,
    foot: Point,
    height: float,
    lower: float,
) -> None:
    """Somebody else, to one side; `lower` in shares of the scene's height: nearer people stand lower in the picture."""
    away = float(rng.uniform(0.26, 0.42)) * (1 if rng.random() < 0.5 else -1)
    place = (foot[0] + away * SCENE[0], foot[1] + lower * SCENE[1])
    draw_person(scene, other, azimuth=camera.sample_azimuth(rng), foot=place, height=height, pose=sample_pose(rng))


def _draw_obstacle(scene: Image.Image, kind: str, rng: np.random.Generator) -> None:
    """Something between camera and person: it hides a part of the person, never most of it."""
    width, height = SCENE
    draw = ImageDraw.Draw(scene)
    colour = _thing_colour(rng)
    if kind == "below":
        top = height * float(rng.uniform(0.5, 0.72))
        draw.rectangle((0, top, width, height), fill=colour)
        draw.rectangle((0, top, width, top + 8), fill=shade(colour, 1.15))
        for joint in range(int(rng.integers(0, 30)), width, 30):
            draw.line((joint, top + 8, joint, height), fill=shade(colour, 0.8), width=2)
    elif kind == "side":
        edge = width * float(rng.uniform(0.28, 0.46))
        left = rng.random() < 0.5
        box = (0, 0, edge, height) if left else (width - edge, 0, width, height)
        draw.rectangle(box, fill=colour)
        rim = edge if left else width - edge
        draw.line((rim, 0, rim, height), fill=shade(colour, 0.7), width=4)
    else:
        x = width * float(rng.uniform(0.3, 0.7))
        thick = width * float(rng.uniform(0.06, 0.12))
        draw.rectangle((x - thick, 0, x + thick, height), fill=colour)
        draw.rectangle((x - thick, 0, x - 0.4 * thick, height), fill=shade(colour, 1.15))
        draw.rectangle((x + 0.5 * thick, 0, x + thick, height), fill=shade(colour, 0.75))


def _draw_clutter(draw: ImageDraw.ImageDraw, horizon: int, camera: Camera, rng: np.random.Generator) -> None:
    """One thing before the wall: a picture, a window, a bush, or a bin."""
    width = SCENE[0]
    x = float(rng.uniform(-0.1, 1.0)) * width
    size = float(rng.uniform(0.12, 0.35)) * width
    colour = _thing_colour(rng)
    kind = int(rng.integers(4))
    if kind == 0:
        y = float(rng.uniform(0.05, 0.4)) * horizon
        draw.rectangle((x, y, x + size, y + 1.2 * size), fill=colour, outline=shade(colour, 0.7), width=3)
    elif kind == 1:
        y = float(rng.uniform(0.05, 0.35)) * horizon
        pane = shade((176, 200, 212), float(rng.uniform(0.75, 1.1)))
        draw.rectangle((x, y, x + size, y + 1.6 * size), fill=pane, outline=shade(camera.wall, 0.7), width=3)
        draw.line((x + size / 2, y, x + size / 2, y + 1.6 * size), fill=shade(camera.wall, 0.7), width=2)
    elif kind == 2:
        green = (70 + int(rng.integers(40)), 104 + int(rng.integers(40)), 70 + int(rng.integers(30)))
        for k, rise in enumerate((0.35, 0.6, 0.3)):
            u, v, r = x + 0.4 * k * size, horizon - rise * size, 0.4 * size
            draw.ellipse((u - r, v - r, u + r, v + r), fill=shade(green, 0.9 + 0.1 * k))
    else:
        top, right = horizon - 1.3 * size, x + 0.7 * size
        draw.rounded_rectangle((x, top, right, horizon + 4), 4, fill=colour)
        draw.rectangle((x - 2, top, right + 2, top + 0.2 * size), fill=shade(colour, 0.75))


def _thing_colour(rng: np.random.Generator) -> RGB:
    """Things are duller than garments, but not always grey."""
    red, green, blue = (int(value) for value in np.clip(rng.uniform(80, 180) + rng.normal(0, 28, size=3), 0, 255))
    return red, green, blue
