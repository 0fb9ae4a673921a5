"""The demo cameras' clips: one line, two cameras, each clip loops without a seam.

The belt runs four of its texture's periods per loop and the plates stand on it at whole fractions
of that, so the frame after the last is the first. Everything else that moves (lamps, a passing
shadow) has the loop as its period too.
"""

import subprocess

import cv2
import numpy as np

from .render import BELT_PERIOD_MM, Camera, Lens, Light, labels, render
from .scene import make_plate

LOOP_S = 20
LOOP_MM = 4 * BELT_PERIOD_MM
# Eight plates; every kind of defect shows up in each half of the loop.
LINE = (["scratch"], ["dent"], ["hole", "scratch"], [],
        ["scratch", "dent"], ["hole"], ["scratch", "scratch"], ["dent", "hole"])
BELT_STYLE = 0
LINE_SEED = 20_240


def line():
    rng = np.random.default_rng(LINE_SEED)
    step = LOOP_MM / len(LINE)
    return [(make_plate(rng, kinds), i * step + rng.uniform(-12, 12), rng.uniform(-16, 16),
             rng.normal(0, 0.03)) for i, kinds in enumerate(LINE)]


def passing(t, begin, end):
    """Where something is that crosses the picture once per loop, from -1 to 1; else far away."""
    return -1 + 2 * (t - begin) / (end - begin) if begin < t < end else 9.0


def camera_a(t):
    """Entry of the line: a warm lamp at the upper left, someone walks past once."""
    turn = 2 * np.pi * t
    light = Light(towards=(-0.55, -0.83), exposure=1.0 + 0.05 * np.sin(turn), relief=1.05,
                  tint=(1.03, 1.0, 0.96), spot=(0.42 + 0.05 * np.sin(turn), 0.32), shine=0.34,
                  falloff=0.28, slope=(-0.10, -0.05),
                  bands=[(passing(t, 0.58, 0.76), 0.16, 0.35, 0.38)], plate_shadow=0.5)
    return Camera(1280, 720, 1280 / 800, 0.008, (0.02, -0.05), (0, 4)), light, Lens(0.6, 3, 1.6)


def camera_b(t):
    """Further down: closer, tilted, colder and darker, the lamp on the other side."""
    turn = 2 * np.pi * t
    light = Light(towards=(0.70, -0.71), exposure=0.86 + 0.06 * np.sin(2 * turn), relief=1.0,
                  tint=(0.95, 1.0, 1.07), spot=(0.66, 0.30 + 0.08 * np.cos(turn)), shine=0.40,
                  falloff=0.38, slope=(0.16, 0.0), bands=[(-0.46, 0.10, -0.30, 0.25)],
                  plate_shadow=0.5)
    return Camera(640, 360, 640 / 730, -0.035, (-0.09, 0.08), (0, -6)), light, Lens(0.4, 1.5, 1.6)


# name -> (camera, frames per second, where on the line, colour standard, quality)
CLIPS = {"line-a": (camera_a, 20, 0.0, "bt709", 24),
         "line-b": (camera_b, 10, 1330.0, "smpte170m", 22)}


def stage(name, k, plates):
    """Frame `k` of a clip: camera, light, lens, plates in view, how far the belt has run (mm)."""
    camera_of, rate, at_mm, _, _ = CLIPS[name]
    t = k / (LOOP_S * rate)
    run = LOOP_MM * t + at_mm
    placed = []
    for plate, x, y, angle in plates:
        here = (x + run + LOOP_MM / 2) % LOOP_MM - LOOP_MM / 2
        if abs(here) < 760:
            placed.append((plate, here, y, angle))
    return *camera_of(t), placed, run


def frames(name):
    """Yields RGB u8 pictures for one loop."""
    plates, sprites, rate = line(), {}, CLIPS[name][1]
    for k in range(LOOP_S * rate):
        camera, light, lens, placed, run = stage(name, k, plates)
        rng = np.random.default_rng([LINE_SEED, rate, k])
        yield render(camera, light, lens, placed, run, BELT_STYLE, rng, sprites)[0]


def truth(name):
    """The labels of each frame, without drawing it."""
    plates = line()
    for k in range(LOOP_S * CLIPS[name][1]):
        camera, _, _, placed, _ = stage(name, k, plates)
        m = camera.matrix()
        yield np.array([b for p in placed for b in labels(camera, m, *p)]).reshape(-1, 5)


def decoded(name, path):
    """[(RGB u8 as a viewer gets it, boxes)]: what the models are to see on the demo cameras."""
    clip = cv2.VideoCapture(str(path))
    for boxes in truth(name):
        ok, frame = clip.read()
        if not ok:
            raise SystemExit(f"{path} ends early")
        yield frame[..., ::-1], boxes


def encode(name, path):
    """H.264 as a plain camera sends it: 4:2:0, limited range and tagged, no B-frames, 1 s GOPs."""
    camera_of, rate, _, colour, quality = CLIPS[name]
    camera = camera_of(0.0)[0]
    matrix = {"bt709": "bt709", "smpte170m": "bt601"}[colour]
    command = [
        "ffmpeg", "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
        "-s", f"{camera.width}x{camera.height}", "-r", str(rate), "-i", "-",
        "-vf", f"scale=out_color_matrix={matrix}:out_range=tv:flags=accurate_rnd,format=yuv420p",
        "-c:v", "libx264", "-preset", "slow", "-crf", str(quality), "-bf", "0",
        "-g", str(rate), "-keyint_min", str(rate), "-sc_threshold", "0", "-flags", "+cgop",
        "-color_primaries", colour, "-color_trc", colour, "-colorspace", colour,
        "-color_range", "tv", "-threads", "1", "-map_metadata", "-1", "-fflags", "+bitexact",
        "-flags:v", "+bitexact+cgop", "-movflags", "+faststart", str(path)]
    pipe = subprocess.Popen(command, stdin=subprocess.PIPE)
    for image in frames(name):
        pipe.stdin.write(image.tobytes())
    pipe.stdin.close()
    if pipe.wait() != 0:
        raise SystemExit(f"ffmpeg failed on {path}")
