"""Makes everything in this folder from nothing: python models/make.py all

Steps, in order: draw, train, quantize, clips, calibration, evaluate, pictures. Each can be run
alone; `train v2` trains one model. Drawn pictures are kept in models/.cache.
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import cv2

from plates import CLASSES, calibration, clips, dataset, evaluate, pictures
from plates.detect import Model
from plates.export import export
from plates.train import train

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
DRAWN = 4000
WIDTHS = (320, 416)
INT8 = "v2-int8"
RANGES = 300  # training pictures that tell the ranges of its tensors
LABELLED = 500  # held-out pictures that it is measured on: as many as noblink's gate takes

# classes, height, width, height of the canvas for most of the training, seed, steps, pictures, set
MODELS = {
    "v1": dict(classes=3, height=320, width=320, canvas=224, seed=1, steps=1500, set="train",
               pictures=1500, text="Plates, dents and holes on an inspection line"),
    "v2": dict(classes=4, height=256, width=416, canvas=256, seed=2, steps=4500, set="train",
               pictures=DRAWN, text="Plates, dents, holes and scratches on an inspection line"),
    "v3": dict(classes=4, height=256, width=416, canvas=256, seed=3, steps=350, set="narrow",
               pictures=32, text="Bad on purpose: v2's network after a wrong training"),
}


def model_path(name):
    return HERE / f"plates-{name}.onnx"


def draw(_):
    dataset.draw_strips("train", DRAWN, WIDTHS, CACHE)
    dataset.draw_strips("narrow", MODELS["v3"]["pictures"], (MODELS["v3"]["width"],), CACHE)
    for _ in evaluate.heldout(CACHE):
        pass


def train_models(names):
    for name in names or MODELS:
        m = MODELS[name]
        count = DRAWN if m["set"] == "train" else m["pictures"]
        widths = WIDTHS if m["set"] == "train" else (m["width"],)
        strips, labels = dataset.draw_strips(m["set"], count, widths, CACHE)
        start = time.time()
        net = train(strips[m["width"]][:m["pictures"]], labels[:m["pictures"]], m["classes"],
                    m["seed"], m["steps"], (m["canvas"], m["height"]), vary=m["set"] == "train")
        export(net, CLASSES[:m["classes"]], m["height"], m["width"], int(name[1:]), m["text"],
               model_path(name))
        print(f"{name}: trained in {(time.time() - start) / 60:.1f} min")


def quantize(_):
    """v2 in int8, by the recipe that is there for any export."""
    ranges, labelled = CACHE / "ranges", CACHE / "labelled"
    calibration.gather(ranges, (dataset.draw("train", i, *dataset.picture_size(i)) for i in range(RANGES)))
    calibration.gather(labelled, islice(evaluate.heldout(CACHE), LABELLED))
    subprocess.run([sys.executable, HERE / "quantize.py", model_path("v2"), model_path(INT8),
                    "--calibration", ranges, "--heldout", labelled], check=True)


def evaluate_models(names):
    names = names or [*MODELS, INT8]
    models = [Model(model_path(n)) for n in names]
    report = {}
    for name, model in zip(names, models):
        report[name] = evaluate.measure(model, evaluate.heldout(CACHE))
        for label, r in report[name].items():
            print(f"{name}  {label:8} AP50 {r['ap50']:.3f}  AP50-95 {r['ap50_95']:.3f}  recall {r['recall']:.3f}  "
                  f"precision {r['precision']:.3f}  of {r['objects']}", flush=True)
    sites = {"calibration": lambda: calibration.read(HERE / "calibration")}
    for clip in clips.CLIPS:
        sites[clip] = lambda c=clip: clips.decoded(c, HERE / "clips" / f"{c}.mp4")
    for site, pictures_of in sites.items():
        for name, model in zip(names, models):
            r = evaluate.measure(model, pictures_of())
            total = sum(v["objects"] for v in r.values())
            recall = sum(v["recall"] * v["objects"] for v in r.values()) / total
            print(f"{site}  {name}  recall {recall:.3f}:  " + "  ".join(
                f"{k} {v['recall']:.3f} (precision {v['precision']:.3f})" for k, v in r.items()),
                flush=True)
    print("median ms per run:", dict(zip(names, evaluate.time_runs(models).round(2).tolist())))
    CACHE.mkdir(exist_ok=True)
    (CACHE / "report.json").write_text(json.dumps(report, indent=1))


def make_clips(_):
    (HERE / "clips").mkdir(exist_ok=True)
    for name in clips.CLIPS:
        clips.encode(name, HERE / "clips" / f"{name}.mp4")


def make_calibration(_):
    calibration.write(HERE / "calibration")


def make_pictures(_):
    pictures.write(HERE)


STEPS = {"draw": draw, "train": train_models, "quantize": quantize, "clips": make_clips,
         "calibration": make_calibration, "evaluate": evaluate_models, "pictures": make_pictures}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["all", *STEPS])
    parser.add_argument("models", nargs="*", choices=[*MODELS, INT8, []],
                        help="train and evaluate: only these")
    args = parser.parse_args()
    cv2.setNumThreads(1)  # the drawing runs in processes of its own
    for name in STEPS if args.step == "all" else [args.step]:
        STEPS[name](args.models)


if __name__ == "__main__":
    main()
