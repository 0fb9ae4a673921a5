"""What lies on the line: plates and their defects, described in millimetres.

A plate becomes a *sprite*: flat maps (albedo, normals, gloss, coverage) that `render` warps into
the picture and lights there. Light is applied after the warp, so one plate catches the lamp
differently as it moves, as brushed steel does. The outlines that the labels come from are the
same points that the maps are drawn from, so labels are exact by construction.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np

BEVEL_MM = 5.0
# Room around the plate in its sprite: antialiasing needs a pixel or two outside the edge.
MARGIN_MM = 4.0


@dataclass
class Defect:
    """`kind` is a class name; `points` (N, 2) is its outline, or a scratch's strokes, in plate mm."""

    kind: str
    centre: np.ndarray
    size_mm: float
    shape: dict = field(default_factory=dict)

    def outline(self):
        """Points whose bounding box is the label."""
        if self.kind == "scratch":
            # Half a stroke's width on each side: the label holds the whole stroke.
            half = self.shape["width_mm"] / 2 + 0.6
            pts = np.concatenate(self.shape["strokes"])
            return np.concatenate([pts + d for d in ((half, half), (half, -half),
                                                     (-half, half), (-half, -half))])
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        rim = 1.18 if self.kind == "hole" else 1.0
        radius = self.radius_at(angle) * rim
        return self.centre + np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]

    def radius_at(self, angle):
        s = self.shape
        wave = 1 + s["a2"] * np.cos(2 * (angle - s["p2"])) + s["a3"] * np.cos(3 * (angle - s["p3"]))
        return self.size_mm * wave


@dataclass
class Plate:
    half: np.ndarray          # half extents, mm
    corner_mm: float
    tone: float               # reflectance of the flat metal
    tint: np.ndarray          # RGB factors around 1
    brush_x: bool             # grain runs along the belt
    grain: float
    seed: int                 # of the grain and the smudges, so that a sprite can be drawn again
    defects: list

    def outline(self):
        r = self.corner_mm
        quarter = np.linspace(0, np.pi / 2, 6)
        pts = []
        for sx, sy, start in ((1, 1, 0.0), (-1, 1, 0.5), (-1, -1, 1.0), (1, -1, 1.5)):
            a = quarter + start * np.pi
            c = np.array([sx, sy]) * (self.half - r)
            pts.append(c + r * np.stack([np.cos(a), np.sin(a)], 1))
        return np.concatenate(pts)


def make_defect(rng, kind, centre):
    """A defect of `kind` around `centre` (plate mm)."""
    centre = np.asarray(centre, float)
    if kind == "scratch":
        length = rng.uniform(70, 140)
        # Diagonal: the box of a level scratch would be a sliver that nothing can localise.
        angle = rng.choice([-1, 1]) * rng.uniform(np.radians(20), np.radians(68))
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-along[1], along[0]])
        bend = rng.uniform(-0.16, 0.16) * length
        t = np.linspace(-0.5, 0.5, 24)[:, None]
        spine = centre + along * t * length + across * bend * (1 - 4 * t**2)
        strokes = [spine]
        for _ in range(rng.integers(1, 4)):
            a = rng.integers(0, 8)
            b = rng.integers(14, 24)
            strokes.append(spine[a:b] + across * rng.uniform(-6.5, 6.5)
                           + along * rng.uniform(-4, 4))
        return Defect(kind, centre, length / 2,
                      {"strokes": strokes, "width_mm": rng.uniform(1.9, 2.8),
                       "bright": rng.uniform(0.5, 0.75)})
    big = {"dent": (17, 30), "hole": (11, 18)}[kind]
    wobble = {"dent": (0.04, 0.16, 0.07), "hole": (0.0, 0.05, 0.03)}[kind]
    return Defect(kind, centre, rng.uniform(*big),
                  {"a2": rng.uniform(*wobble[:2]), "p2": rng.uniform(0, np.pi),
                   "a3": rng.uniform(0, wobble[2]), "p3": rng.uniform(0, np.pi),
                   "depth": rng.uniform(0.26, 0.42)})


def make_plate(rng, kinds):
    """A plate that carries one defect of each entry of `kinds`; one that finds no room is left out."""
    half = np.array([rng.uniform(118, 150), rng.uniform(92, 116)])
    plate = Plate(half=half, corner_mm=rng.uniform(8, 20), tone=rng.uniform(0.44, 0.64),
                  tint=1 + rng.uniform(-1, 1) * np.array([0.035, 0.005, -0.04]),
                  brush_x=bool(rng.random() < 0.75), grain=rng.uniform(0.05, 0.13),
                  seed=int(rng.integers(1 << 31)), defects=[])
    for kind in kinds:
        for _ in range(30):
            candidate = make_defect(rng, kind, rng.uniform(-half + 20, half - 20))
            pts = candidate.outline()
            inside = np.all(np.abs(pts) < half - BEVEL_MM - 5)
            if inside and not any(_near(pts, d.outline()) for d in plate.defects):
                plate.defects.append(candidate)
                break
    return plate


def _near(a, b, gap_mm=9):
    """Boxes closer than `gap_mm`: overlapping defects would have no exact label."""
    return bool(np.all(a.min(0) - gap_mm < b.max(0)) and np.all(b.min(0) - gap_mm < a.max(0)))


