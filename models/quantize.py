#!/usr/bin/env python3
"""Makes an int8 model of a YOLO export, and writes it only if it still finds what the float one finds.

    python models/quantize.py best.onnx best-int8.onnx --calibration site --heldout labelled

Both folders have noblink's calibration form (images/, labels/ with YOLO text, data.yaml). The pictures of
--calibration tell the range of each tensor: a few hundred of the site's own, labels not needed. The
labels of --heldout tell what int8 costs; without it every second picture of --calibration is kept
apart for that. The numbers are those of `noblink model validate`: the gates that the file has to pass.

Weights are int8 by channel, activations uint8: the pair that VNNI multiplies. (int8 activations are
as good with OpenVINO, but several times slower than float in ONNX Runtime's CPU provider.) The head,
from the last convolutions on, stays in float: it puts box edges up to 640 and scores up to 1 into one
tensor, and 255 steps can't hold both.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import (CalibrationDataReader, QuantFormat, QuantType,
                                      quant_pre_process, quantize_static)
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

from plates.detect import letterbox

ROOT = Path(__file__).resolve().parent.parent
PICTURES_MAX = 500  # as many as noblink's calibration gate takes
CONVOLUTIONS = ["Conv", "Relu", "Clip", "LeakyRelu", "Add", "Concat", "Split", "MaxPool", "Resize"]
SILU = ["Sigmoid", "HardSigmoid", "Mul"]


def fail(text, code=2):
    print(f"quantize: {text}", file=sys.stderr)
    sys.exit(code)


def call(noblink, *args):
    """What a command of noblink prints as JSON; it says by its exit code what the JSON says as well."""
    done = subprocess.run([noblink, *args, "--json"], capture_output=True, text=True)
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        fail(f"{' '.join(map(str, args[:2]))} failed: {done.stderr.strip()}", 1)


def inspect(noblink, path):
    """The file's contract: name, size and kind of the input, id and version."""
    said = call(noblink, "model", "inspect", path)
    if "refused" in said:
        fail(f"noblink can't run it: {said['refused']['message']}")
    contract = said["detector"]
    if contract["input"]["dtype"] != "f32":
        fail(f"{path} has {contract['input']['dtype']} input: export it without half=True")
    return contract


