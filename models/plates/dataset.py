"""Random pictures of the line, and the arrays that training reads.

Every picture has its own seed, made of a set's number and the picture's index: any picture can be
drawn again alone, on any number of processes, and no set shares a seed with another.
"""

from multiprocessing import Pool

import cv2
import numpy as np

from .render import Camera, Lens, Light, render
from .scene import make_plate

SETS = {"train": 1, "heldout": 2, "calibration": 3, "narrow": 4}
# One picture in this many is drawn at 1280x720 and shrunk four times by the letterbox, which
# skips pixels; the rest at 640x360. Both happen on the demo cameras, and they look different.
LARGE_EVERY = 6


def rng_for(name, index):
    return np.random.default_rng([SETS[name], index])


def random_light(rng):
    a = rng.uniform(0, 2 * np.pi)
    bands = [(rng.uniform(-0.6, 0.6), rng.uniform(0.04, 0.22), rng.uniform(-1.2, 1.2),
              rng.uniform(0.2, 0.6)) for _ in range(rng.choice([0, 0, 0, 1, 1, 2]))]
    warm = rng.uniform(-0.09, 0.09)
    return Light(towards=(np.cos(a), np.sin(a)), relief=rng.uniform(0.75, 1.2),
                 exposure=np.exp(rng.uniform(np.log(0.6), np.log(1.4))),
                 tint=(1 + warm, 1 + rng.uniform(-0.02, 0.02), 1 - warm),
                 spot=tuple(rng.uniform(-0.1, 1.1, 2)), shine=rng.uniform(0.1, 0.5),
                 falloff=rng.uniform(0, 0.45), slope=tuple(rng.uniform(-0.3, 0.3, 2)),
                 bands=bands, plate_shadow=rng.uniform(0.2, 0.6))


def random_camera(rng, width, height):
    return Camera(width, height, width / rng.uniform(690, 960), rng.uniform(-0.07, 0.07),
                  tuple(rng.uniform(-0.16, 0.16, 2)), (0.0, rng.uniform(-30, 30)))


def random_lens(rng, width):
    k = width / 640
    return Lens(blur_px=k * max(0, rng.uniform(-0.3, 1.0)), motion_px=k * max(0, rng.uniform(-2, 3.5)),
                noise=max(0, rng.uniform(-1, 7)))


def random_plates(rng):
    """A stretch of the line wider than any camera sees; one picture in twelve has no plate."""
    if rng.random() < 0.08:
        return []
    x = -560 + rng.uniform(0, 400)
    placed = []
    while x < 700:
        kinds = list(rng.choice(["dent", "hole", "scratch"], rng.choice([0, 1, 1, 2, 2, 3])))
        placed.append((make_plate(rng, kinds), x, rng.uniform(-28, 28), rng.normal(0, 0.05)))
        x += rng.uniform(325, 430) if rng.random() < 0.85 else rng.uniform(500, 800)
    return placed


def draw(name, index, width, height):
    """Picture `index` of a set: RGB u8 and its boxes (class, x0, y0, x1, y1) in pixels."""
    rng = rng_for(name, index)
    camera = random_camera(rng, width, height)
    light, lens = random_light(rng), random_lens(rng, width)
    placed = random_plates(rng)
    style, belt_mm = int(rng.integers(0, 18)), rng.uniform(0, 5000)
    if name == "narrow":
        # The wrong training set: one lamp, one camera, one belt, sharp, and never a shadow.
        camera = Camera(width, height, width / 800)
        light, lens, style = Light(towards=(-0.8, -0.6)), Lens(noise=1.0), 0
    image, boxes = render(camera, light, lens, placed, belt_mm, style, rng)
    if name != "narrow" and rng.random() < 0.6:
        # Block artefacts of some kind reach the detector from nearly every camera.
        quality = int(rng.uniform(35, 92))
        _, packed = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        image = cv2.imdecode(packed, cv2.IMREAD_COLOR)[..., ::-1]
    return np.ascontiguousarray(image), np.array(boxes, np.float32).reshape(-1, 5)


def picture_size(index):
    return (1280, 720) if index % LARGE_EVERY == 0 else (640, 360)


def _strip(job):
    """One training picture, already shrunk to both networks' widths, without the grey padding."""
    name, index, widths = job
    cv2.setNumThreads(1)
    width, height = picture_size(index)
    image, boxes = draw(name, index, width, height)
    out = []
    for w in widths:
        # Bilinear, as the letterbox on the device: an area average would train on cleaner pictures.
        out.append(cv2.resize(image, (w, round(height * w / width)), interpolation=cv2.INTER_LINEAR))
    boxes[:, 1:] /= width
    return out, boxes


def draw_strips(name, count, widths, cache, processes=2):
    """Arrays u8 [count, h, w, 3] per width, and boxes in fractions of the picture's width."""
    paths = [cache / f"{name}-{count}-{w}.npy" for w in widths]
    label_path = cache / f"{name}-{count}-labels.npz"
    if not (label_path.exists() and all(p.exists() for p in paths)):
        cache.mkdir(parents=True, exist_ok=True)
        arrays = [np.lib.format.open_memmap(p, "w+", np.uint8, (count, round(w * 9 / 16), w, 3))
                  for p, w in zip(paths, widths)]
        labels = {}
        with Pool(processes) as pool:
            jobs = ((name, i, widths) for i in range(count))
            for i, (images, boxes) in enumerate(pool.imap(_strip, jobs, chunksize=8)):
                for a, image in zip(arrays, images):
                    a[i] = image
                labels[str(i)] = boxes
                if (i + 1) % 500 == 0:
                    print(f"{name}: {i + 1} of {count} drawn", flush=True)
        for a in arrays:
            a.flush()
        np.savez(label_path, **labels)
    boxes = np.load(label_path)
    return {w: np.load(p, mmap_mode="r") for w, p in zip(widths, paths)}, \
           [boxes[str(i)] for i in range(count)]
