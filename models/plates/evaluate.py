"""AP50 of the exported files on pictures that no training saw, and their time per run."""

import time
from multiprocessing import Pool

import cv2
import numpy as np

from . import CLASSES
from .dataset import draw
from .detect import CONF, overlap

HELDOUT = 600
# The demo cameras' picture sizes, in turn.
SIZES = ((1280, 720), (640, 360))


def _draw_one(job):
    index, folder = job
    cv2.setNumThreads(1)
    width, height = SIZES[index % len(SIZES)]
    image, boxes = draw("heldout", index, width, height)
    cv2.imwrite(str(folder / f"{index}.png"), image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    np.save(folder / f"{index}.npy", boxes)


def heldout(cache, count=HELDOUT):
    """[(RGB u8, boxes)] one by one; drawn at the first call and kept in the cache."""
    folder = cache / "heldout"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(i, folder) for i in range(count) if not (folder / f"{i}.npy").exists()]
    if missing:
        with Pool(2) as pool:
            pool.map(_draw_one, missing, chunksize=8)
    for i in range(count):
        yield cv2.imread(str(folder / f"{i}.png"))[..., ::-1], np.load(folder / f"{i}.npy")


def match(found, truth, least=0.5):
    """For detections of one class and picture, best first: hit or not, each box used once."""
    free = np.ones(len(truth), bool)
    hits = []
    for row in found:
        o = overlap(row[:4], truth) * free if len(truth) else np.zeros(0)
        hit = bool(len(o) and o.max() >= least)
        if hit:
            free[o.argmax()] = False
        hits.append(hit)
    return hits


def average_precision(scores, hits, total):
    """Area under the precision envelope, all points."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    tp = np.cumsum(np.asarray(hits, float)[order])
    recall = tp / total
    precision = tp / np.arange(1, len(tp) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(np.concatenate([[0], recall])) * envelope))


# 0.50, 0.55 .. 0.95: the mean over these rewards boxes that fit, where AP50 alone is at its ceiling.
LIMITS = np.arange(50, 100, 5) / 100


def measure(model, pictures):
    """Per class name: AP50, AP50-95, and recall and precision (IoU 0.5) at the device's threshold."""
    per = {n: {"scores": [], "hits": [[] for _ in LIMITS], "total": 0} for n in model.names}
    for image, boxes in pictures:
        found = model(image, conf=0.001)
        for c, name in enumerate(model.names):
            truth = boxes[boxes[:, 0] == CLASSES.index(name), 1:]
            mine = found[found[:, 5] == c]
            per[name]["scores"] += list(mine[:, 4])
            for hits, least in zip(per[name]["hits"], LIMITS):
                hits += match(mine, truth, least)
            per[name]["total"] += len(truth)
    out = {}
    for name, p in per.items():
        sure = np.asarray(p["scores"]) > CONF
        tp = int(np.sum(np.asarray(p["hits"][0])[sure]))
        ap = [average_precision(p["scores"], hits, p["total"]) for hits in p["hits"]]
        out[name] = {"ap50": ap[0], "ap50_95": float(np.mean(ap)),
                     "recall": tp / p["total"], "precision": tp / max(1, int(sure.sum())),
                     "objects": p["total"]}
    return out


def time_runs(models, rounds=200):
    """Median ms per run, the models taking turns so that a busy moment hits all of them."""
    inputs = [np.random.default_rng(0).random((1, 3, m.height, m.width), dtype=np.float32)
              for m in models]
    times = np.zeros((rounds, len(models)))
    for r in range(-10, rounds):
        for i, (m, x) in enumerate(zip(models, inputs)):
            start = time.perf_counter()
            m.session.run(None, {"images": x})
            if r >= 0:
                times[r, i] = (time.perf_counter() - start) * 1e3
    return np.median(times, 0)
