#!/usr/bin/env bash
# onnxruntime 1.31.1, onnx 1.23.2: a Gemm is alpha * x @ w + beta * c. One whose alpha or beta is not 1, as addmm is exported, is
# quantized by quantize_static into something else, without a word. The documentation of QGemm asks for a bias with the scale
# alpha / beta * scale of x * scale of w; the quantizer multiplies by beta and leaves alpha out. In the QDQ form it sets beta to 1
# and leaves the bias as it was, or worse once the session has optimized that. quantize_dynamic leaves such a Gemm alone.
#
# Seen: alpha 1.0, beta 1.0: float 0.000, QDQ 0.010 (not optimized 0.010), QOperator 0.010
#       alpha 2.0, beta 1.0: float 0.000, QDQ 0.010 (not optimized 0.010), QOperator 0.307
#       alpha 1.0, beta 0.5: float 0.000, QDQ 0.878 (not optimized 0.307), QOperator 0.878
#       alpha 0.5, beta 2.0: float 0.000, QDQ 0.472 (not optimized 0.472), QOperator 0.826
#       alpha 1.0, beta 0.0: float 0.000, QDQ 3.236 (not optimized 0.011), QOperator 3.236
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
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

logging.disable(logging.WARNING)
random = np.random.default_rng(0)
weight, bias = random.normal(size=(16, 12)).astype(np.float32), 3 * random.normal(size=12).astype(np.float32)
rows = random.normal(size=(6, 8, 16)).astype(np.float32)


class Rows(CalibrationDataReader):
    def __init__(self):
        self.rows = iter(rows)

    def get_next(self):
        row = next(self.rows, None)
        return None if row is None else {"x": row}


def off(path, expected, optimized=True):
    options = SessionOptions()
    if not optimized:
        options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": rows[0]})[0]
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


wrong, right = [], []
for alpha, beta in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.5), (0.5, 2.0), (1.0, 0.0)):
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "c"], ["y"], name="gemm", alpha=alpha, beta=beta)],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 12])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "c")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "model.onnx")
    expected = alpha * rows[0] @ weight + beta * bias
    quantize_static("model.onnx", "qdq.onnx", Rows(), quant_format=QuantFormat.QDQ)
    quantize_static("model.onnx", "operators.onnx", Rows(), quant_format=QuantFormat.QOperator)
    found = [off("model.onnx", expected), off("qdq.onnx", expected), off("qdq.onnx", expected, False)]
    found.append(off("operators.onnx", expected))
    print(
        f"alpha {alpha}, beta {beta}: float {found[0]:.3f}, QDQ {found[1]:.3f} (not optimized {found[2]:.3f}), "
        f"QOperator {found[3]:.3f}"
    )
    right.append(found[0])
    (right if alpha == beta == 1 else wrong).append(found[3])
sys.exit(0 if max(right) < 0.03 and min(wrong) > 0.1 else 1)
PYTHON
