"""How one camera sees the world: a fixed place, a fixed colour rendering, a usual view of the people who walk by.

Strengths are chosen so that colours alone mislead between cameras while a person's clues stay readable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from pmm.data.synthetic.identity import RGB

WIDTH = 64
HEIGHT = 128
"""Size of every crop, in pixels."""

Gains = tuple[float, float, float]

# Beige, sage, slate, brick, concrete, ochre, dusk, cream, teal. Places are tinted, or evening out the mean colour of a
# crop (grey world) would undo a camera's colours; but never as strongly as a garment.
WALLS: tuple[RGB, ...] = (
    (202, 184, 152),
    (158, 178, 146),
    (146, 166, 190),
    (190, 140, 116),
    (172, 174, 174),
    (198, 172, 118),
    (168, 152, 176),
    (220, 212, 190),
    (130, 172, 168),
)
# Asphalt, sand, grass, paving, planks, tiles.
FLOORS: tuple[RGB, ...] = (
    (112, 114, 120),
    (182, 164, 130),
    (118, 144, 96),
    (154, 148, 140),
    (166, 128, 96),
    (132, 148, 162),
)

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Everything that stays the same over all crops of one camera."""

    gains: Gains
    """Factors of the red, green and blue channel."""
    brightness: float
    gamma: float
    saturation: float
    """Factor of the distance of a colour to its grey; 1 keeps the colour."""
    blur: float
    """Radius of the Gaussian blur, in pixels of the crop."""
    resolution: float
    """The person is seen at this share of the crop's pixels and enlarged, 0.5 to 1."""
    wall: RGB
    floor: RGB
    horizon: float
    """Where the floor meets the wall, as a share of the crop's height from the top."""
    panel: float
    """Width of one wall panel, as a share of the crop's width."""
    tightness: float
    """Height of a person, as a share of the crop's height."""
    azimuth: float
    """The side people usually show, in degrees: 0 front, 90 walking to the right, 180 back, 270 walking to the left."""

    def sample_azimuth(self, rng: np.random.Generator) -> float:
        """Azimuth of one person in degrees: mostly near the camera's usual one, now and then (35 %) any."""
        if rng.random() < 0.35:
            return float(rng.uniform(0, 360))
        return float(rng.normal(self.azimuth, 35) % 360)

    def photograph(self, scene: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Turn a drawn scene (RGB, any size of the crop's aspect) into a crop [128, 64, 3], uint8."""
        seen = (round(WIDTH * self.resolution), round(HEIGHT * self.resolution))
        image = scene.resize(seen, Image.Resampling.BOX).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        if self.blur > 0.3:  # below that a Gaussian moves less than a grey level
            image = image.filter(ImageFilter.GaussianBlur(self.blur))
        pixels = np.asarray(image, dtype=np.float32) / 255.0

        # What differs between two crops of one camera: light, colour cast, light from one side.
        light = float(np.exp(rng.normal(0, 0.10)))
        cast = np.exp(rng.normal(0, 0.05, size=3)) * np.array(self.gains)
        slope = 1 + rng.normal(0, 0.10) * np.linspace(-1, 1, WIDTH)
        pixels *= ((light * self.brightness) * cast).astype(np.float32)
        pixels *= slope.astype(np.float32)[None, :, None]

        grey = (pixels * LUMA).sum(axis=2, keepdims=True)
        pixels = grey + self.saturation * (pixels - grey)
        pixels = np.clip(pixels, 0, 1) ** np.float32(self.gamma)
        pixels = pixels * 255 + 6 * rng.standard_normal(pixels.shape, dtype=np.float32)
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def sample_cameras(rng: np.random.Generator, n: int) -> list[Camera]:
    """Draw `n` cameras, each with its own place and rendering."""
    # Usual views are spread around the person: were all alike, front-only clues would hardly ever be missing.
    first = rng.uniform(0, 360)
    turns = rng.permutation(n)
    walls, floors = rng.permutation(len(WALLS)), rng.permutation(len(FLOORS))
    cameras = []
    for number, turn in enumerate(turns):
        gains = np.exp(rng.normal(0, 0.13, size=3))
        cameras.append(
            Camera(
                gains=(float(gains[0]), float(gains[1]), float(gains[2])),
                brightness=float(np.exp(rng.normal(0, 0.20))),
                gamma=float(np.exp(rng.normal(0, 0.15))),
                saturation=float(max(0.4, 1 + rng.normal(0, 0.2))),
                blur=float(rng.uniform(0, 1.3)),
                resolution=float(rng.uniform(0.5, 1.0)),
                wall=_painted(rng, WALLS[walls[number % len(WALLS)]]),
                floor=_painted(rng, FLOORS[floors[number % len(FLOORS)]]),
                horizon=float(rng.uniform(0.55, 0.82)),
                panel=float(rng.uniform(0.5, 1.4)),
                tightness=float(rng.uniform(0.84, 0.95)),
                azimuth=float((first + 360 * turn / n + rng.normal(0, 20)) % 360),
            )
        )
    return cameras


def _painted(rng: np.random.Generator, colour: RGB) -> RGB:
    """`colour`, a little lighter or darker and not quite the same in each data set."""
    channels = np.array(colour) * rng.uniform(0.85, 1.1) + rng.normal(0, 5, size=3)
    red, green, blue = (int(value) for value in np.clip(channels, 0, 255))
    return red, green, blue
