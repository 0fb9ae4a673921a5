#!/usr/bin/env python3
"""The usual way to change a model in Python, beside `noblink bench swap`.

Two cameras (the demo's clips, at their own rate) feed bounded queues that drop the oldest frame; a
thread takes the frames in turn and runs them through Ultralytics. Every few seconds another thread
loads the other ONNX file, runs it once on an empty picture, and replaces the reference under a
lock. Prints what `noblink bench swap --json` prints of its own windows.

Wants: pip install ultralytics onnxruntime opencv-python-headless (none of them is part of noblink).
"""

import argparse
import json
import os
import queue
import random
import threading
import time

os.environ.setdefault("YOLO_OFFLINE", "true")
import cv2  # noqa: E402
import numpy as np  # noqa: E402
from ultralytics import YOLO, __version__  # noqa: E402

MARGIN = 0.5  # half a window, seconds, as in `noblink bench swap`
SPACING = 2.3  # from the first result after a swap to the next swap
QUEUE = 4  # frames, as in noblink

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--model", nargs=2, default=["models/plates-v1.onnx", "models/plates-v2.onnx"])
parser.add_argument("--clip", nargs="+", default=["models/clips/line-a.mp4", "models/clips/line-b.mp4"])
parser.add_argument("--swaps", type=int, default=50)
args = parser.parse_args()

results = [[] for _ in args.clip]  # (time, frame, model) by camera
queues = [queue.Queue() for _ in args.clip]
dropped = [0 for _ in args.clip]
ended = threading.Event()
lock = threading.Lock()


def load(path):
    model = YOLO(path, task="detect")
    model.predict(np.zeros((360, 640, 3), np.uint8), verbose=False)
    return model


def camera(number, path):
    """Decodes a clip over and over, at its own rate."""
    clip, frame, due = cv2.VideoCapture(path), 0, time.monotonic()
    period = 1 / clip.get(cv2.CAP_PROP_FPS)
    while not ended.is_set():
        there, picture = clip.read()
        if not there:
            clip.set(cv2.CAP_PROP_POS_FRAMES, 0)
            continue
        due += period
        time.sleep(max(0, due - time.monotonic()))
        if queues[number].qsize() >= QUEUE:
            try:
                queues[number].get_nowait()
                dropped[number] += 1
            except queue.Empty:
                pass
        queues[number].put((frame, picture))
        frame += 1


def worker():
    while not ended.is_set():
        idle = True
        for number, waiting in enumerate(queues):
            try:
                frame, picture = waiting.get_nowait()
            except queue.Empty:
                continue
            idle = False
            with lock:
                which, model = current
            model.predict(picture, verbose=False)
            results[number].append((time.monotonic(), frame, which))
        if idle:
            time.sleep(0.001)


current = (0, load(args.model[0]))
threads = [threading.Thread(target=camera, args=c) for c in enumerate(args.clip)]
threads.append(threading.Thread(target=worker))
for thread in threads:
    thread.start()
time.sleep(8)
begun = [(len(r), d) for r, d in zip(results, dropped)]
for swap in range(1, args.swaps + 1):
    fresh = load(args.model[swap % 2])
    with lock:
        current = (swap, fresh)
    while any(not r or r[-1][2] < swap for r in results):
        time.sleep(0.01)
    time.sleep(SPACING)
ended.set()
for thread in threads:
    thread.join()


def longest_gap(camera, at):
    pairs = [(a, b) for a, b in zip(camera, camera[1:]) if at - MARGIN <= b[0] <= at + MARGIN]
    return max((1e3 * (b[0] - a[0]) for a, b in pairs), default=None)


def spread(values):
    values = sorted(v for v in values if v is not None)
    at = lambda q: round(values[round((len(values) - 1) * q)], 2)  # noqa: E731
    return {"p50": at(0.5), "p99": at(0.99), "max": at(1)}


swaps, shams = [], []
for seen, (start, _) in zip(results, begun):
    seen = seen[start:]
    for before, after in zip(seen, seen[1:]):
        if after[2] != before[2]:
            swaps.append(longest_gap(seen, after[0]))
            shams.append(longest_gap(seen, after[0] + 3 * MARGIN - random.random() * 0.3))
swap, sham = spread(swaps), spread(shams)
print(json.dumps({
    "ultralytics": __version__,
    "swaps": args.swaps,
    "frames": sum(len(r) - s for r, (s, _) in zip(results, begun)),
    "frames_missing": sum(d - b for d, (_, b) in zip(dropped, begun)),
    "swap": {"gap_ms": swap},
    "sham": {"gap_ms": sham},
    "p99_ratio": round(swap["p99"] / sham["p99"], 3),
}, indent=2))
