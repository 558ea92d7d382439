#!/usr/bin/env bash
# onnxruntime 1.31.1, onnx 1.23.2: a quantized bias has the scale of the layer's input times that of its weights. Where two layers
# have one bias, as after a tool has merged equal initializers, quantize_static with QuantFormat.QOperator quantizes it once, by
# the scales of the first, and the second adds it as if by its own: too large or too small by any factor, without a word. In the
# QDQ form the same model is right.
#
# Seen: one bias         QDQ       error 0.013
#       one bias         QOperator error 0.765
#       two equal biases QDQ       error 0.013
#       two equal biases QOperator error 0.013
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
images = random.normal(size=(6, 2, 6, 8, 8)).astype(np.float32)
first, bias = random.normal(size=(6, 6, 3, 3)).astype(np.float32), 5 * random.normal(size=6).astype(np.float32)
second = 20 * random.normal(size=(6, 6, 3, 3)).astype(np.float32)


class Images(CalibrationDataReader):
    def __init__(self):
        self.images = iter(images)

    def get_next(self):
        image = next(self.images, None)
        return None if image is None else {"x": image}


def output(path):
    return InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": images[0]})[0]


found = {}
for shared in (True, False):
    biases = ("c", "c") if shared else ("c", "d")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "v", biases[0]], ["h"], name="first", pads=[1, 1, 1, 1]),
            helper.make_node("Conv", ["h", "w", biases[1]], ["y"], name="second", pads=[1, 1, 1, 1]),
        ],
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 6, 8, 8])],
        [numpy_helper.from_array(first, "v"), numpy_helper.from_array(second, "w")]
        + [numpy_helper.from_array(bias, name) for name in sorted(set(biases))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), "model.onnx")
    expected = output("model.onnx")
    for form in (QuantFormat.QDQ, QuantFormat.QOperator):
        quantize_static("model.onnx", "quantized.onnx", Images(), quant_format=form)
        error = float(np.linalg.norm(output("quantized.onnx") - expected) / np.linalg.norm(expected))
        found[shared, form] = error
        print(f"{'one bias' if shared else 'two equal biases':<16} {form.name:<9} error {error:.3f}")
wrong = found.pop((True, QuantFormat.QOperator))
sys.exit(0 if wrong > 0.2 and max(found.values()) < 0.05 else 1)
PYTHON
