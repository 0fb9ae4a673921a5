"""An exported model the way the device runs it: letterbox, ONNX Runtime, threshold, NMS."""

import ast

import cv2
import numpy as np
import onnxruntime

GREY = 114
CONF = 0.25
NMS_IOU = 0.7
MOST = 300


def open_session(path, threads=2):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Spinning threads would take the cores from whatever else the box does.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def letterbox(image, height, width):
    """RGB u8 -> f32 [1, 3, H, W] in 0..1, the scale, and the padding (left, top)."""
    h, w = image.shape[:2]
    scale = min(height / h, width / w)
    nw, nh = round(w * scale), round(h * scale)
    # -0.1: an odd pixel of padding goes to the right and the bottom.
    left, top = round((width - nw) / 2 - 0.1), round((height - nh) / 2 - 0.1)
    canvas = np.full((height, width, 3), GREY, np.uint8)
    canvas[top:top + nh, left:left + nw] = cv2.resize(image, (nw, nh),
                                                      interpolation=cv2.INTER_LINEAR)
    return canvas.transpose(2, 0, 1)[None].astype(np.float32) / 255, scale, (left, top)


def overlap(box, boxes):
    lo = np.maximum(box[:2], boxes[:, :2])
    hi = np.minimum(box[2:4], boxes[:, 2:4])
    inter = np.prod(np.clip(hi - lo, 0, None), 1)
    area = np.prod(box[2:4] - box[:2]) + np.prod(boxes[:, 2:4] - boxes[:, :2], 1)
    return inter / (area - inter + 1e-9)


def suppress(found):
    """Class-aware greedy NMS over rows (x0, y0, x1, y1, score, class)."""
    found = found[np.argsort(-found[:, 4], kind="stable")]
    kept = []
    while len(found) and len(kept) < MOST:
        first, found = found[0], found[1:]
        kept.append(first)
        found = found[(found[:, 5] != first[5]) | (overlap(first, found) <= NMS_IOU)]
    return np.array(kept).reshape(-1, 6)


class Model:
    def __init__(self, path, threads=2):
        self.session = open_session(path, threads)
        self.height, self.width = self.session.get_inputs()[0].shape[2:]
        meta = self.session.get_modelmeta().custom_metadata_map
        self.names = list(ast.literal_eval(meta["names"]).values())

    def __call__(self, image, conf=CONF):
        """Rows (x0, y0, x1, y1, score, class) in the picture's pixels, best first."""
        tensor, scale, (left, top) = letterbox(image, self.height, self.width)
        out = self.session.run(None, {"images": tensor})[0][0].T
        out = out[out[:, 4:].max(1) > conf]
        half = out[:, 2:4] / 2
        score = out[:, 4:]
        found = np.concatenate([out[:, :2] - half, out[:, :2] + half, score.max(1)[:, None],
                                score.argmax(1)[:, None]], 1)
        kept = suppress(found)
        kept[:, :4] = (kept[:, :4] - (left, top, left, top)) / scale
        h, w = image.shape[:2]
        kept[:, :4] = np.clip(kept[:, :4], 0, (w, h, w, h))
        return kept
