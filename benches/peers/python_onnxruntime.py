"""The plain way: OpenCV decodes and letterboxes, ONNX Runtime runs, NumPy and OpenCV make boxes.

Also the bare run (`--bare`): the same session on one tensor over and over, and nothing else.
"""

import argparse
import time

import cv2
import numpy as np
import onnxruntime

from window import Window

GREY, CONFIDENCE, IOU = (114, 114, 114), 0.25, 0.7

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--clip", required=True)
parser.add_argument("--lap", type=float, required=True)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--bare", action="store_true")
args = parser.parse_args()

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = args.threads
# As in noblink: long enough for the next node, too short to take the cores from the decoder.
options.add_session_config_entry("session.intra_op.allow_spinning", "1")
options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
session = onnxruntime.InferenceSession(args.model, options, providers=["CPUExecutionProvider"])
entry, output = session.get_inputs()[0].name, session.get_outputs()[0].name
height, width = session.get_inputs()[0].shape[2:]
window = Window(args.lap, versions={"onnxruntime": onnxruntime.__version__, "opencv": cv2.__version__,
                                   "numpy": np.__version__})


def letterbox(picture):
    h, w = picture.shape[:2]
    scale = min(height / h, width / w)
    new_w, new_h = round(w * scale), round(h * scale)
    left, top = round((width - new_w) / 2 - 0.1), round((height - new_h) / 2 - 0.1)
    if (new_w, new_h) != (w, h):
        picture = cv2.resize(picture, (new_w, new_h), interpolation=cv2.INTER_LINEAR)
    picture = cv2.copyMakeBorder(picture, top, height - new_h - top, left, width - new_w - left,
                                 cv2.BORDER_CONSTANT, value=GREY)
    return cv2.dnn.blobFromImage(picture, 1 / 255, swapRB=True), scale, left, top


def detect(picture):
    tensor, scale, left, top = letterbox(picture)
    found = session.run([output], {entry: tensor})[0][0]
    scores = found[4:]
    best = scores.max(0)
    some = best > CONFIDENCE
    found, best, classes = found[:4, some].T, best[some], scores[:, some].argmax(0)
    if not len(best):
        return []
    corner = (found[:, :2] - found[:, 2:] / 2 - (left, top)) / scale
    boxes = np.concatenate([corner, found[:, 2:] / scale], 1)
    kept = cv2.dnn.NMSBoxesBatched(boxes.tolist(), best.tolist(), classes.tolist(), CONFIDENCE, IOU)
    return boxes[kept], best[kept], classes[kept]


def bare():
    tensor = np.random.default_rng(0).random((1, 3, height, width), dtype=np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input(entry, tensor)
    binding.bind_output(output)
    while True:
        began = time.perf_counter()
        session.run_with_iobinding(binding)
        window.frame(time.perf_counter() - began)


def follow():
    clip = cv2.VideoCapture(args.clip)
    while True:
        there, picture = clip.read()
        if not there:
            clip.set(cv2.CAP_PROP_POS_FRAMES, 0)
            continue
        began = time.perf_counter()
        detect(picture)
        window.frame(time.perf_counter() - began)


bare() if args.bare else follow()
