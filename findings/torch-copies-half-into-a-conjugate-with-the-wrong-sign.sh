#!/usr/bin/env bash
# torch 2.13.0 on a CPU: `z.conj().imag` is a view that negates what it shows. Writing a half-precision number into one of a single
# complex number loses the minus: what is read back afterwards has the other sign. From bfloat16 and float64, and into two numbers
# at once, it is right; the quick conversion between half and single precision of dense tensors does not look at the view.
#
# Seen: one number, from float16: wrote 1.0, reads -1.0
#       one number, from bfloat16: wrote 1.0, reads 1.0
#       two numbers, from float16: wrote 1.0, reads 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch


def read_back(numbers, dtype):
    imaginary = torch.zeros(numbers, dtype=torch.complex64).conj().imag
    imaginary.copy_(torch.ones(numbers, dtype=dtype))
    return imaginary[0].item()


half, other, two = read_back(1, torch.float16), read_back(1, torch.bfloat16), read_back(2, torch.float16)
print(f"one number, from float16: wrote 1.0, reads {half}")
print(f"one number, from bfloat16: wrote 1.0, reads {other}")
print(f"two numbers, from float16: wrote 1.0, reads {two}")
sys.exit(0 if (half, other, two) == (-1.0, 1.0, 1.0) else 1)
PYTHON
