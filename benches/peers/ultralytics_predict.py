"""Ultralytics with its own defaults on a clip, as a stream: an ONNX file, or an OpenVINO folder.

Its latency is the sum of the times that it states of each frame itself.
"""

import argparse
import os

os.environ.setdefault("YOLO_OFFLINE", "true")
import ultralytics  # noqa: E402

from window import Window  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--clip", required=True)
parser.add_argument("--lap", type=float, required=True)
args = parser.parse_args()



def versions():
    found = {"ultralytics": ultralytics.__version__}
    if args.model.endswith(".onnx"):
        import onnxruntime
        found["onnxruntime"] = onnxruntime.__version__
    else:
        import openvino
        compiled = model.predictor.model.backend.ov_compiled_model
        # It takes bf16 by itself where the CPU has it.
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        found["openvino"] = f"{openvino.__version__.split('-')[0]} ({precision})"
    return found


model = ultralytics.YOLO(args.model, task="detect")
window = None
while True:
    for result in model.predict(args.clip, stream=True, verbose=False, device="cpu"):
        window = window or Window(args.lap, versions=versions())
        window.frame(sum(result.speed.values()) / 1e3)
