"""The calibration folder of the demo site: pictures with exact labels for the update gates."""

import cv2
import numpy as np

from . import CLASSES
from .dataset import draw

COUNT = 28
SIZE = (640, 360)
BYTES_MAX = 30_000


def write(folder):
    _empty(folder)
    written = index = 0
    while written < COUNT:
        image, boxes = draw("calibration", index, *SIZE)
        index += 1
        # A picture without plates proves little here; one empty belt is kept for false alarms.
        if len(boxes) < 3 and written != COUNT // 2:
            continue
        name = f"line-{written:02}"
        quality, packed = 90, None
        while packed is None or len(packed) > BYTES_MAX:
            _, packed = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
            quality -= 4
        (folder / "images" / f"{name}.jpg").write_bytes(packed.tobytes())
        _label(folder, name, boxes, SIZE)
        written += 1


def gather(folder, pictures):
    """The same form, lossless, of other pictures: (RGB u8, boxes) one by one."""
    _empty(folder)
    for index, (image, boxes) in enumerate(pictures):
        name = f"{index:04}"
        cv2.imwrite(str(folder / "images" / f"{name}.png"), image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
        _label(folder, name, boxes, (image.shape[1], image.shape[0]))


def _empty(folder):
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        for old in (folder / sub).iterdir():
            old.unlink()
    names = "\n".join(f"  {i}: {n}" for i, n in enumerate(CLASSES))
    (folder / "data.yaml").write_text(
        "# Drawn by models/make.py; labels are exact.\npath: .\ntrain: images\nval: images\n"
        f"names:\n{names}\n")


def _label(folder, name, boxes, size):
    (folder / "labels" / f"{name}.txt").write_text("".join(_line(b, size) for b in boxes))


def _line(box, size):
    w, h = size
    c, x0, y0, x1, y1 = box
    return (f"{int(c)} {(x0 + x1) / 2 / w:.6f} {(y0 + y1) / 2 / h:.6f} "
            f"{(x1 - x0) / w:.6f} {(y1 - y0) / h:.6f}\n")


def read(folder):
    """[(RGB u8, boxes in pixels)] as the device reads the folder."""
    for path in sorted((folder / "images").iterdir()):
        image = cv2.imread(str(path))[..., ::-1]
        h, w = image.shape[:2]
        boxes = []
        for line in (folder / "labels" / f"{path.stem}.txt").read_text().splitlines():
            c, x, y, bw, bh = (float(v) for v in line.split())
            boxes.append((c, (x - bw / 2) * w, (y - bh / 2) * h, (x + bw / 2) * w, (y + bh / 2) * h))
        yield image, np.array(boxes).reshape(-1, 5)
