"""The model card's pictures: what the models see on the decoded clips."""

import cv2
import numpy as np

from . import clips
from .detect import Model

# BGR, as OpenCV draws; bright on steel and on the belt alike.
COLOURS = {"plate": (120, 220, 60), "dent": (255, 140, 30), "hole": (60, 60, 255),
           "scratch": (0, 220, 255)}


def draw_boxes(image, found, names):
    """BGR u8 picture with boxes and scores, for people."""
    out = image.copy()
    k = max(1, round(out.shape[1] / 640))
    for x0, y0, x1, y1, score, c in found:
        name = names[int(c)]
        a, b = (int(x0), int(y0)), (int(x1), int(y1))
        cv2.rectangle(out, a, b, COLOURS[name], k)
        text = f"{name} {score:.2f}"
        (tw, th), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4 * k, k)
        top = max(th + 3, a[1])
        cv2.rectangle(out, (a[0], top - th - 3), (a[0] + tw + 2, top), COLOURS[name], -1)
        cv2.putText(out, text, (a[0] + 1, top - 2), cv2.FONT_HERSHEY_SIMPLEX, 0.4 * k, (0, 0, 0),
                    k, cv2.LINE_AA)
    return out


def write(here):
    """The same frame of each camera by v1 and by v2: the newer one knows scratches."""
    (here / "pictures").mkdir(exist_ok=True)
    models = [Model(here / f"plates-{v}.onnx") for v in ("v1", "v2")]
    for name, at in (("line-a", 130), ("line-b", 60)):
        frame, _ = list(clips.decoded(name, here / "clips" / f"{name}.mp4"))[at]
        seen = [cv2.resize(draw_boxes(frame[..., ::-1], m(frame), m.names), (640, 360),
                           interpolation=cv2.INTER_AREA) for m in models]
        cv2.imwrite(str(here / "pictures" / f"{name}-v1-v2.jpg"), np.hstack(seen),
                    [cv2.IMWRITE_JPEG_QUALITY, 82])
