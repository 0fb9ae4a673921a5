"""The camera's side: belt, plates, lamp and lens become an RGB picture and its boxes.

Millimetres of the belt plane go to pixels by one 3x3 matrix (camera height, roll, tilt). The belt
texture repeats every `BELT_PERIOD_MM`, which is what lets a clip loop without a seam.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np

from . import CLASSES
from .scene import sprite

BELT_PERIOD_MM = 760.0
BELT_HALF_MM = 168.0
RAIL_MM = 34.0
# A box with less than this share inside the frame is no label: a corner of a plate is
# guesswork for the network and for a person.
VISIBLE_MIN = 0.35


@dataclass
class Camera:
    width: int
    height: int
    px_per_mm: float
    roll: float = 0.0            # radians
    tilt: tuple = (0.0, 0.0)     # perspective across the width and the height, fractions
    look_mm: tuple = (0.0, 0.0)  # belt-plane point at the picture's centre

    def matrix(self):
        """Belt plane (mm) -> pixel centres."""
        c, s = np.cos(self.roll) * self.px_per_mm, np.sin(self.roll) * self.px_per_mm
        turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        look = np.array([[1, 0, -self.look_mm[0]], [0, 1, -self.look_mm[1]], [0, 0, 1]])
        lens = np.array([[1, 0, 0], [0, 1, 0],
                         [self.tilt[0] / self.width, self.tilt[1] / self.height, 1]])
        shift = np.array([[1, 0, self.width / 2 - 0.5], [0, 1, self.height / 2 - 0.5], [0, 0, 1]])
        return shift @ lens @ turn @ look


@dataclass
class Light:
    towards: tuple = (-0.6, -0.8)       # unit vector in the picture's plane, to the lamp
    relief: float = 1.0                 # how strongly slopes shade
    exposure: float = 1.0
    tint: tuple = (1.0, 1.0, 1.0)
    spot: tuple = (0.4, 0.3)            # where flat metal mirrors the lamp, fractions of the frame
    shine: float = 0.35
    falloff: float = 0.25               # darkening towards the corners
    slope: tuple = (0.0, 0.0)           # linear gradient over the frame
    bands: list = field(default_factory=list)  # cast shadows: (centre, half width, angle, depth)
    plate_shadow: float = 0.45


@dataclass
class Lens:
    blur_px: float = 0.0
    motion_px: float = 0.0
    noise: float = 0.0          # standard deviation in 8-bit steps


@lru_cache(maxsize=64)
def belt_tile(res, style):
    """One period of the belt at `res` px/mm, float RGB; `style` seeds colour, weave and wear."""
    rng = np.random.default_rng(7_000 + style)
    w, h = round(BELT_PERIOD_MM * res), round(2 * BELT_HALF_MM * res)
    base = [(0.13, 0.22, 0.19), (0.14, 0.18, 0.24), (0.15, 0.155, 0.16), (0.20, 0.21, 0.20),
            (0.11, 0.20, 0.24), (0.19, 0.17, 0.15)][style % 6]
    def noise(kx, ky):
        n = rng.standard_normal((h, w), dtype=np.float32)
        wrapped = np.concatenate([n, n, n], 1)  # so that the blur does not see the tile's ends
        n = cv2.blur(wrapped, (max(1, int(kx * res) | 1), max(1, int(ky * res) | 1)))[:, w:2 * w]
        return n / (n.std() + 1e-6)
    tone = 1 + 0.05 * noise(0, 0) + 0.05 * noise(300, 3) + 0.06 * noise(40, 25)
    # Diamond ribs, 8 mm apart; the count per period is whole, so the tile closes on itself.
    x = np.arange(w)[None, :] / w * 2 * np.pi * round(BELT_PERIOD_MM / 9.5)
    y = np.arange(h)[:, None] / res * 2 * np.pi / 9.5
    tone = tone * (1 + 0.07 * (np.cos(x + y) + np.cos(x - y)))
    # The splice: a slanted joint across the belt, once per period.
    col = np.arange(w)[None, :] - w * 0.5 - (np.arange(h)[:, None] - h / 2) * 0.25
    tone = tone * (1 - 0.25 * np.exp(-((col / (1.5 * res)) ** 2)))
    edge = np.abs(np.arange(h)[:, None] - h / 2) / (h / 2)
    tone = tone * (1 - 0.30 * np.clip((edge - 0.9) / 0.1, 0, 1))
    return (np.array(base, np.float32) * tone[..., None].astype(np.float32)).astype(np.float32)


@lru_cache(maxsize=64)
def frame_tile(res, style):
    """The part that stands still: side rails with a painted stripe, and the floor beyond."""
    rng = np.random.default_rng(9_000 + style)
    w, h = round(2 * BELT_PERIOD_MM * res), round(2 * 420 * res)
    y = np.abs((np.arange(h) + 0.5) / res - 420)[:, None]
    floor = np.array(rng.uniform(0.16, 0.30) * (1 + rng.uniform(-0.05, 0.05, 3)), np.float32)
    speck = cv2.blur(rng.standard_normal((h, w), dtype=np.float32), (3, 3))
    out = floor * (1 + 0.12 * speck[..., None])
    d = (y - BELT_HALF_MM) / RAIL_MM  # 0..1 over the rail
    streak = cv2.blur(rng.standard_normal((h, w), dtype=np.float32), (101, 1)) * 0.4
    rail = (0.40 + 0.16 * np.cos((d - 0.35) * 4.2)) * (1 + 0.10 * streak)
    on_rail = ((d >= 0) & (d <= 1)).astype(np.float32)[..., None]
    rail_rgb = rail[..., None] * np.array([0.98, 1.0, 1.03], np.float32)
    stripe = ((d > 0.68) & (d < 0.86)).astype(np.float32)[..., None]
    paint = np.array([(0.75, 0.55, 0.08), (0.12, 0.30, 0.55), (0.60, 0.14, 0.10)][style % 3])
    rail_rgb = rail_rgb * (1 - stripe) + paint * stripe * (0.85 + 0.1 * streak[..., None])
    out = out * (1 - on_rail) + rail_rgb * on_rail
    gap = np.exp(-((d * RAIL_MM / 5.0) ** 2)) + 0.8 * np.exp(-(((d - 1) * RAIL_MM / 9.0) ** 2))
    return (out * (1 - 0.75 * np.clip(gap, 0, 1))[..., None]).astype(np.float32)


def render(camera, light, lens, placed, belt_mm, style, rng, sprites=None):
    """Draw one picture.

    `placed`: (plate, x_mm, y_mm, angle) in the belt plane. `belt_mm`: how far the belt has run.
    `sprites`: a dict kept between frames of a clip, so that a plate is drawn once.
    Returns RGB u8 [H, W, 3] and boxes [(class id, x0, y0, x1, y1)] in pixels, clipped.
    """
    m = camera.matrix()
    image, grid = _background(camera, m, belt_mm, style)
    h, w = camera.height, camera.width
    gain, hot = _lamp(light, h, w)
    ramp = image * gain[..., None]
    for plate, x, y, angle in placed:
        _put_plate(ramp, plate, m @ _pose(x, y, angle), camera, light, gain, hot, sprites)
    rgb = ramp * np.array(light.tint, np.float32) * light.exposure
    # A soft knee instead of a hard clip: overexposed metal keeps a little shape.
    rgb = np.where(rgb > 0.8, 0.8 + 0.25 * np.tanh((rgb - 0.8) / 0.35), rgb)
    rgb = np.clip(rgb, 0, 1) ** 0.80
    rgb = _optics(rgb * 255, lens, rng)
    boxes = [b for p in placed for b in labels(camera, m, *p)]
    return np.clip(rgb + 0.5, 0, 255).astype(np.uint8), boxes


def labels(camera, m, plate, x, y, angle):
    """Boxes of one plate and its defects, clipped to the frame; mostly hidden ones are left out."""
    to_image = m @ _pose(x, y, angle)
    out = []
    for kind, pts in [("plate", plate.outline())] + [(d.kind, d.outline()) for d in plate.defects]:
        p = np.concatenate([pts, np.ones((len(pts), 1))], 1) @ to_image.T
        # Pixel centres stand at whole numbers in the matrix, edges at halves: +0.5 gives edges.
        p = p[:, :2] / p[:, 2:] + 0.5
        lo, hi = p.min(0), p.max(0)
        clo = np.maximum(lo, 0)
        chi = np.minimum(hi, (camera.width, camera.height))
        seen = np.prod(np.maximum(chi - clo, 0)) / np.prod(hi - lo)
        if seen >= VISIBLE_MIN:
            out.append((CLASSES.index(kind), *clo, *chi))
    return out


def _pose(x, y, angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, x], [s, c, y], [0, 0, 1]])


def _background(camera, m, belt_mm, style):
    h, w = camera.height, camera.width
    # Tiles at a few fixed resolutions, so that the cache is hit.
    res = float(np.clip(np.round(camera.px_per_mm * 4) / 4, 0.5, 2.0))
    belt, frame = belt_tile(res, style), frame_tile(res, style)
    inv = np.linalg.inv(m)
    u, v = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    d = inv[2, 0] * u + inv[2, 1] * v + inv[2, 2]
    x = ((inv[0, 0] * u + inv[0, 1] * v + inv[0, 2]) / d).astype(np.float32)
    y = ((inv[1, 0] * u + inv[1, 1] * v + inv[1, 2]) / d).astype(np.float32)
    moving = cv2.remap(belt, np.mod((x - np.float32(belt_mm)) * res, belt.shape[1]).astype(np.float32),
                       np.clip((y + BELT_HALF_MM) * res, 0, belt.shape[0] - 1).astype(np.float32),
                       cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    still = cv2.remap(frame, np.mod(x * res, frame.shape[1]).astype(np.float32),
                      np.clip((y + 420) * res, 0, frame.shape[0] - 1).astype(np.float32),
                      cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    on_belt = np.clip((BELT_HALF_MM - np.abs(y)) * camera.px_per_mm + 0.5, 0, 1)[..., None]
    return still + (moving - still) * on_belt.astype(np.float32), (x, y)


def _lamp(light, h, w):
    """Brightness over the frame, and how strongly flat metal mirrors the lamp there (dx, dy)."""
    u = ((np.arange(w, dtype=np.float32) + 0.5) / w)[None, :]
    v = ((np.arange(h, dtype=np.float32) + 0.5) / h)[:, None]
    gain = 1 - light.falloff * (((u - 0.5) * 2) ** 2 + ((v - 0.5) * 1.6) ** 2) / 2
    gain = gain + light.slope[0] * (u - 0.5) + light.slope[1] * (v - 0.5)
    for centre, half, angle, depth in light.bands:
        t = (u - 0.5) * np.cos(angle) + (v - 0.5) * h / w * np.sin(angle) - centre
        gain = gain * (1 - depth / (1 + np.exp((np.abs(t) - half) / 0.018)))
    return gain.astype(np.float32), (u - np.float32(light.spot[0]), v - np.float32(light.spot[1]))


def _put_plate(image, plate, to_image, camera, light, gain, hot, sprites):
    h, w = camera.height, camera.width
    res = float(camera.px_per_mm * 1.15)
    made = sprites.get(id(plate)) if sprites is not None else None
    if made is None:
        made = sprite(plate, res, light.towards)
        if sprites is not None:
            sprites[id(plate)] = made
    maps, coverage, to_px = made
    warp = to_image @ np.linalg.inv(to_px)

    shadow_px = 9 * camera.px_per_mm
    ends = cv2.perspectiveTransform(plate.outline()[None].astype(np.float64), to_image)[0]
    pad = shadow_px * 2.5
    x0, y0 = np.floor(np.maximum(ends.min(0) - pad, 0)).astype(int)
    x1, y1 = np.ceil(np.minimum(ends.max(0) + pad, (w, h))).astype(int)
    if x1 - x0 < 2 or y1 - y0 < 2:
        return
    roi = (slice(y0, y1), slice(x0, x1))
    local = np.array([[1, 0, -x0], [0, 1, -y0], [0, 0, 1]], float) @ warp
    size = (int(x1 - x0), int(y1 - y0))
    cover = cv2.warpPerspective(coverage, local, size)[..., None]

    # The drop shadow falls away from the lamp; blurred on a wider canvas so that the frame's edge
    # does not lighten it.
    away = np.array([[1, 0, -light.towards[0] * shadow_px * 0.7],
                     [0, 1, -light.towards[1] * shadow_px * 0.7], [0, 0, 1]])
    fall = cv2.warpPerspective(coverage, away @ local, size)
    fall = cv2.GaussianBlur(fall, (0, 0), max(0.6, shadow_px * 0.45), borderType=cv2.BORDER_REPLICATE)
    image[roi] *= 1 - light.plate_shadow * fall[..., None] * (1 - cover)

    g = cv2.warpPerspective(maps, local, size, borderMode=cv2.BORDER_REPLICATE)
    albedo, nx, ny, gloss = (g[..., i] for i in range(4))
    shade = 1 + light.relief * (nx * light.towards[0] + ny * light.towards[1])
    shade = np.clip(shade, 0.18, 2.1)
    # Brushed metal spreads the mirrored lamp across its grain and keeps it narrow along it.
    dx, dy = hot[0][:, x0:x1] + 0.9 * nx, hot[1][y0:y1] + 0.9 * ny
    sx, sy = (0.17, 0.75) if plate.brush_x else (0.6, 0.22)
    mirror = light.shine * gloss * np.exp(-((dx / sx) ** 2) - (dy / sy) ** 2)
    metal = (albedo * shade + mirror * (0.25 + albedo))[..., None] * plate.tint.astype(np.float32)
    metal = metal * gain[roi][..., None]
    image[roi] += (metal - image[roi]) * cover


def _optics(rgb, lens, rng):
    if lens.motion_px > 0.6:
        n = int(np.ceil(lens.motion_px)) | 1
        k = np.clip(lens.motion_px / 2 + 0.5 - np.abs(np.arange(n) - n // 2), 0, 1)
        rgb = cv2.filter2D(rgb, -1, (k / k.sum())[None, :].astype(np.float32))
    if lens.blur_px > 0.2:
        rgb = cv2.GaussianBlur(rgb, (0, 0), lens.blur_px)
    if lens.noise > 0:
        # Half of a sensor's noise is in luma, and it grows with the light.
        luma = rng.standard_normal(rgb.shape[:2], dtype=np.float32)[..., None]
        chroma = rng.standard_normal(rgb.shape, dtype=np.float32)
        rgb = rgb + lens.noise * (0.85 * luma + 0.4 * chroma) * (0.6 + rgb / 320)
    return rgb