def sprite(plate, res, light_xy):
    """Maps of `plate` at `res` px/mm: (albedo, nx, ny, gloss) and coverage, and mm -> px matrix.

    `light_xy` points towards the lamp: a hole's far wall is what catches its light.
    """
    rng = np.random.default_rng(plate.seed)
    size = np.ceil((plate.half + MARGIN_MM) * 2 * res).astype(int)
    w, h = int(size[0]), int(size[1])
    centre = np.array([w, h]) / 2
    to_px = np.array([[res, 0, centre[0] - 0.5], [0, res, centre[1] - 0.5], [0, 0, 1]])
    x = ((np.arange(w) + 0.5 - centre[0]) / res)[None, :].astype(np.float32)
    y = ((np.arange(h) + 0.5 - centre[1]) / res)[:, None].astype(np.float32)

    qx, qy = np.abs(x) - plate.half[0] + plate.corner_mm, np.abs(y) - plate.half[1] + plate.corner_mm
    edge = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0)
    edge = edge - plate.corner_mm  # signed distance, negative inside
    coverage = np.clip(0.5 - edge * res, 0, 1).astype(np.float32)
    height = -0.45 * np.clip(edge + BEVEL_MM, 0, 2 * BEVEL_MM)

    albedo, gloss = _metal(rng, plate, h, w, res)
    for d in plate.defects:
        if d.kind == "scratch":
            _cut_scratch(d, albedo, gloss, to_px)
        elif d.kind == "dent":
            height += _press_dent(d, x, y, albedo)
        else:
            height += _drill_hole(d, x, y, albedo, gloss, light_xy)
    ny, nx = np.gradient(height.astype(np.float32) * res)
    maps = np.stack([albedo, -nx, -ny, gloss], -1).astype(np.float32)
    return maps, coverage, to_px


def _metal(rng, plate, h, w, res):
    """Brushed sheet: long fine streaks over broad faint ones, and a smudge or two."""
    def streaks(length_mm, across_mm):
        k = [max(1, int(length_mm * res) | 1), max(1, int(across_mm * res) | 1)]
        n = rng.standard_normal((h, w), dtype=np.float32)
        n = cv2.blur(n, tuple(k if plate.brush_x else k[::-1]))
        return n / (n.std() + 1e-6)

    grain = 0.75 * streaks(90, 0.5) + 0.45 * streaks(260, 3.0)
    albedo = plate.tone * (1 + plate.grain * 0.5 * grain)
    gloss = np.clip(0.8 + 0.35 * grain, 0.2, 1.6)
    for _ in range(rng.integers(0, 3)):
        c = rng.uniform(0.15, 0.85, 2) * (w, h)
        r = rng.uniform(15, 45) * res
        yy, xx = np.ogrid[:h, :w]
        blob = np.exp(-(((xx - c[0]) ** 2 + (yy - c[1]) ** 2) / r**2).astype(np.float32))
        albedo = albedo * (1 - 0.06 * blob)
        gloss = gloss * (1 - 0.35 * blob)
    return albedo.astype(np.float32), gloss.astype(np.float32)


def _relative_radius(d, x, y):
    dx, dy = x - np.float32(d.centre[0]), y - np.float32(d.centre[1])
    return np.hypot(dx, dy) / d.radius_at(np.arctan2(dy, dx)), dx, dy


def _press_dent(d, x, y, albedo):
    u, _, _ = _relative_radius(d, x, y)
    bowl = np.clip(1 - u**2, 0, 1)
    # Power 1.5: the flank is steep right up to the outline, so the label's edge is what one sees.
    albedo *= (1 - 0.10 * bowl).astype(np.float32)
    return -d.shape["depth"] * d.size_mm * bowl**1.5


def _drill_hole(d, x, y, albedo, gloss, light_xy):
    u, dx, dy = _relative_radius(d, x, y)
    soft = np.clip((1.0 - u) * d.size_mm * 1.2 + 0.5, 0, 1)
    # The wall on the side away from the lamp is the one it reaches.
    facing = -(dx * light_xy[0] + dy * light_xy[1]) / (np.hypot(dx, dy) + 1e-3)
    wall = np.clip((u - 0.72) / 0.2, 0, 1) * np.clip(facing, 0, 1)
    albedo *= (1 - soft).astype(np.float32)
    albedo += (soft * (0.035 + 0.24 * wall)).astype(np.float32)
    gloss *= (1 - soft).astype(np.float32)
    ring = np.exp(-(((u - 1.09) / 0.05) ** 2))
    albedo += (0.16 * ring).astype(np.float32)
    return 1.1 * np.exp(-(((u - 1.09) / 0.07) ** 2))


def _cut_scratch(d, albedo, gloss, to_px):
    """Bright strokes with a dark lip below them, drawn at twice the size and shrunk for smoothness."""
    h, w = albedo.shape
    res = to_px[0, 0]
    mask = np.zeros((2 * h, 2 * w), np.uint8)
    for i, stroke in enumerate(d.shape["strokes"]):
        px = np.round(((stroke * res + to_px[:2, 2] + 0.5) * 2 - 0.5) * 16).astype(np.int32)
        width = d.shape["width_mm"] * (1.0 if i == 0 else 0.55) * res * 2
        n = len(px) - 1
        for j in range(n):
            # Pressed hardest early on, running out thin: a tool that slips does that.
            press = min(1.0, 0.55 + 4 * j / n, 0.45 + 1.6 * (n - j) / n)
            cv2.line(mask, tuple(map(int, px[j])), tuple(map(int, px[j + 1])),
                     int((255 if i == 0 else 190) * (0.75 + 0.25 * press)),
                     max(1, round(width * press)), cv2.LINE_AA, 4)
    cut = cv2.resize(mask, (w, h), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    drop = max(1, round(1.0 * res))
    lip = np.zeros_like(cut)
    lip[drop:] = cut[:-drop]
    albedo *= 1 - 0.45 * lip * (1 - cut)
    albedo += cut * d.shape["bright"]
    gloss *= 1 + 0.5 * cut
