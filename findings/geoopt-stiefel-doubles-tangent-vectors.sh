#!/usr/bin/env bash
# geoopt 0.5.1, torch 2.13.0: on the canonical Stiefel manifold, the default (matrices with orthonormal columns: learned rotations and
# subspaces), proju is documented as the projection onto the tangent space. It is U − X·Uᵀ·X, the gradient's formula: of a vector X·A + B
# that is tangent already it makes 2·X·A + B, and each further call doubles the rotation again. expmap, documented as the
# exponential map, is the Cayley retraction: on the circle, of a tangent vector of length t it goes 2·atan(t / 2), never half way round.
# With canonical=False both are right.
#
# Seen: Stiefel(canonical): norm of a tangent vector 4.07, after proju 5.88, after proju twice 10.34
#       Stiefel(euclidean): norm of a tangent vector 4.07, after proju 4.07, after proju twice 4.07
#       Stiefel(canonical): expmap along the circle by 1.571, 3.142: at 1.332, 2.008
#       Stiefel(euclidean): expmap along the circle by 1.571, 3.142: at 1.571, 3.142
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 scipy==1.17.1 geoopt==0.5.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import math
import sys

import geoopt
import torch

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.linalg.qr(torch.randn(6, 3)).Q
turn = torch.randn(3, 3)
inside, outside = x @ (turn - turn.T), torch.randn(6, 3)
outside = outside - x @ (x.T @ outside)
tangent = inside + outside
at, angles, results = torch.tensor([[1.0], [0.0]]), (math.pi / 2, math.pi), {}
manifolds = geoopt.Stiefel(), geoopt.Stiefel(canonical=False)
for manifold in manifolds:
    assert manifold.check_vector_on_tangent(x, tangent)
    once = manifold.proju(x, tangent)
    twice = manifold.proju(x, once)
    norms = [float(vector.norm()) for vector in (tangent, once, twice)]
    print(f"{manifold.name}: norm of a tangent vector {norms[0]:.2f}, after proju {norms[1]:.2f}, after proju twice {norms[2]:.2f}")
    results[manifold.name] = once, twice
for manifold in manifolds:
    ends = [manifold.expmap(at, torch.tensor([[0.0], [angle]])) for angle in angles]
    places = [abs(math.atan2(float(end[1]), float(end[0]))) for end in ends]
    print(f"{manifold.name}: expmap along the circle by {angles[0]:.3f}, {angles[1]:.3f}: at {places[0]:.3f}, {places[1]:.3f}")
    results[manifold.name] += (places,)
(once, twice, places), (once_right, _, places_right) = results.values()
as_stated = torch.allclose(once, 2 * inside + outside) and torch.allclose(twice, 4 * inside + outside)
as_stated &= torch.allclose(once_right, tangent) and all(abs(a - b) < 1e-9 for a, b in zip(places_right, angles))
as_stated &= all(abs(place - 2 * math.atan(angle / 2)) < 1e-9 for place, angle in zip(places, angles))
sys.exit(0 if as_stated else 1)
PYTHON
