"""Network -> one ONNX file: batch norm folded, decode inside, metadata as other exporters write it."""

import io
import warnings

import onnx
import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .net import Deployed

# Fixed, so that the same weights give the same bytes.
DATE = "2025-01-15T00:00:00"
OPSET = 17


def fold(module):
    """Batch norm into the convolution before it, everywhere below `module`."""
    for child in module.children():
        fold(child)
    if isinstance(module, torch.nn.Sequential):
        for i in range(len(module) - 1):
            if isinstance(module[i + 1], torch.nn.BatchNorm2d):
                module[i] = fuse_conv_bn_eval(module[i], module[i + 1])
                module[i + 1] = torch.nn.Identity()


def export(net, names, height, width, version, description, path):
    deployed = Deployed(net, height, width).eval()
    fold(deployed)
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's remarks about the sizes we want fixed
        torch.onnx.export(deployed, (torch.zeros(1, 3, height, width),), buffer, dynamo=False,
                          opset_version=OPSET, input_names=["images"], output_names=["output0"])
    model = onnx.load_from_string(buffer.getvalue())
    model.producer_name, model.producer_version = "noblink", ""
    model.graph.name = "plates"
    model.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {
        "description": description,
        "author": "noblink",
        "date": DATE,
        "version": f"{version}.0.0",
        "license": "MIT OR Apache-2.0",
        "docs": "",
        "stride": "32",
        "task": "detect",
        "batch": "1",
        "imgsz": str([height, width]),
        "names": str(dict(enumerate(names))),
        "noblink.model": "plates",
        "noblink.version": str(version),
    })
    onnx.checker.check_model(model, full_check=True)
    shape = [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim]
    points = sum((height // s) * (width // s) for s in (8, 16, 32))
    assert shape == [1, 4 + len(names), points], shape
    path.write_bytes(model.SerializeToString(deterministic=True))
