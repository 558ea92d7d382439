#!/usr/bin/env bash
# triton 3.9.0, torch 2.13.0: a cast to a narrower float rounds to the nearest (tl.cast: fp_downcast_rounding, "rtne" by default). Under
# TRITON_INTERPRET=1 a cast from float32 to bfloat16, which the interpreter does support beside its missing bfloat16 arithmetic, cuts
# the lower bits off. A cast to an 8-bit float rounds, but joins exponent and significand by OR: where the significand carries into
# an odd exponent, the carry is lost, and what lies just below 2, 8 or 32 becomes 1, 4 or 16.
#
# Seen: bfloat16     of 4096 random numbers 2047 differ from the nearest, all of them towards 0
#       float8e4nv   1.95 -> 1 (nearest 2), 3.9 -> 4 (nearest 4), 7.8 -> 4 (nearest 8), 31 -> 16 (nearest 32)
#       float8e5     1.95 -> 1 (nearest 2), 3.9 -> 4 (nearest 4), 7.8 -> 4 (nearest 8), 31 -> 16 (nearest 32)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 triton==3.9.0 numpy==2.4.6 2> /dev/null
cat > "$folder/casts.py" << 'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, out, N: tl.constexpr, TO: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(TO).to(tl.float32))


def interpreted(x, kind):
    out = torch.empty_like(x)
    cast[(1,)](x, out, len(x), kind)
    return out


torch.manual_seed(0)
x = torch.randn(4096)
found, nearest = interpreted(x, tl.bfloat16), x.bfloat16().float()
differ = found != nearest
lower = bool((found.abs() < nearest.abs())[differ].all())
print(f"bfloat16     of {len(x)} random numbers {int(differ.sum())} differ from the nearest, ", end="")
print("all of them towards 0" if lower else "not all towards 0")
as_stated = lower and int(differ.sum()) > 1000
numbers = torch.tensor([1.95, 3.9, 7.8, 31.0])
for name, same in (("float8e4nv", torch.float8_e4m3fn), ("float8e5", torch.float8_e5m2)):
    found, nearest = interpreted(numbers, getattr(tl, name)), numbers.to(same).float()
    pairs = [f"{a:.3g} -> {b:.3g} (nearest {c:.3g})" for a, b, c in zip(numbers.tolist(), found.tolist(), nearest.tolist())]
    print(f"{name:<12} {', '.join(pairs)}")
    as_stated &= found.tolist() == [1.0, 4.0, 4.0, 16.0] and nearest.tolist() == [2.0, 4.0, 8.0, 32.0]
sys.exit(0 if as_stated else 1)
PYTHON
TRITON_INTERPRET=1 "$folder/env/bin/python" -W ignore "$folder/casts.py"