def pictures(folder):
    found = sorted(p for p in (folder / "images").glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not found:
        fail(f"{folder} has no .jpg or .png in images/: put pictures of the site there "
             "(`noblink model calibrate --camera ID --count 300` saves a camera's)")
    step = -(-len(found) // PICTURES_MAX)
    return found[::step]


def subset(folder, images, into):
    """A calibration folder of these pictures of another."""
    for sub in ("images", "labels"):
        (into / sub).mkdir(parents=True)
    for image in images:
        shutil.copy(image, into / "images")
        label = folder / "labels" / f"{image.stem}.txt"
        if label.exists():
            shutil.copy(label, into / "labels")
    if (folder / "data.yaml").exists():
        shutil.copy(folder / "data.yaml", into)
    return into


class Tensors(CalibrationDataReader):
    """Pictures as the device puts them into the model."""

    def __init__(self, images, wanted):
        self.images, self.wanted = iter(images), wanted

    def get_next(self):
        path = next(self.images, None)
        if path is None:
            return None
        image = cv2.imread(str(path))
        if image is None:
            fail(f"{path} is no picture that can be read: remove it")
        w = self.wanted
        if w["order"] == "rgb":
            image = image[..., ::-1]
        if w["fit"] == "stretch":
            image = cv2.resize(image, (w["width"], w["height"]), interpolation=cv2.INTER_LINEAR)
        tensor = letterbox(image, w["height"], w["width"])[0]
        return {w["name"]: tensor * 255 if w["scale"] == "byte" else tensor}


def head(model):
    """Names of the nodes that stay in float: from the last convolutions over the picture's grid on.

    Found by walking back from the outputs. A convolution whose input has the shape of the picture,
    divided by a whole number, looks at the picture; one within the decoding (DFL: 4 by all anchors) does not.
    """
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
              for v in [*model.graph.value_info, *model.graph.input]}
    height, width = shapes[model.graph.input[0].name][2:]

    def looks_at_the_picture(node):
        shape = shapes.get(node.input[0], [])
        if node.op_type != "Conv" or len(shape) != 4 or 0 in shape:
            return False
        (down, rest_h), (across, rest_w) = divmod(height, shape[2]), divmod(width, shape[3])
        return down == across and rest_h == rest_w == 0

    makers = {name: node for node in model.graph.node for name in node.output}
    kept, waiting = set(), [o.name for o in model.graph.output]
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and node.name not in kept:
            kept.add(node.name)
            if not looks_at_the_picture(node):
                waiting += node.input
    return kept


def ease(graph, opset):
    """Writes a softmax whose only use is a weighted sum of its bins (DFL) as a quotient of two sums.

    The same to rounding. The bins lie across memory, for which ONNX Runtime's softmax has no quick
    way: of YOLOv8n's int8 run it was 14 %.
    """
    weights = {i.name: i for i in graph.initializer}
    for softmax in [n for n in graph.node if n.op_type == "Softmax"]:
        users = [n for n in graph.node if softmax.output[0] in n.input]
        axis = next((a.i for a in softmax.attribute if a.name == "axis"), -1)
        if len(users) != 1 or users[0].op_type != "Conv" or axis != 1 or len(users[0].input) != 2:
            continue
        conv = users[0]
        bins = numpy_helper.to_array(weights[conv.input[1]]) if conv.input[1] in weights else None
        if bins is None or bins.shape[0] != 1 or bins.shape[2:] != (1, 1):
            continue
        name = f"{conv.output[0]}/eased"
        ones, axes = f"{name}/ones", f"{name}/axes"
        graph.initializer.append(numpy_helper.from_array(np.ones_like(bins), ones))
        most = {"inputs": [softmax.input[0]], "axes": [1]}
        if opset >= 18:  # where ReduceMax takes its axes as an input
            graph.initializer.append(numpy_helper.from_array(np.array([1]), axes))
            most = {"inputs": [softmax.input[0], axes]}
        step = [helper.make_node("ReduceMax", outputs=[f"{name}/max"], keepdims=1, **most),
                helper.make_node("Sub", [softmax.input[0], f"{name}/max"], [f"{name}/below"]),
                helper.make_node("Exp", [f"{name}/below"], [f"{name}/exp"]),
                helper.make_node("Conv", [f"{name}/exp", conv.input[1]], [f"{name}/weighted"]),
                helper.make_node("Conv", [f"{name}/exp", ones], [f"{name}/sum"]),
                helper.make_node("Div", [f"{name}/weighted", f"{name}/sum"], list(conv.output))]
        at = list(graph.node).index(softmax)
        graph.node.remove(softmax)
        graph.node.remove(conv)
        for offset, node in enumerate(step):
            graph.node.insert(at + offset, node)


def prepared(source, contract, work):
    """The model with fixed shapes, folded constants, and a name for each node."""
    model = onnx.load(source)
    for name, size in contract["fixed"]:
        make_dim_param_fixed(model.graph, name, size)
    if any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in model.graph.node):
        fail(f"{source} is quantized already: give the float model that it was made of")
    ease(model.graph, max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")))
    onnx.save(model, work / "static.onnx")
    quant_pre_process(work / "static.onnx", work / "prepared.onnx", skip_symbolic_shape=True)
    model = onnx.load(work / "prepared.onnx")
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    onnx.save(model, work / "prepared.onnx")
    return model


def write(draft, source, contract, images, target):
    """The quantized graph with the metadata of its parent, and where it comes from."""
    model, parent = onnx.load(draft), onnx.load(source, load_external_data=False)
    metadata = {p.key: p.value for p in parent.metadata_props}
    metadata["noblink.model"] = contract["id"]
    if "noblink.version" in metadata:
        metadata["noblink.version"] += "-int8"
    metadata["noblink.parent"] = contract["sha256"]
    metadata["noblink.quantized"] = f"QDQ, uint8 activations, int8 weights by channel, {images} pictures"
    onnx.helper.set_model_props(model, metadata)
    used = [o for o in model.opset_import if o.domain in ("", *(n.domain for n in model.graph.node))]
    del model.opset_import[:]
    model.opset_import.extend(used)
    model.producer_name, model.producer_version = parent.producer_name, parent.producer_version
    onnx.save(model, target)


def validate(noblink, candidate, active, heldout, args, work):
    """What the gates say of the candidate beside the float model."""
    config = work / "noblink.toml"
    config.write_text("\n".join([
        '[device]', 'id = "quantize"', '[mqtt]', 'embedded = true',
        '[inference]', f'threads = {args.threads}', f'provider = "{args.provider}"',
        '[models]', 'proving_cpu_s = 3600', 'latency_ratio_max = 100.0',
        '[models.calibration]', f'dir = {json.dumps(str(heldout.resolve()))}', f'margin = {max(0.05, args.max_drop)}']))
    said = call(noblink, "model", "validate", candidate, "--config", config, "--active", active)
    reason = (said["reason"] or {}).get("message", "")
    return said, reason.replace(str(heldout.resolve()), str(args.heldout or args.calibration))


def row(name, file, marks, times, who):
    """A line of the table; `who` is candidate or active. Without times: the latency gate was not reached."""
    shares = "".join(f"{marks[who][key]:>11.4f}" for key in ("ap50", "recall", "precision"))
    wall, cpu = (f"{times[key]:.2f}" if key in times else "-" for key in (f"{who}_wall_ms", f"{who}_cpu_ms"))
    print(f"{name:<28}{file.stat().st_size / 1e6:>9.2f}{shares}{wall:>10}{cpu:>9}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the float model")
    parser.add_argument("out", type=Path, help="the int8 model to write")
    parser.add_argument("--calibration", type=Path, required=True, metavar="DIR", help="pictures to take the ranges of")
    parser.add_argument("--heldout", type=Path, metavar="DIR", help="labelled pictures to measure on")
    parser.add_argument("--max-drop", type=float, default=0.01, metavar="AP50", help="the most that may be lost (0.01)")
    parser.add_argument("--threads", type=int, default=2, help="of one run, for the times (2)")
    parser.add_argument("--provider", default="cpu", help="noblink's provider that measures (cpu)")
    parser.add_argument("--noblink", default=None, metavar="PROGRAM", help="target/release/noblink, else that of PATH")
    args = parser.parse_args()

    built = ROOT / "target/release/noblink"
    noblink = args.noblink or (built if built.exists() else shutil.which("noblink"))
    if noblink is None or shutil.which(noblink) is None:
        fail(f"there is no {noblink or built}, which measures: run `make build`, or name it by --noblink")
    for path in (args.model, args.calibration, *([args.heldout] if args.heldout else [])):
        if not path.exists():
            fail(f"{path} is not there")
    logging.getLogger().setLevel(logging.ERROR)  # the quantizer's advice to do what is done below
    contract = inspect(noblink, args.model)
    images = pictures(args.calibration)
    with tempfile.TemporaryDirectory() as work:
        work, heldout = Path(work), args.heldout
        if heldout is None:
            if len(images) < 2:
                fail(f"{args.calibration} has one picture: more, or --heldout, are needed to measure")
            heldout, images = subset(args.calibration, images[1::2], work / "heldout"), images[::2]
        written = attempt_all(noblink, contract, images, heldout, args, work)
    if not written:
        fail(f"nothing was written. More and more varied pictures in {args.calibration} may help; "
             "--max-drop allows more", 1)


def attempt_all(noblink, contract, images, heldout, args, work):
    model = prepared(args.model, contract, work)
    kept = head(model)
    quantized = sum(n.op_type == "Conv" and n.name not in kept for n in model.graph.node)
    if quantized == 0:
        fail(f"no convolution of {args.model} looks at the picture: its head can't be told from the rest")
    print(f"{len(images)} pictures for the ranges; {quantized} convolutions become int8, "
          f"the head's {len(kept)} nodes stay in float\n")
    print(f"{'':<28}{'MB':>9}{'AP50':>11}{'recall':>11}{'precision':>11}{'frame, ms':>10}{'CPU, ms':>9}")
    attempts = {"int8": CONVOLUTIONS + SILU, "int8, SiLU in float": CONVOLUTIONS}
    # The first is faster and the second closer, but OpenVINO fuses a float SiLU into its convolution.
    if not any(n.op_type in SILU and n.name not in kept for n in model.graph.node):
        del attempts["int8, SiLU in float"]
    elif args.provider == "openvino":
        del attempts["int8"]
    told = False
    for name, kinds in attempts.items():
        quantize_static(work / "prepared.onnx", work / "draft.onnx", Tensors(images, contract["input"]),
                        quant_format=QuantFormat.QDQ, op_types_to_quantize=kinds, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                        nodes_to_exclude=sorted(kept))
        candidate = work / "candidate.onnx"
        write(work / "draft.onnx", args.model, contract, len(images), candidate)
        said, reason = validate(noblink, candidate, args.model, heldout, args, work)
        gates = {g["gate"]: g for g in said["gates"]}
        marks, times = (gates.get(gate, {}).get("numbers", {}) for gate in ("calibration", "latency"))
        if not {"candidate", "active"} <= marks.keys():
            print(f"{name}\n  refused: {reason or gates['latency']['message']}")
            continue
        if marks["candidate"]["ap50"] is None:
            fail(f"{args.heldout or args.calibration} labels nothing that the model knows: "
                 f"{gates['calibration']['message']}")
        if not marks["active"]["ap50"]:
            fail(f"{args.model} finds nothing of what {args.heldout or args.calibration} labels: what int8 costs can't "
                 "be measured with it")
        if not told:
            row("float", args.model, marks, times, "active")
            told = True
        row(name, candidate, marks, times, "candidate")
        lost = marks["active"]["ap50"] - marks["candidate"]["ap50"]
        if not said["accepted"]:
            print(f"  refused: {reason}")
        elif lost > args.max_drop:
            print(f"  refused: AP50 fell by {lost:.4f}, {args.max_drop} is allowed (--max-drop)")
        else:
            shutil.copy(candidate, args.out)
            digest = hashlib.sha256(args.out.read_bytes()).hexdigest()
            print(f"\n{args.out}: sha256 {digest[:12]}…, AP50 {round(-lost, 4) + 0.0:+.4f}, "
                  f"CPU time a frame {times['ratio']:.3f} of float's")
            return True
    return False


if __name__ == "__main__":
    main()
