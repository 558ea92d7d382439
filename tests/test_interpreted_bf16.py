"""bfloat16 under Triton's interpreter, whose products multiply bit patterns: widened first, so that the values are right."""

from __future__ import annotations

import pytest
import torch
from places import INTERPRETED, backend

import steerfast as sf

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")]
D = 48


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def banked() -> sf.Bank:
    """Rank 20: the kernel with tiles."""
    bank = sf.Bank(D, 1, dtype=torch.bfloat16)
    bank.register(sf.Amplify(drawn(20, D).float()))
    return bank


def halves(x: torch.Tensor) -> torch.Tensor:
    bank = banked()
    return sf.ops.subspace_split_(x, 2 * x, *bank.tensors, None, None, (bank.modes, bank.max_rank))


OPS = {
    "amplify": lambda x: sf.ops.amplify(x, drawn(20, D)),
    "amplify_": lambda x: sf.ops.amplify_(x.clone(), drawn(20, D)),
    "ablate": lambda x: sf.ops.ablate(x, torch.linalg.qr(drawn(D, 20).float())[0].T.contiguous().bfloat16()),
    "flow": lambda x: sf.flow(
        x, sf.Barrier(torch.linalg.qr(drawn(D, D).float())[0][:20], torch.ones(20), torch.ones(20)), angle=0.4
    ),
    "probe": lambda x: torch.cat([part.flatten() for part in sf.ops.subspace_probe(x, *banked().tensors, 20)]),
    "split": halves,
    "sae_encode": lambda x: sf.ops.sae_encode(x, drawn(64, D, seed=2), None, 4)[0],
    "sae_encode_threshold": lambda x: sf.ops.sae_encode_threshold(x, drawn(64, D, seed=2), None, torch.ones(64), 64)[0],
}


@pytest.mark.parametrize("name", OPS)
def test_a_product_has_the_value_of_the_reference(name: str) -> None:
    """To one unit in the last place of bfloat16."""
    x = drawn(17, D, seed=1)
    expected = OPS[name](x)
    with backend("interpreter"):
        found = OPS[name](x)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
