#!/usr/bin/env bash
# tuned-lens 0.2.0, torch 2.13.0: LogitStats, a running maximum-likelihood fit of a Dirichlet distribution to a model's predictions, takes
# a count, mean probabilities and sufficient statistics, to go on from. It keeps the means and drops the count: n is None until the next
# update, which then weighs its own rows by all there are, and wipes out what was given. After 3000 predictions and 10 more the fit
# is that of the 10, without a word.
#
# Seen: true            0.5  1.0  2.0  3.0  4.0  5.0  6.0  7.0  8.0  9.0
#       in one go       0.5  1.0  2.0  3.0  4.0  5.0  6.0  7.0  8.1  9.1  from 3010 rows
#       resumed         0.4  0.8  2.4  3.5  5.7  6.5  7.5  7.6  9.9 12.6  from 10 rows
#       the last rows   0.4  0.8  2.4  3.5  5.7  6.5  7.5  7.6  9.9 12.6  from 10 rows
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps tuned-lens==0.2.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import importlib.util
import sys
import types

import torch
from torch.distributions import Dirichlet

package = types.ModuleType("tuned_lens")  # without its __init__, which loads the lenses and what they load
package.__path__ = list(importlib.util.find_spec("tuned_lens").submodule_search_locations)
sys.modules["tuned_lens"] = package
from tuned_lens.stats import LogitStats

torch.manual_seed(0)
true = torch.tensor([0.5, *range(1, 10)])
logits = Dirichlet(true).sample((3010,)).log()
first, last = logits[:3000], logits[3000:]


def collect(*parts, **given):
    stats = LogitStats(**given)
    for part in parts:
        stats.update(part)
    return stats


whole, before, alone = collect(first, last), collect(first), collect(last)
given = {name: getattr(before, name).clone() for name in ("n", "marginal_probs", "sufficient_stats")}
resumed = collect(last, **given)
print(f"{'true':<14}", *(f"{value:4.1f}" for value in true))
for name, stats in (("in one go", whole), ("resumed", resumed), ("the last rows", alone)):
    fitted = stats.mle().concentration
    print(f"{name:<14}", *(f"{value:4.1f}" for value in fitted), f" from {int(stats.n)} rows")
forgotten = torch.allclose(resumed.sufficient_stats, alone.sufficient_stats, atol=1e-5) and int(resumed.n) == 10
sys.exit(0 if forgotten and not torch.allclose(resumed.sufficient_stats, whole.sufficient_stats, atol=0.05) else 1)
PYTHON
