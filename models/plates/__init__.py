"""The demo models' workshop: draws an inspection line, trains, exports and measures detectors.

`scene` and `render` draw; `dataset` turns drawings into tensors; `net`, `train` and `export`
make the ONNX files; `evaluate`, `clips` and `calibration` use them. Nothing here runs on a device.
"""

# The order is the class id everywhere: labels, networks, calibration folder.
CLASSES = ("plate", "dent", "hole", "scratch")
