#!/usr/bin/env bash
# dit 2.3: a Distribution holds probabilities or, after set_base(2) or set_base("e"), their logarithms, and its measures are to give the same
# for both. Entropy does. The divergences and the entropies of Renyi and Tsallis read the logarithms as probabilities: what is then NaN
# counts as nothing, and the Kullback-Leibler divergence is minus the entropy, whatever the second distribution is. No
# error, no warning but numpy's.
#
# Seen: entropy                  of probabilities 1.8464, of their logarithms 1.8464
#       Kullback-Leibler         of probabilities 0.1536, of their logarithms -1.8464
#       cross entropy            of probabilities 2.0000, of their logarithms 0.0000
#       variational distance     of probabilities 0.2000, of their logarithms 1.2925
#       Hellinger distance       of probabilities 0.1679, of their logarithms 0.0000
#       Renyi entropy, order 2   of probabilities 1.7370, of their logarithms -4.4054
#       Tsallis entropy, order 2 of probabilities 0.7000, of their logarithms -20.1911
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile dit==2.3 numpy==2.4.6 scipy==1.17.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import dit
from dit.divergences import cross_entropy, hellinger_distance, kullback_leibler_divergence, variational_distance
from dit.other import renyi_entropy, tsallis_entropy
from dit.shannon import entropy

words = ["00", "01", "10", "11"]
FIRST, SECOND = [0.4, 0.1, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]


def measure(function, base, *rest, pair=True):
    both = [dit.Distribution(words, weights) for weights in (FIRST, SECOND)]
    for one in both:
        one.set_base(base)
    return float(function(*(both if pair else both[:1]), *rest))


found = {}
for name, function, rest, pair in (
    ("entropy", entropy, (), False),
    ("Kullback-Leibler", kullback_leibler_divergence, (), True),
    ("cross entropy", cross_entropy, (), True),
    ("variational distance", variational_distance, (), True),
    ("Hellinger distance", hellinger_distance, (), True),
    ("Renyi entropy, order 2", renyi_entropy, (2,), False),
    ("Tsallis entropy, order 2", tsallis_entropy, (2,), False),
):
    found[name] = plain, logarithms = [measure(function, base, *rest, pair=pair) + 0.0 for base in ("linear", 2)]
    print(f"{name:<24} of probabilities {plain:.4f}, of their logarithms {logarithms:.4f}")
bits, same = found.pop("entropy")
_, negative = found["Kullback-Leibler"]
as_stated = abs(bits - same) < 1e-9 and abs(negative + bits) < 1e-9
sys.exit(0 if as_stated and all(abs(plain - logarithms) > 0.1 for plain, logarithms in found.values()) else 1)
PYTHON
