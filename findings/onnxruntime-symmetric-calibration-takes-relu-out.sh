#!/usr/bin/env bash
# onnxruntime 1.31.1, onnx 1.23.2: quantize_static takes out a Relu or a Clip whose output is quantized, as the range of the quantized
# numbers does the same. With CalibTensorRangeSymmetric=True, an option of its documentation, the calibrated range goes from minus
# the maximum to the maximum; the Relu is taken out all the same, and negative numbers pass: the quantized model has no
# nonlinearity, and nothing warns. ActivationSymmetric=True keeps the Relu.
#
# Seen: Relu QDQ       default                    error 0.012, smallest output 0.00
#       Relu QOperator default                    error 0.012, smallest output 0.00
#       Relu QDQ       ActivationSymmetric        error 0.015, smallest output 0.00
#       Relu QOperator ActivationSymmetric        error 0.015, smallest output 0.00
#       Relu QDQ       CalibTensorRangeSymmetric  error 1.014, smallest output -8.03
#       Relu QOperator CalibTensorRangeSymmetric  error 1.014, smallest output -8.03
#       Clip QDQ       default                    error 0.011, smallest output 0.00
#       Clip QOperator default                    error 0.011, smallest output 0.00
#       Clip QDQ       ActivationSymmetric        error 0.012, smallest output 0.00
#       Clip QOperator ActivationSymmetric        error 0.012, smallest output 0.00
#       Clip QDQ       CalibTensorRangeSymmetric  error 1.049, smallest output -6.02
#       Clip QOperator CalibTensorRangeSymmetric  error 1.049, smallest output -6.02
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
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

logging.disable(logging.WARNING)
random = np.random.default_rng(0)
rows = random.normal(size=(6, 8, 16)).astype(np.float32)
weight = random.normal(size=(16, 12)).astype(np.float32)


class Rows(CalibrationDataReader):
    def __init__(self):
        self.rows = iter(rows)

    def get_next(self):
        row = next(self.rows, None)
        return None if row is None else {"x": row}


def output(path):
    return InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": rows[0]})[0]


limits = [numpy_helper.from_array(np.float32(0), "low"), numpy_helper.from_array(np.float32(6), "high")]
wrong, right = [], []
for name, inputs in (("Relu", ["h"]), ("Clip", ["h", "low", "high"])):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"], name="linear"), helper.make_node(name, inputs, ["y"], name="act")],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 12])],
        [numpy_helper.from_array(weight, "w")] + (limits if name == "Clip" else []),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), "model.onnx")
    expected = output("model.onnx")
    for options in ({}, {"ActivationSymmetric": True}, {"CalibTensorRangeSymmetric": True}):
        for form in (QuantFormat.QDQ, QuantFormat.QOperator):
            quantize_static("model.onnx", "quantized.onnx", Rows(), quant_format=form, extra_options=options)
            found = output("quantized.onnx")
            error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
            option = next(iter(options), "default")
            print(f"{name} {form.name:<9} {option:<26} error {error:.3f}, smallest output {found.min():.2f}")
            (wrong if "CalibTensorRangeSymmetric" in options else right).append(error)
sys.exit(0 if max(right) < 0.05 and min(wrong) > 0.3 else 1)
PYTHON
