#!/usr/bin/env bash
# diffrax 0.7.2, jax 0.10.2: with use_levy=True a Brownian path returns, beside the increment W and the areas, the time dt of the
# increment. VirtualBrownianTree works on [0, 1] and scales back by the length of its interval: W by the square root, dt by the
# length. If the shape of the path is a tree (a tuple or a dict, as for a state of several parts), dt is scaled by the square root,
# too: of a tree over [0, 4], an increment from 1 to 3 says that it takes 1. UnsafeBrownianPath, and a plain array, are right.
#
# Seen: increment from 1 to 3 of a path over [0, 4]
#       VirtualBrownianTree of an array: dt 2.00; of a dict: dt 1.00, variance of W 2.0
#       UnsafeBrownianPath of an array: dt 2.00; of a dict: dt 2.00, variance of W 2.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile diffrax==0.7.2 jax==0.10.2 jaxlib==0.10.2 \
    equinox==0.13.8 numpy==2.4.6 2> /dev/null
JAX_PLATFORMS=cpu "$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import diffrax
import jax
import jax.numpy as jnp

array = jax.ShapeDtypeStruct((), jnp.float32)


def tree(shape, key):
    path = diffrax.VirtualBrownianTree(0.0, 4.0, 0.01, shape, key, levy_area=diffrax.SpaceTimeLevyArea)
    return path.evaluate(1.0, 3.0, use_levy=True)


def unsafe(shape, key):
    return diffrax.UnsafeBrownianPath(shape, key, levy_area=diffrax.SpaceTimeLevyArea).evaluate(1.0, 3.0, use_levy=True)


print("increment from 1 to 3 of a path over [0, 4]")
found = {}
for name, path in {"VirtualBrownianTree": tree, "UnsafeBrownianPath": unsafe}.items():
    single = float(path(array, jax.random.key(0)).dt)
    keys = jax.random.split(jax.random.key(1), 20000)
    dts, values = jax.jit(jax.vmap(lambda key, path=path: (lambda x: (x.dt["a"], x.W["a"]))(path({"a": array}, key))))(keys)
    dt, variance = float(dts[0]), float(values.var())
    print(f"{name} of an array: dt {single:.2f}; of a dict: dt {dt:.2f}, variance of W {variance:.1f}")
    found[name] = round(single, 3), round(dt, 3), round(variance)
sys.exit(0 if found == {"VirtualBrownianTree": (2.0, 1.0, 2), "UnsafeBrownianPath": (2.0, 2.0, 2)} else 1)
PYTHON
