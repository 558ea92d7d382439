#!/usr/bin/env bash
# onnxruntime 1.31.1, onnx 1.23.2: with CalibMaxIntermediateOutputs=n, min-max calibration is to merge its ranges every n samples
# and to "produce the same result" as without. As soon as n samples are collected, they are thrown away before a range is
# computed: the ranges are those of the samples behind the last multiple of n, and the quantized model clips what lies outside.
# With a multiple of n, nothing is left, which is an error. CalibMovingAverageConstant has no effect: quantize_static takes the
# plain mean of all samples.
#
# Seen: range of 8, 1, 1, 1, 1: 7.97; merged every two samples 1.00, every three 1.00
#       range of 8, 1, 1, 1, merged every two samples: No data is collected.
#       moving average with a constant of 0.01, 0.5 and 1: 2.39, 2.39, 2.39
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6 2> /dev/null
cd "$folder"
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import logging
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

logging.disable(logging.WARNING)
weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"])],
    "identity",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4])],
    [weight],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
onnx.save(model, "model.onnx")


class Samples(CalibrationDataReader):
    """Samples with maxima of 8, 1, 1 and so on."""

    def __init__(self, count):
        self.rows = iter([8.0] + [1.0] * (count - 1))

    def get_next(self):
        top = next(self.rows, None)
        return None if top is None else {"x": np.array([[-top, 0, top / 2, top]], dtype=np.float32)}


def largest(count, method=CalibrationMethod.MinMax, **options):
    """The largest number that the quantized identity lets through, after a calibration on some samples."""
    quantize_static(
        "model.onnx",
        "quantized.onnx",
        Samples(count),
        activation_type=QuantType.QInt8,
        calibrate_method=method,
        extra_options=options,
    )
    session = InferenceSession("quantized.onnx", providers=["CPUExecutionProvider"])
    return float(session.run(None, {"x": np.full((1, 4), 100, dtype=np.float32)})[0].max())


full = [largest(5), largest(5, CalibMaxIntermediateOutputs=2), largest(5, CalibMaxIntermediateOutputs=3)]
print(f"range of 8, 1, 1, 1, 1: {full[0]:.2f}; merged every two samples {full[1]:.2f}, every three {full[2]:.2f}")
try:
    error = f"{largest(4, CalibMaxIntermediateOutputs=2):.2f}"
except ValueError as caught:
    error = str(caught)
print(f"range of 8, 1, 1, 1, merged every two samples: {error}")
means = [largest(5, CalibMovingAverage=True, CalibMovingAverageConstant=constant) for constant in (0.01, 0.5, 1.0)]
print("moving average with a constant of 0.01, 0.5 and 1:", ", ".join(f"{mean:.2f}" for mean in means))
as_stated = full[0] > 7.9 and max(full[1:]) < 1.1 and "No data" in error and np.ptp(means) == 0
sys.exit(0 if as_stated else 1)
PYTHON
