"""Makes the goldens of tests/parity.rs: small detectors, a clip, and what Ultralytics finds.

Only developers run this, when a golden must change; the tests need none of it.

    python3 -m venv venv
    venv/bin/pip install torch ultralytics==8.4.190 onnx onnxruntime opencv-python-headless
    venv/bin/python tests/goldens/make.py

and `ffmpeg` with x264 on the PATH for the clips (kept if they exist).

The detectors are ours: a few convolutions with seeded random weights, their class biases set so
that scores spread over 0..1 on the pictures. Nothing here derives from a published network. Boxes
and scores depend on every pixel, which is what makes them a test of preprocessing: one row too
high, one rounding too many and hundreds of scores move.

The pictures are formulas in integers, drawn here and in tests/parity.rs alike.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import ultralytics
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).parent
LABELS = ["ant", "bee", "it's", "dog", "Eule"]
CONFIDENCE, IOU = 0.25, 0.7
# width, height, seed
PICTURES = [
    (1920, 1080, 1),
    (1280, 720, 2),
    (1366, 768, 3),
    (640, 360, 4),
    (480, 854, 5),
    (100, 60, 6),
]
CLIPS = [("clip-1080p", 1920, 1080), ("clip-720p", 1280, 720)]
CLIP_FRAMES = 4


# --- pictures -----------------------------------------------------------------------------------


class Random:
    """Knuth's 64-bit linear congruence; the upper 31 bits."""

    def __init__(self, seed):
        self.state = seed

    def below(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (self.state >> 33) % n


def picture(width, height, seed, shift=0, noise=True):
    """RGB. Gradients, 60 shaded discs and boxes that move by `shift`, and 4 bits of noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    out = np.stack([x * 160 // width, y * 160 // height, (x + y) * 160 // (width + height)], -1)
    random, side = Random(seed), min(width, height)
    for n in range(60):
        cx = random.below(width) + shift * (n % 5)
        cy = random.below(height) + shift * (n % 3)
        radius = side * (3 + random.below(14)) // 100 + 1
        colour = [random.below(256) for _ in range(3)]
        dx, dy = x - cx, y - cy
        far = dx * dx + dy * dy if n % 2 else np.maximum(abs(dx), abs(dy)) ** 2
        inside = far <= radius * radius
        for c in range(3):
            shade = colour[c] - colour[c] * far // (2 * radius * radius)
            out[..., c] = np.where(inside, shade, out[..., c])
    if noise:
        h = (x * 73856093 ^ y * 19349663 ^ seed * 83492791) & 0xFFFFFFFF
        h = (h * 2654435761) & 0xFFFFFFFF
        for c in range(3):
            out[..., c] += (h >> (8 * c + 6)) & 15
    return np.clip(out, 0, 255).astype(np.uint8)


# --- models -------------------------------------------------------------------------------------


class Net:
    """An ONNX graph in the making."""

    def __init__(self, width, height, seed):
        self.width, self.height = width, height
        self.random = np.random.default_rng(seed)
        self.nodes, self.weights, self.count = [], [], 0

    def const(self, name, array):
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op, *inputs, outputs=1, **attributes):
        self.count += 1
        names = [f"{op}{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def conv(self, x, cin, cout, k, stride=1, bias=None, gain=1.0, name=None):
        name = name or f"w{self.count}"
        w = self.random.normal(size=(cout, cin, k, k)) * gain / np.sqrt(cin * k * k)
        b = np.zeros(cout) if bias is None else bias
        self.const(name, w.astype(np.float32))
        self.const(name + "b", b.astype(np.float32))
        return self.node(
            "Conv", x, name, name + "b", kernel_shape=[k, k], strides=[stride] * 2, pads=[k // 2] * 4
        )

    def body(self, cls_bias, cls_gain):
        """Boxes `[1, 4, A]` as distances in strides, scores `[1, classes, A]`, anchors, strides."""
        nc, channels = len(LABELS), [8, 16, 16, 16, 16]
        x, cin, distances, logits, anchors, strides = "images", 3, [], [], [], []
        shift = self.const("half", np.float32(0.5))
        x = self.node("Sub", x, shift)
        flat = [self.const(f"flat{n}", np.array([1, n, -1], np.int64)) for n in (4, nc)]
        for level, cout in enumerate(channels):
            gain = 3.0 if level == 0 else 1.6
            x = self.node("Tanh", self.conv(x, cin, cout, 3, 2, gain=gain))
            cin, stride = cout, 2 << level
            if stride < 8:
                continue
            d = self.node("Softplus", self.conv(x, cin, 4, 1, gain=1.2, bias=np.full(4, 1.3)))
            distances.append(self.node("Reshape", d, flat[0]))
            c = self.conv(x, cin, nc, 1, gain=cls_gain, bias=cls_bias, name=f"cls{stride}")
            logits.append(self.node("Reshape", c, flat[1]))
            gy, gx = np.mgrid[0 : self.height // stride, 0 : self.width // stride]
            anchors.append(np.stack([gx.ravel() + 0.5, gy.ravel() + 0.5]) * stride)
            strides.append(np.full(gx.size, stride))
        a = self.const("anchors", np.concatenate(anchors, 1)[None].astype(np.float32))
        s = self.const("strides", np.concatenate(strides)[None, None].astype(np.float32))
        d = self.node("Mul", self.node("Concat", *distances, axis=2), s)
        lt, rb = self.node("Split", d, axis=1, outputs=2)
        scores = self.node("Sigmoid", self.node("Concat", *logits, axis=2))
        return self.node("Sub", a, lt), self.node("Add", a, rb), scores

    def centred(self, low, high):
        two = self.const("two", np.float32(2))
        middle = self.node("Div", self.node("Add", low, high), two)
        return self.node("Concat", middle, self.node("Sub", high, low), axis=1)

    def ranked(self, boxes, scores, count):
        """`[1, count, 6]`: the best boxes with score and class."""
        best = self.node("ReduceMax", scores, axes=[1], keepdims=1)
        label = self.node("ArgMax", scores, axis=1, keepdims=1)
        label = self.node("Cast", label, to=TensorProto.FLOAT)
        everything = self.node("Concat", boxes, best, label, axis=1)
        flat = self.node("Reshape", best, self.const("flat", np.array([-1], np.int64)))
        _, index = self.node("TopK", flat, self.const("k", np.array([count])), outputs=2)
        chosen = self.node("Gather", everything, index, axis=2)
        return self.node("Transpose", chosen, perm=[0, 2, 1])

    def model(self, out, shape, metadata):
        io = TensorProto.FLOAT
        self.nodes.append(helper.make_node("Identity", [out], ["output0"]))
        graph = helper.make_graph(
            self.nodes,
            "detector",
            [helper.make_tensor_value_info("images", io, [1, 3, self.height, self.width])],
            [helper.make_tensor_value_info("output0", io, shape)],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
        model.ir_version = 8
        model.producer_name = "noblink-goldens"
        names = dict(enumerate(LABELS))
        metadata = {
            "stride": 32,
            "task": "detect",
            "batch": 1,
            "imgsz": [self.height, self.width],
            "names": names,
            "args": {},
            "channels": 3,
            "end2end": False,
            **metadata,
        }
        helper.set_model_props(model, {k: str(v) for k, v in metadata.items()})
        onnx.checker.check_model(model)
        return model


def build(kind, width, height, seed, cls_bias, cls_gain):
    net = Net(width, height, seed)
    low, high, scores = net.body(cls_bias, cls_gain)
    cells = sum((width // s) * (height // s) for s in (8, 16, 32))
    if kind == "yolo8":
        out = net.node("Concat", net.centred(low, high), scores, axis=1)
        return net.model(out, [1, 4 + len(LABELS), cells], {})
    if kind == "end2end":
        out = net.ranked(net.node("Concat", low, high, axis=1), scores, 300)
        return net.model(out, [1, 300, 6], {"end2end": True})
    size = np.array([width, height, width, height], np.float32).reshape(1, 4, 1)
    fractions = net.node("Div", net.centred(low, high), net.const("size", size))
    return net.model(net.ranked(fractions, scores, 300), [1, 300, 6], {"head": "RTDETRDecoder"})


def session(model):
    return onnxruntime.InferenceSession(model.SerializeToString())


def calibrated(kind, width, height, seed):
    """Sets bias and gain of the classes so that a picture has some 200 boxes, of all scores."""
    tensors = []
    for w, h, s in PICTURES[:4]:
        resized = cv2.resize(picture(w, h, s), (width, height))
        tensors.append(resized.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    nc = len(LABELS)
    raw = session(build("yolo8", width, height, seed, np.zeros(nc), 1.0))
    scores = np.concatenate([raw.run(None, {"images": t})[0][0, 4:] for t in tensors], 1)
    logits = np.log(scores / (1 - scores))
    cells = logits.shape[1] / len(tensors)
    low, middle, high = np.quantile(logits, [1 - n / cells for n in (60, 20, 4)], axis=1)
    gain = float(np.median(3.0 / (high - low)))
    return build(kind, width, height, seed, -gain * middle, gain)


def halved(model):
    """Float16 inside and at both ends, as a GPU export has it."""
    from onnxruntime.transformers import float16

    return float16.convert_float_to_float16(model, keep_io_types=False)


# --- goldens ------------------------------------------------------------------------------------


def rows(result):
    """The boxes, clipped to the picture: RT-DETR's predictor leaves that to its user."""
    height, width = result.orig_shape
    edge, out = [width, height, width, height], []
    for *box, score, label in result.boxes.data.cpu().tolist():
        box = [round(min(max(v, 0), e), 2) for v, e in zip(box, edge)]
        out.append([int(label), round(score, 4), *box])
    return out


def clip(name, width, height):
    path = HERE / f"{name}.h264"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            for n in range(CLIP_FRAMES):
                rgb = picture(width, height, 7, shift=6 * n, noise=False)
                cv2.imwrite(f"{folder}/{n}.png", rgb[..., ::-1])
            subprocess.run(
                ["ffmpeg", "-v", "error", "-framerate", "25", "-i", f"{folder}/%d.png"]
                + ["-pix_fmt", "yuv420p", "-c:v", "libx264", "-crf", "24", "-bf", "0"]
                + ["-f", "h264", str(path)],
                check=True,
            )
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert len(frames) == CLIP_FRAMES, len(frames)
    return frames


def main():
    # name, kind, width, height, half
    models = [
        ("yolo8-320", "yolo8", 320, 320, False),
        ("yolo8-640x384", "yolo8", 640, 384, False),
        ("yolo8-640", "yolo8", 640, 640, False),
        ("yolo8-320-half", "yolo8", 320, 320, True),
        ("end2end-416", "end2end", 416, 416, False),
        ("rtdetr-320", "rtdetr", 320, 320, False),
    ]
    clips = {name: clip(name, w, h) for name, w, h in CLIPS}
    pictures = {p: np.ascontiguousarray(picture(*p)[..., ::-1]) for p in PICTURES}
    cases = []
    for seed, (name, kind, width, height, half) in enumerate(models):
        model = calibrated(kind, width, height, seed)
        if half:
            model = halved(model)
        path = HERE / f"{name}.onnx"
        onnx.save(model, path)
        load = ultralytics.RTDETR if kind == "rtdetr" else ultralytics.YOLO
        detector = load(str(path)) if kind == "rtdetr" else load(str(path), task="detect")

        def run(bgr):
            options = dict(conf=CONFIDENCE, iou=IOU, imgsz=[height, width], verbose=False)
            return rows(detector.predict(bgr, device="cpu", **options)[0])

        for (w, h, s), bgr in pictures.items():
            case = {"model": name, "picture": [w, h, s], "boxes": run(bgr)}
            cases.append(case)
        # The clips go through the detectors that see what 601 and chroma do: one each is enough.
        if name in ("yolo8-640", "yolo8-640x384", "rtdetr-320"):
            for clip_name, frames in clips.items():
                for n, bgr in enumerate(frames):
                    cases.append({"model": name, "clip": clip_name, "frame": n, "boxes": run(bgr)})
        print(name, [len(c["boxes"]) for c in cases if c["model"] == name])
    versions = {
        m.__name__: m.__version__ for m in (ultralytics, onnxruntime, onnx, cv2, np)
    }
    text = json.dumps({"versions": versions, "cases": cases}, separators=(",", ":"))
    (HERE / "parity.json").write_text(text.replace('{"model"', '\n{"model"') + "\n")


if __name__ == "__main__":
    main()
