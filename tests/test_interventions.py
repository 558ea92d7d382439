"""Interventions, plans, banks and barriers: what they accept, what they refuse, and that files give back what was saved."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from places import assert_exact

import steerfast as sf
from steerfast.edits.base import Intervention
from steerfast.plan import ModelCard

D = 12


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def barrier() -> sf.Barrier:
    return sf.Barrier(torch.linalg.qr(rows(2).T)[0].T, torch.tensor([0.5, -0.5]), torch.ones(2), 0.25)


def unit() -> torch.Tensor:
    return torch.nn.functional.normalize(rows(1)[0].double(), dim=0)


def frame() -> torch.Tensor:
    return torch.linalg.qr(rows(2, 4).T)[0].T.contiguous()


def sae() -> sf.Features:
    """Four features; two of them JumpReLU, two plain ReLU."""
    return sf.Features(rows(4, 5), rows(4, 6), torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.0, 0.5, 0.9, 0.5]))


def edited_by_sae(x, values, change) -> torch.Tensor:
    """What an SAE library does: encode everything, change some features, decode, put the reconstruction error back."""
    encoder, decoder, bias, threshold = (
        t.double() for t in (sae().encoder, sae().decoder, sae().bias, sae().threshold)
    )
    h = x @ encoder.T + bias
    f = h * (h > threshold) * (h > 0)
    error = x - f @ decoder
    for feature, number in values.items():
        f[:, feature] = change(f[:, feature], number)
    return f @ decoder + error


def rotated(x, degrees) -> torch.Tensor:
    y = x @ frame().double().T
    t = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    new = y.norm(dim=1, keepdim=True) * torch.stack([t.cos(), t.sin()])
    return x + torch.where(y[:, :1] > 0, new - y, 0) @ frame().double()


def slerped(x) -> torch.Tensor:
    """Spherical steering row by row, with the softmax of the paper written out."""
    target, avoid = unit(), torch.nn.functional.normalize(rows(1, 8)[0].double(), dim=0)
    out = []
    for row in x:
        hat = row / row.norm()
        p = torch.softmax(6.0 * torch.stack([hat @ target, hat @ avoid]), 0)
        lead = (p[1] - p[0]).item()
        if lead > -0.3:
            t, omega = 0.7 * (lead + 0.3) / 1.3, torch.acos(hat @ target)
            hat = (torch.sin((1 - t) * omega) * hat + torch.sin(t * omega) * target) / torch.sin(omega)
        out.append(row.norm() * hat)
    return torch.stack(out)


def mirrored(x) -> torch.Tensor:
    """Householder pseudo-rotation row by row: the angle between a row and its image is measured, not derived."""
    out = []
    for row in x:
        if row @ unit() + 0.2 >= 0:
            out.append(row)
            continue
        score = rows(1, 11)[0, :3].double() @ torch.relu(rows(3, 10).double() @ row + 0.1) - 0.5
        gamma = torch.pi * torch.sigmoid(score)
        image = row - 2 * (row @ unit()) * unit()
        phi = torch.acos(row @ image / row.norm() ** 2)
        out.append((torch.sin(phi - gamma) * row + torch.sin(gamma) * image) / torch.sin(phi))
    return torch.stack(out)


def pushed(x) -> torch.Tensor:
    s, bias = rows(3, 7).double(), torch.tensor([0.1, 0.0, -0.1])
    v = torch.relu(1.5 - torch.relu(x @ s.T + bias))
    out = x + 1.5 * (v / v.sum(1, keepdim=True)).nan_to_num() @ s
    return out * x.norm(dim=1, keepdim=True) / out.norm(dim=1, keepdim=True)


# One of each intervention, with its formula; a new one is tested by being listed.
EXAMPLES = {
    "Add": (sf.Add(rows(1)[0], 2.0), lambda x: x + 2 * rows(1)[0].double()),
    "Ablate": (sf.Ablate(rows(3)), lambda x: x - x @ torch.linalg.pinv(rows(3).double()) @ rows(3).double()),
    "Amplify": (sf.Amplify(rows(3), 0.5), lambda x: x + 0.5 * torch.relu(x @ rows(3).double().T) @ rows(3).double()),
    "Calibrate": (
        sf.Calibrate(rows(3), 1.5),
        lambda x: x - torch.relu(x @ rows(3).double().T) @ rows(3).double() + 1.5 * rows(3).double().mean(0),
    ),
    "AffineAblate": (sf.AffineAblate(rows(1)[0], 1.5, 0.25), lambda x: x + (1.75 - x @ unit())[:, None] * unit()),
    "Clamp": (
        sf.Clamp(rows(1)[0], -0.5, 0.25),
        lambda x: x + ((x @ unit()).clamp(-0.5, 0.25) - x @ unit())[:, None] * unit(),
    ),
    "LoReFT": (
        sf.LoReFT(frame(), rows(2, 3), torch.tensor([0.5, -1.0])),
        lambda x: (
            x
            + (x @ rows(2, 3).double().T + torch.tensor([0.5, -1.0]).double() - x @ frame().double().T)
            @ frame().double()
        ),
    ),
    "EditFeatures": (
        sf.EditFeatures(sae(), {3: 0.7, 0: 0.2}, "max"),
        lambda x: edited_by_sae(x, {3: 0.7, 0: 0.2}, lambda f, t: f.clamp(min=t)),
    ),
    "Affine": (
        sf.Affine(1 + rows(1, 12)[0] / 4, rows(1, 13)[0]),
        lambda x: x * (1 + rows(1, 12)[0] / 4).double() + rows(1, 13)[0].double(),
    ),
    "Spherical": (sf.Spherical(rows(1)[0], rows(1, 8)[0], alpha=0.7, beta=-0.3, kappa=6.0), slerped),
    "Householder": (
        sf.Householder(rows(1)[0], rows(3, 10), torch.full((3,), 0.1), rows(1, 11)[0, :3], -0.5, offset=0.2),
        mirrored,
    ),
    "When": (
        sf.When(sf.Condition(rows(1, 2)[0], 0.1), sf.Add(rows(1)[0], 2.0), layer=1),
        lambda x: x + 2 * rows(1)[0].double(),
    ),
    "WhenToken": (
        sf.WhenToken(sf.Condition(rows(2, 2), -0.1, above=False, similarity="tanh"), sf.Ablate(rows(1))),
        lambda x: x - (x @ unit())[:, None] * unit(),
    ),
    "Rotate": (sf.Rotate(frame(), 50.0, adaptive=True), lambda x: rotated(x, 50.0)),
    "DeficitPush": (sf.DeficitPush(rows(3, 7), 1.5, torch.tensor([0.1, 0.0, -0.1])), lambda x: pushed(x)),
    "Flow": (
        sf.Flow(barrier(), angle=0.3, steps=4),
        lambda x: sf.ops.flow(
            x, *(t.double() for t in (barrier().basis, barrier().eigenvalues, barrier().bias)), angle=0.3, steps=4
        ),
    ),
}


def test_every_intervention_is_listed():
    assert set(EXAMPLES) == set(Intervention.registry)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_intervention_in_a_bank_is_its_formula(name):
    edit, formula = EXAMPLES[name]
    bank = sf.Bank(D, slots=2)
    slot = bank.register(edit)
    x = torch.randn(5, D)
    got = sf.ops.subspace(x, *bank.tensors, rows=torch.full((5,), slot, dtype=torch.int32))
    true = formula(x.double())
    assert_exact(got, true, (true + 1e-6 * true.abs().max()).float())  # float32 rows, summed in another order
    assert edit.width == D


@pytest.mark.parametrize("name", [n for n, (edit, _) in EXAMPLES.items() if "keep_norm" in edit.numbers()])
def test_keep_norm(name):
    edit, formula = EXAMPLES[name]
    kept = edit.restore(edit.tensors(), {**edit.numbers(), "keep_norm": True})
    bank = sf.Bank(D, slots=1)
    bank.register(kept)
    x = torch.cat([rows(4, seed=9), torch.zeros(1, D)])
    got = sf.ops.subspace(x, *bank.tensors)
    torch.testing.assert_close(got.norm(dim=1), x.norm(dim=1), atol=1e-5, rtol=1e-5)
    plain = formula(x.double())[:4].float()
    torch.testing.assert_close(got[:4], plain * (x[:4].norm(dim=1) / plain.norm(dim=1))[:, None], atol=1e-5, rtol=1e-5)


def test_keep_norm_does_not_stretch_what_is_left_of_a_vanished_row():
    bank = sf.Bank(D, slots=1)
    bank.register(sf.Ablate(rows(1), keep_norm=True))
    assert sf.ops.subspace(3 * rows(1), *bank.tensors).norm() < 1e-4


def test_interventions_are_frozen_and_own_their_tensors():
    v = rows(1)[0].clone()
    edit = sf.Add(v, 2.0)
    v.zero_()
    assert edit.vector.abs().sum() > 0
    with pytest.raises(AttributeError):
        edit.strength = 3.0


def test_ablate_takes_any_length_and_any_independent_rows():
    v = rows(2)
    basis = sf.Ablate(v).direction
    torch.testing.assert_close(basis @ basis.T, torch.eye(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(sf.Ablate(-7 * v[0]).direction[0], -v[0] / v[0].norm())


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        ("set", lambda f, t: torch.full_like(f, t)),
        ("add", lambda f, t: f + t),
        ("scale", lambda f, t: f * t),
        ("min", lambda f, t: f.clamp(max=t)),
        ("max", lambda f, t: f.clamp(min=t)),
    ],
)
@pytest.mark.parametrize("number", [0.0, 0.3, 2.0])
def test_feature_edits_equal_encode_edit_decode_with_the_error_term(mode, change, number):
    values = {0: number, 2: number, 3: number}  # 0.3 lies below the thresholds of features 2 and 3, 2.0 above
    bank = sf.Bank(D, slots=1)
    bank.register(sf.EditFeatures(sae(), values, mode))
    x = torch.randn(200, D) / 2
    torch.testing.assert_close(
        sf.ops.subspace(x, *bank.tensors), edited_by_sae(x.double(), values, change).float(), atol=2e-5, rtol=1e-5
    )


def test_clamp_leaves_what_is_within_bounds_alone():
    bank = sf.Bank(D, slots=3)
    for edit in (sf.Clamp(rows(1)[0], low=-1e3), sf.Clamp(rows(1)[0], high=1e3), sf.Clamp(rows(1)[0], -1e3, 1e3)):
        owner = torch.full((9,), bank.register(edit), dtype=torch.int32)
        x = torch.randn(9, D)
        torch.testing.assert_close(sf.ops.subspace(x, *bank.tensors, owner), x, atol=1e-4, rtol=0)
    edit = sf.Clamp(rows(1)[0], low=0.5)
    bank = sf.Bank(D, slots=1)
    bank.register(edit)
    assert (sf.ops.subspace(x, *bank.tensors) @ edit.direction).min() > 0.5 - 1e-5


def test_all_features_above_the_target_means_no_edit():
    bank = sf.Bank(D, slots=1)
    bank.register(sf.DeficitPush(torch.eye(D)[:2], target=1.0))
    x = torch.full((1, D), 3.0)
    torch.testing.assert_close(sf.ops.subspace(x, *bank.tensors), x)
    below = torch.zeros(1, D).fill_(-1.0)
    assert (sf.ops.subspace(below, *bank.tensors)[0, :2] > -1).all()


def test_rotation_keeps_the_length_and_reaches_the_angle():
    bank = sf.Bank(D, slots=1)
    bank.register(sf.Rotate(frame(), degrees=120.0))
    x = torch.randn(6, D)
    out = sf.ops.subspace(x, *bank.tensors)
    torch.testing.assert_close(out.norm(dim=1), x.norm(dim=1))
    y = out @ frame().T
    torch.testing.assert_close(torch.rad2deg(torch.atan2(y[:, 1], y[:, 0])), torch.full((6,), 120.0), atol=1e-3, rtol=0)
    half = sf.ops.subspace(x, *bank.tensors, scale=torch.full((6,), 0.5)) @ frame().T  # a strength multiplies the angle
    torch.testing.assert_close(
        torch.rad2deg(torch.atan2(half[:, 1], half[:, 0])), torch.full((6,), 60.0), atol=1e-3, rtol=0
    )


class WithVector:
    vector = rows(1)[0]


def test_anything_with_a_vector_is_a_direction():
    assert torch.equal(sf.Add(WithVector()).vector, WithVector.vector)


@pytest.mark.parametrize("name", ["Rotate", "Spherical", "Householder"])
def test_rotations_keep_the_length_of_every_row(name):
    bank = sf.Bank(D, slots=1)
    bank.register(EXAMPLES[name][0])
    pole = unit().float()[None]
    x = torch.cat([3 * torch.randn(8, D), torch.zeros(1, D), pole, -pole, torch.full((1, D), 1e15)])
    out = sf.ops.subspace(x, *bank.tensors)
    torch.testing.assert_close(out.norm(dim=1), x.norm(dim=1), atol=1e-5, rtol=1e-5)
    assert not torch.equal(out, x)


def test_spherical_reaches_its_target_and_leaves_what_leans_there():
    bank = sf.Bank(D, slots=1)
    bank.register(sf.Spherical(unit(), kappa=100.0))
    away = torch.randn(4, D).double()
    away = (away - 3 * away.norm(dim=1, keepdim=True) * unit()).float()
    out = sf.ops.subspace(away, *bank.tensors)
    torch.testing.assert_close(out, away.norm(dim=1, keepdim=True) * unit().float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(sf.ops.subspace(out, *bank.tensors), out)


NAN = torch.tensor([1.0, float("nan")])
BAD = [
    (lambda: sf.Affine(2.0), TypeError, "give weight as a tensor"),
    (lambda: sf.Affine(torch.ones(3)), ValueError, "changes nothing"),
    (lambda: sf.Affine(torch.ones(3), torch.ones(4)), ValueError, r"bias has shape \(4,\)"),
    (lambda: sf.Affine(torch.ones(2, 3)), ValueError, r"weight has shape \(2, 3\)"),
    (lambda: sf.Spherical(torch.zeros(4)), ValueError, "target is all zero"),
    (lambda: sf.Spherical(rows(1)[0], torch.ones(3)), ValueError, "avoid has width 3 and target 12"),
    (lambda: sf.Spherical(rows(1)[0], 2 * rows(1)[0]), ValueError, "point the same way"),
    (lambda: sf.Spherical(rows(1)[0], beta=1.0), ValueError, "beta is 1.0"),
    (lambda: sf.Spherical(rows(1)[0], kappa=0.0), ValueError, "kappa is 0.0"),
    (lambda: sf.Householder(rows(1)[0], torch.ones(2, 3), torch.ones(2), torch.ones(2)), ValueError, "W1 has width 3"),
    (lambda: sf.Householder(rows(1)[0], rows(2), torch.ones(3), torch.ones(2)), ValueError, r"b1 has shape \(3,\)"),
    (lambda: sf.Condition(rows(1)[0], 1.5), ValueError, "threshold is 1.5; .* between 0 and 1"),
    (lambda: sf.Condition(rows(1)[0], -0.5), ValueError, "between 0 and 1"),
    (lambda: sf.Condition(rows(1)[0], -1.5, similarity="tanh"), ValueError, "between -1 and 1"),
    (lambda: sf.Condition(rows(1)[0], 0.5, similarity="dot"), ValueError, "similarity is 'dot'"),
    (lambda: sf.Condition(torch.zeros(4), 0.5), ValueError, "all zero"),
    (lambda: sf.When(rows(1)[0], sf.Add(rows(1)[0])), TypeError, "condition must be a Condition; got Tensor"),
    (lambda: sf.When(sf.Condition(rows(1)[0], 0.5), rows(1)[0]), TypeError, "then must be an intervention"),
    (
        lambda: sf.When(sf.Condition(torch.ones(3), 0.5), sf.Add(rows(1)[0])),
        ValueError,
        "width 3 and the intervention 12",
    ),
    (lambda: sf.When(EXAMPLES["When"][0].condition, EXAMPLES["When"][0]), ValueError, "a condition inside a condition"),
    (
        lambda: sf.When(sf.Condition(rows(1)[0], 0.5), sf.Add(rows(1)[0]), layer="1"),
        TypeError,
        "layer must be a whole number; got '1'",
    ),
    (lambda: sf.Add(NAN), ValueError, "Add: vector holds NaN or Inf in row 0"),
    (lambda: sf.Add(torch.tensor([1.0, float("inf")])), ValueError, "NaN or Inf"),
    (lambda: sf.Add(torch.zeros(4)), ValueError, "Add: vector is all zero"),
    (lambda: sf.Add(rows(2)[None]), ValueError, r"Add: vector has shape \(1, 2, 12\); expected \(d,\) or \(m, d\)"),
    (lambda: sf.Add(torch.zeros(2, 12)), ValueError, "Add: vector is all zero in row 0"),
    (
        lambda: sf.Bank(12).register(sf.Add(rows(2))),
        ValueError,
        "no single slot; steer with it, or register the additions",
    ),
    (
        lambda: sf.Plan({1: sf.Add(rows(2))}, positions="0:2"),
        ValueError,
        "prompt's first tokens, row by row, so positions='0:2' cannot be followed; leave positions out",
    ),
    (
        lambda: sf.When(sf.Condition(rows(1)[0], 0.5), sf.Add(rows(2))),
        ValueError,
        "When: Add.* to each of a prompt's first tokens, and a condition cannot hold it back",
    ),
    (lambda: sf.WhenToken(sf.Condition(rows(1)[0], 0.5), sf.Add(rows(2))), ValueError, "WhenToken: Add"),
    (lambda: sf.Add(torch.ones(3, dtype=torch.long)), TypeError, "dtype torch.int64"),
    (lambda: sf.Add(rows(1)[0], float("nan")), ValueError, "Add: strength must be finite"),
    (lambda: sf.Ablate(torch.randn(5, 3)), ValueError, "5 rows of width 3; at most 3"),
    (lambda: sf.Ablate(torch.stack([rows(1)[0], 2 * rows(1)[0]])), ValueError, "row 1 of direction lies in the span"),
    (lambda: sf.Amplify(torch.stack([rows(1)[0], torch.zeros(D)])), ValueError, "all zero in row 1"),
    (lambda: sf.Amplify(rows(2), float("inf")), ValueError, "alpha must be finite"),
    (lambda: sf.Calibrate(torch.ones(2, 2, 2)), ValueError, "shape"),
    (lambda: sf.Calibrate(rows(2), None), TypeError, "beta must be a number"),
    (lambda: sf.AffineAblate(rows(1)[0], torch.ones(3)), ValueError, r"baseline has shape \(3,\)"),
    (lambda: sf.Clamp(rows(1)[0]), ValueError, "give low, high or both"),
    (lambda: sf.Clamp(rows(1)[0], 2.0, 1.0), ValueError, "low is 2.0 and high 1.0"),
    (lambda: sf.LoReFT(rows(2), rows(2)), ValueError, "not orthonormal .* deviate"),
    (lambda: sf.LoReFT(frame(), rows(3)), ValueError, r"W has shape \(3, 12\)"),
    (lambda: sf.LoReFT(frame(), rows(2), torch.ones(3)), ValueError, r"b has shape \(3,\)"),
    (lambda: sf.EditFeatures(sae(), {9: 1.0}), ValueError, "feature 9 is out of range; there are 4"),
    (lambda: sf.EditFeatures(sae(), {}), TypeError, "non-empty dict"),
    (lambda: sf.EditFeatures(sae(), {0: 1.0}, "cap"), ValueError, "mode is 'cap'"),
    (lambda: sf.EditFeatures(sae(), {0: -1.0}, "min"), ValueError, "never negative"),
    (lambda: sf.EditFeatures(rows(1), {0: 1.0}), TypeError, "must be Features or an SAE"),
    (lambda: sf.Features(rows(2), rows(2), threshold=torch.tensor([-1.0, 0])), ValueError, "threshold is negative"),
    (lambda: sf.Rotate(frame()[:1], 10.0), ValueError, "plane has 1 rows"),
    (lambda: sf.Rotate(rows(2), 10.0), ValueError, "not orthonormal"),
    (lambda: sf.DeficitPush(rows(2), 0.0), ValueError, "target is 0.0; expected > 0"),
    (lambda: sf.Flow(barrier()), ValueError, "give exactly one"),
    (lambda: sf.Flow(barrier(), angle=0.1, T=1.0), ValueError, "give exactly one"),
    (lambda: sf.Flow(barrier(), angle=-0.1), ValueError, "expected >= 0"),
    (lambda: sf.Flow(barrier(), angle=0.1, steps=0), ValueError, "steps is 0"),
    (lambda: sf.Flow(barrier(), angle=0.1, steps=2**31), ValueError, "from 1 to 2"),
    (lambda: sf.Flow(barrier(), angle=0.1, method="magic"), ValueError, "method is 'magic'"),
    (lambda: sf.Flow(rows(1), angle=0.1), TypeError, "barrier must come from fit_barrier"),
    (lambda: sf.Barrier(rows(2), torch.zeros(2), torch.ones(2)), ValueError, "not orthonormal"),
    (lambda: sf.Barrier(rows(2), torch.zeros(3), torch.ones(2)), ValueError, "do not fit"),
    (lambda: sf.Plan({}), ValueError, "edits is empty"),
    (lambda: sf.Plan([sf.Add(rows(1)[0])]), ValueError, "does not know its layer and site; pass a dict"),
    (lambda: sf.Plan(3), TypeError, "must be a dict"),
    (lambda: sf.Plan({"1": sf.Add(rows(1)[0])}), ValueError, "key '1'"),
    (lambda: sf.Plan({("middle", 1): sf.Add(rows(1)[0])}), ValueError, "site is 'middle'"),
    (lambda: sf.Plan({1: []}), TypeError, "non-empty list"),
    (lambda: sf.Plan({1: "v"}), TypeError, "expected an intervention"),
    (lambda: sf.Plan({1: sf.Add(rows(1)[0])}, positions="first"), ValueError, "positions is 'first'"),
    (lambda: sf.Plan({1: sf.Add(rows(1)[0])}, positions=[]), TypeError, "positions is"),
    (lambda: sf.Plan({1: sf.Add(rows(1)[0])}, positions=torch.ones(3)), TypeError, "must be bool"),
    (lambda: sf.Plan({1: sf.Add(rows(1)[0]), 2: sf.Add(torch.ones(4))}), ValueError, "different widths"),
    (lambda: sf.Plan({1: sf.Add(rows(1)[0]), ("resid_post", 1): sf.Add(rows(1)[0])}), ValueError, "named twice"),
    (lambda: sf.Bank(4).register(sf.Add(rows(1)[0])), ValueError, "width 12; this bank has 4"),
    (lambda: sf.Bank(4).release(0), ValueError, "slot 0 is not registered"),
    (
        lambda: sf.Bank(12, rank=2).register(sf.Ablate(rows(3))),
        ValueError,
        "has rank 3; this bank was built for rank <= 2",
    ),
    (lambda: sf.Add(rows(1)[0], keep_norm="no"), TypeError, "keep_norm must be True or False; got 'no'"),
    (lambda: sf.Clamp(rows(1)[0], low=0.0, keep_norm=1), TypeError, "keep_norm must be True or False"),
    (lambda: sf.Rotate(frame(), 10.0, adaptive="no"), TypeError, "adaptive must be True or False"),
    (lambda: sf.Condition(rows(1)[0], 0.5, above="below"), TypeError, "above must be True or False"),
    (lambda: sf.Add(rows(1)[0], True), TypeError, "strength must be a number; got True"),
    (lambda: sf.Add(rows(1)[0], "4"), TypeError, "strength must be a number; got '4'"),
    (lambda: sf.Add(rows(1)[0], 10**400), ValueError, "strength must be finite"),
    (lambda: sf.Add(rows(1)[0].double() * 1e300), ValueError, "overflows float32"),
    (lambda: sf.Add(rows(1)[0].to("meta")), TypeError, "is a meta tensor"),
    (lambda: sf.Add(rows(1)[0].to_sparse()), TypeError, "sparse_coo tensor; expected a dense one"),
    (lambda: sf.LoReFT(frame(), "w"), TypeError, "W must be a tensor of shape"),
    (lambda: sf.Affine("x", rows(1)[0]), TypeError, "weight must be a number; got 'x'"),
    (lambda: sf.Affine(2.0, [1.0, 2.0]), TypeError, "bias must be a tensor"),
    (lambda: sf.EditFeatures(sf.Features(rows(3), rows(3)), {True: 1.0}), TypeError, "True is no feature number"),
    (lambda: sf.EditFeatures(sf.Features(rows(3), rows(3)), {1.0: 1.0}), TypeError, "1.0 is no feature number"),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_input_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


# --- plans on disk -----------------------------------------------------------------------------------------------------


def test_a_plan_whose_tensors_are_cut_short_is_refused_even_with_their_hash(tmp_path):
    sf.Plan({1: sf.Add(rows(1)[0])}).save(tmp_path)
    blob = (tmp_path / "plan.safetensors").read_bytes()[:-3]
    (tmp_path / "plan.safetensors").write_bytes(blob)
    text = json.loads((tmp_path / "plan.json").read_text())
    text["tensors_sha256"] = hashlib.sha256(blob).hexdigest()
    (tmp_path / "plan.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"plan\.safetensors is damaged"):
        sf.Plan.load(tmp_path)


@pytest.mark.parametrize("positions", ["all", "last", [0, -1], torch.tensor([True, False, True])])
def test_a_plan_comes_back_as_it_was(tmp_path, positions):
    plan = sf.Plan(
        {3: [edit for edit, _ in EXAMPLES.values()], ("attn_out", -1): sf.Add(rows(1)[0], 3.5, keep_norm=True)},
        positions=positions,
        model=ModelCard("Some:model", D, 5),
    )
    assert plan.save(tmp_path / "plan") == tmp_path / "plan"
    again = sf.Plan.load(tmp_path / "plan")
    assert list(again.edits) == list(plan.edits)
    assert again.model == plan.model
    assert (
        torch.equal(torch.as_tensor(again.positions), torch.as_tensor(plan.positions))
        if not isinstance(positions, str)
        else again.positions == positions
    )
    for place, chain in plan.edits.items():
        for ours, theirs in zip(chain, again.edits[place], strict=True):
            assert type(ours) is type(theirs)
            assert ours.numbers() == theirs.numbers()
            for name, tensor in ours.tensors().items():
                assert torch.equal(tensor, theirs.tensors()[name])  # exact in float32
    assert sorted(os.listdir(tmp_path / "plan")) == ["plan.json", "plan.safetensors"]


def test_an_intervention_that_stands_in_two_places_is_saved_once(tmp_path):
    cut = sf.Ablate(rows(2))
    plan = sf.Plan({1: cut, 2: [sf.Add(rows(1)[0]), cut]})
    again = sf.Plan.load(plan.save(tmp_path / "plan"))
    assert torch.equal(again.edits["resid_post", 1][0].direction, cut.direction)
    assert again.edits["resid_post", 2][1] is again.edits["resid_post", 1][0]
    second = again.save(tmp_path / "again") / "plan.safetensors"
    assert second.read_bytes() == (tmp_path / "plan" / "plan.safetensors").read_bytes()


def test_saving_again_replaces_and_a_failed_save_leaves_the_old_plan(tmp_path, monkeypatch):
    first, second = sf.Plan({1: sf.Add(rows(1)[0])}), sf.Plan({2: sf.Add(rows(1)[0], 5.0)})
    first.save(tmp_path)
    second.save(tmp_path)
    assert list(sf.Plan.load(tmp_path).edits) == [("resid_post", 2)]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        first.save(tmp_path)
    monkeypatch.undo()
    assert list(sf.Plan.load(tmp_path).edits) == [("resid_post", 2)]
    assert sorted(os.listdir(tmp_path)) == ["plan.json", "plan.safetensors"]


def _edit_json(folder, **changes) -> None:
    path = folder / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "plan.json").unlink(), FileNotFoundError, "plan.json does not exist"),
        (lambda f: (f / "plan.safetensors").unlink(), FileNotFoundError, "plan.safetensors does not exist"),
        (lambda f: (f / "plan.json").write_text("{"), ValueError, "is not JSON"),
        (lambda f: (f / "plan.json").write_text("[]"), ValueError, "is not a plan"),
        (lambda f: _edit_json(f, schema=99), ValueError, "schema 99"),
        (lambda f: _edit_json(f, extra=1), ValueError, "has keys"),
        (lambda f: (f / "plan.safetensors").write_bytes(b"\x80\x04."), ValueError, "is not the file"),
        (
            lambda f: _edit_json(f, edits=[{"site": "resid_post", "layer": 1, "interventions": [{"type": "Exec"}]}]),
            ValueError,
            "unknown intervention 'Exec'",
        ),
        (lambda f: _edit_json(f, edits=[{"site": "resid_post"}]), ValueError, "does not describe a plan"),
    ],
)
def test_a_damaged_plan_is_refused_by_name(tmp_path, damage, error, message):
    sf.Plan({1: sf.Add(rows(1)[0])}).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        sf.Plan.load(tmp_path)
