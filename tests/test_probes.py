"""Probes: every kind against its formula in float64, its files, what it refuses; and conditions on their scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from places import PLACES, backend, runs
from safetensors.torch import load_file, save_file
from torch import Tensor

import steerfast as sf
from steerfast.place import Origin, Place
from steerfast.probes import (
    BarrierProbe,
    FeatureProbe,
    LinearProbe,
    LogisticProbe,
    Probe,
    ProbeInfo,
    SimilarityProbe,
    TopKProbe,
    as_probe,
)

D, F = 37, 50
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def an_sae(**options: Any) -> sf.SAE:
    options = {"b_enc": 0.3 * drawn(F, seed=3), "origin": Origin("LlamaForCausalLM", ("resid_post", 5))} | options
    return sf.SAE(drawn(F, D, seed=1), drawn(F, D, seed=2), **options)


def a_transcoder(**options: Any) -> sf.sae.Transcoder:
    origins = {"origin": Origin(place=("mlp_out", 5)), "reads": Origin(place=("resid_pre", 5))}
    return sf.sae.Transcoder(drawn(F, D, seed=1), drawn(F, 8, seed=2), **origins, **options)


@cache
def a_barrier(kind: str = "quadratic") -> sf.Barrier:
    return sf.fit_barrier(drawn(30, D, seed=4) + 0.5, drawn(30, D, seed=5) - 0.5, kind=kind)


THETA = 0.5 + 3 * torch.rand(F, generator=torch.Generator().manual_seed(6))
ORIGIN = Origin("LlamaForCausalLM", ("attn_out", 3), "last", 4.0)
DIRECTION = sf.Direction(drawn(D, seed=7), "given", 1.0, ORIGIN)
MAKERS: dict[str, Callable[[], Probe]] = {
    "one direction": lambda: LinearProbe(DIRECTION, 0.3),
    "directions": lambda: LinearProbe(drawn(3, D), torch.tensor([0.1, 0.2, -0.3]), place=2, after=True),
    "a probability": lambda: LogisticProbe(0.2 * drawn(D), -0.4, ProbeInfo(0.9, 0.95, positives=3, C=2.0), place=1),
    "a similarity": lambda: SimilarityProbe(drawn(2, D)),
    "the released similarity": lambda: SimilarityProbe(DIRECTION, "tanh", place=("resid_pre", 4)),
    "a barrier": lambda: BarrierProbe(a_barrier(), place=-1),
    "a barrier with ridges": lambda: BarrierProbe(a_barrier("rff")),
    "a raw barrier": lambda: BarrierProbe(sf.Barrier.linear(drawn(D), 0.5, raw=True)),
    "a feature": lambda: FeatureProbe(an_sae(), 7),
    "features": lambda: FeatureProbe(an_sae(threshold=THETA), [12, 3, 49]),
    "features of scaled rows": lambda: FeatureProbe(an_sae(threshold=THETA, normalisation="layer_norm"), [12, 3]),
    "features by their rows": lambda: FeatureProbe(
        sf.Features(drawn(4, D), drawn(4, D), drawn(4), torch.ones(4)), [3, 0]
    ),
    "a selected feature": lambda: FeatureProbe(an_sae(k=6), 7),
    "selected features": lambda: FeatureProbe(an_sae(k=6, normalisation="constant_norm_rescale"), [0, 7, 12]),
    "a transcoder's features": lambda: FeatureProbe(a_transcoder(k=9), [0, 7, 12]),
    "the largest": lambda: TopKProbe(an_sae(k=6)),
    "some of the largest": lambda: TopKProbe(an_sae(k=6), 2, place=0),
    "the largest above one threshold": lambda: TopKProbe(an_sae(threshold=torch.full((F,), 2.0)), 5),
    "the largest above thresholds": lambda: TopKProbe(an_sae(threshold=THETA, normalisation="layer_norm"), 5),
    "a transcoder's largest": lambda: TopKProbe(a_transcoder(), 5),
}
SAES = [an_sae(k=6), an_sae(k=6, normalisation="constant_norm_rescale"), a_transcoder(k=9), a_transcoder()]
SAES += [an_sae(threshold=torch.full((F,), 2.0)), an_sae(threshold=THETA, normalisation="layer_norm")]


@pytest.fixture(params=MAKERS)
def probe(request: pytest.FixtureRequest) -> Probe:
    return MAKERS[request.param]()


def parts(scores: Any) -> tuple[Tensor, ...]:
    return scores if isinstance(scores, tuple) else (scores,)


def equal(a: Any, b: Any) -> bool:
    pairs = zip(parts(a), parts(b), strict=True)
    return all(m.dtype == n.dtype and torch.equal(m.nan_to_num(-77), n.nan_to_num(-77)) for m, n in pairs)


# --- the formulas ------------------------------------------------------------------------------------------------------


def features_of(sae: Any, x: Tensor) -> Tensor:
    """All features of an SAE, dense, in float64."""
    if sae.normalisation == "constant_norm_rescale":
        x = x * math.sqrt(D) / x.norm(dim=-1, keepdim=True)
    elif sae.normalisation == "layer_norm":
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    h = x @ sae.w_enc.double().T + sae.b_enc.double()
    if sae.k is None:
        return h * (h > sae.threshold.double())
    largest = h.topk(sae.k).indices
    return torch.zeros_like(h).scatter(-1, largest, h.gather(-1, largest).relu())


def reference(name: str, x: Tensor) -> Tensor:
    """What a probe says of rows x (..., d), in float64; of the largest features their values."""
    made = MAKERS[name]()
    if isinstance(made, LinearProbe):
        return x @ made.weight.double().T + torch.as_tensor(made.bias).double()  # type: ignore[union-attr]
    if isinstance(made, LogisticProbe):
        return 1 / (1 + torch.exp(-(x @ made.weight.double() + made.bias)))  # type: ignore[union-attr]
    if isinstance(made, SimilarityProbe):
        y = x @ made.direction.double().T  # type: ignore[union-attr]
        if made.kind == "projection":
            return y.norm(dim=-1) / x.norm(dim=-1)
        return torch.cosine_similarity(x, torch.tanh(y @ made.direction.double()), dim=-1, eps=0)  # type: ignore[union-attr]
    if isinstance(made, BarrierProbe):
        h = made.barrier
        z = x @ h.basis.double().T / (1 if h.raw else x.norm(dim=-1, keepdim=True))
        value = (z * z) @ h.eigenvalues.double() + z @ h.bias.double() + h.offset
        if h.ridge is not None:
            inside = z @ h.ridge.directions.double().T + h.ridge.phases.double()
            value = value + torch.cos(inside) @ h.ridge.weights.double()
        return value
    if name == "features by their rows":
        sae = sf.SAE(drawn(4, D), drawn(4, D), drawn(4), threshold=torch.ones(4))
        return features_of(sae, x)[..., [3, 0]]
    whole = {
        "a feature": an_sae(), "features": an_sae(threshold=THETA), "a selected feature": SAES[0], "the largest": SAES[0],
        "features of scaled rows": SAES[5], "selected features": SAES[1], "a transcoder's features": SAES[2],
        "some of the largest": SAES[0], "the largest above one threshold": SAES[4], "the largest above thresholds": SAES[5],
        "a transcoder's largest": SAES[3],
    }[name]  # fmt: skip
    dense = features_of(whole, x)
    if isinstance(made, TopKProbe):
        return dense.topk(made.k or 0).values
    return dense[..., made.features if isinstance(made.features, int) else list(made.features)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_it_reads_what_its_formula_says(name: str, dtype: torch.dtype, place: str) -> None:
    if not runs(place, dtype) or (place != "cpu" and dtype == torch.float64):
        pytest.skip("the interpreter is wrong on raw bfloat16, and no kernel takes float64")
    made = MAKERS[name]()
    with backend(place) as device:
        x = drawn(3, 5, D, seed=9).to(dtype)
        got = made(x.to(device))
        assert equal(made.program(torch.device(device))(x.to(device)), got)
    true = reference(name, x.double())
    values = parts(got)[0].cpu()
    assert values.dtype == torch.float32
    # Sums of D products in float32; a product of a float16 encoder's row has the same operands in both.
    torch.testing.assert_close(values.double(), true, rtol=2e-6, atol=2e-6 * max(1.0, float(true.abs().max())))
    if made.pairs:
        indices = got[1].cpu()
        assert indices.dtype == torch.int32
        dense = features_of(made.sae, x.double())  # type: ignore[attr-defined]
        torch.testing.assert_close(dense.gather(-1, indices.long()) * (values > 0), true, rtol=2e-6, atol=2e-5)
        assert not indices[values == 0].any()
    elif made.names is not None:
        assert got.shape == (*x.shape[:-1], len(made.names))
    else:
        assert got.shape == x.shape[:-1]


def test_a_row_with_nan_has_nan_and_no_other(probe: Probe) -> None:
    x = drawn(2, 5, D)
    plain = parts(probe(x))[0]
    x[1, 2, 30] = torch.nan
    spoiled = parts(probe(x))[0]
    assert bool(spoiled[1, 2].isnan().all())
    spoiled[1, 2] = plain[1, 2]
    torch.testing.assert_close(spoiled, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 0, D), (1, 1, 2, D)])
def test_any_shape_of_rows(probe: Probe, shape: tuple[int, ...]) -> None:
    x = drawn(*shape, seed=2)
    flat = parts(probe(x.reshape(-1, D)))
    for got, wanted in zip(parts(probe(x)), flat, strict=True):
        assert got.shape == shape[:-1] + wanted.shape[1:]
        torch.testing.assert_close(got.reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6)


def test_a_compiled_program_says_the_same(probe: Probe) -> None:
    x = drawn(2, 5, D, seed=8)
    compiled = torch.compile(probe.program(x.device), fullgraph=True, backend="aot_eager")
    assert equal(compiled(x), probe(x))


@pytest.mark.parametrize(
    "name", ["one direction", "the released similarity", "features", "selected features", "a barrier"]
)
def test_inductor_compiles_it(name: str) -> None:
    made, x = MAKERS[name](), drawn(2, 5, D, seed=8)
    got = torch.compile(made.program(x.device), fullgraph=True)(x)
    torch.testing.assert_close(got, made(x), rtol=1e-5, atol=1e-5)


def test_products_are_exact_whatever_the_process_allows() -> None:
    x = drawn(64, D).bfloat16()
    made = LinearProbe(drawn(D))
    plain = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), plain)


# --- places, origins, names ---------------------------------------------------------------------------------------------


def test_a_place_is_given_or_that_of_the_origin() -> None:
    assert MAKERS["one direction"]().place == Place("attn_out", 3)
    assert MAKERS["one direction"]().origin == ORIGIN
    assert LinearProbe(drawn(D)).place is None
    assert LinearProbe(drawn(D), place=4).place == Place("resid_post", 4)
    assert LinearProbe(drawn(D), place="blocks.4.hook_resid_pre").place == Place("resid_pre", 4)
    assert FeatureProbe(an_sae(), 1).place == Place("resid_post", 5)
    assert FeatureProbe(a_transcoder(), 1).place == TopKProbe(a_transcoder(), 3).place == Place("resid_pre", 5)
    here = MAKERS["one direction"]().at(None)
    assert here.place is None
    assert here.at(("mlp_out", 1), after=True).place == Place("mlp_out", 1)
    assert (here.after, here.at(1, after=True).after) == (False, True)


def test_another_place_than_that_of_the_origin_warns() -> None:
    with pytest.warns(
        UserWarning, match="LinearProbe: what it is given belongs to attn_out 3 and is to be read at resid_post 9"
    ):
        LinearProbe(DIRECTION, place=9)


def test_names_and_numbers() -> None:
    assert LinearProbe(drawn(1, D)).names == ("0",)
    assert MAKERS["directions"]().names == ("0", "1", "2")
    assert MAKERS["features"]().names == ("12", "3", "49")
    assert FeatureProbe(an_sae(), torch.tensor(3)).names is None
    assert FeatureProbe(an_sae(), slice(0, 3)).names == ("0", "1", "2")
    singles = {name for name in MAKERS if MAKERS[name]().single}
    assert singles == {
        "one direction", "a probability", "a similarity", "the released similarity", "a barrier", "a barrier with ridges",
        "a raw barrier", "a feature", "a selected feature",
    }  # fmt: skip


def test_as_probe() -> None:
    made = LinearProbe(drawn(D))
    assert as_probe("read", made) is made
    assert isinstance(as_probe("read", DIRECTION), LinearProbe)
    assert isinstance(as_probe("read", a_barrier()), BarrierProbe)
    assert isinstance(as_probe("read", an_sae(k=3)), TopKProbe)
    with pytest.raises(TypeError, match=r"read: expected a probe.*got Tensor: wrap a vector as sf.probes.LinearProbe"):
        as_probe("read", drawn(D))


def test_it_holds_copies() -> None:
    w = drawn(D)
    made = LinearProbe(w)
    before = made(torch.ones(D))
    w.zero_()
    assert torch.equal(made(torch.ones(D)), before)
    assert replace(made, bias=1.0)(torch.ones(D)) == before + 1
    again = replace(MAKERS["features"](), place=9)
    assert equal(again(drawn(4, D)), MAKERS["features"]()(drawn(4, D)))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LinearProbe(torch.full((D,), torch.nan)), ValueError, "LinearProbe: weight holds NaN or Inf"),
        (lambda: LinearProbe(torch.zeros(D)), ValueError, "all zero"),
        (lambda: LinearProbe(drawn(D).requires_grad_()), TypeError, "requires a gradient"),
        (lambda: LinearProbe(drawn(D), torch.inf), ValueError, "bias must be finite"),
        (lambda: LinearProbe(drawn(2, D), drawn(3)), ValueError, r"bias has shape \(3,\).*expected \(2,\)"),
        (lambda: LinearProbe(drawn(D), place="somewhere"), ValueError, "'somewhere' is no place"),
        (lambda: LinearProbe(drawn(D), after="no"), TypeError, "after must be True or False"),
        (lambda: LinearProbe(drawn(D), origin="here"), TypeError, "origin is 'here'"),
        (lambda: LogisticProbe(drawn(2, D)), ValueError, r"weight has shape \(2, 37\); expected \(d,\)"),
        (lambda: LogisticProbe(drawn(D), info={}), TypeError, "info must be a ProbeInfo"),
        (lambda: SimilarityProbe(drawn(D), "dot"), ValueError, "kind is 'dot'"),
        (lambda: SimilarityProbe(torch.ones(2, D)), ValueError, "row 1 of direction lies in the span"),
        (lambda: BarrierProbe(drawn(D)), TypeError, "barrier must be a Barrier; got Tensor"),
        (lambda: FeatureProbe(drawn(D), 1), TypeError, "sae must be an SAE, a transcoder or Features; got Tensor"),
        (lambda: FeatureProbe(an_sae(), F), ValueError, f"feature {F} is out of range; there are 0 to {F - 1}"),
        (lambda: FeatureProbe(an_sae(k=3), -1), ValueError, "feature -1 is out of range"),
        (lambda: FeatureProbe(an_sae(), []), ValueError, "expected one or several, each once"),
        (lambda: FeatureProbe(an_sae(), [3, 3]), ValueError, "each once"),
        (lambda: FeatureProbe(an_sae(), True), TypeError, "features must be a whole number"),
        (lambda: FeatureProbe(an_sae(), "3"), TypeError, "features must be a whole number"),
        (lambda: TopKProbe(an_sae()), ValueError, "selects by thresholds; say how many features to keep, k=32"),
        (lambda: TopKProbe(an_sae(k=3), 4), ValueError, "k is 4; expected at most 3"),
        (lambda: TopKProbe(an_sae(), F + 1), ValueError, f"expected at most {F}"),
        (lambda: TopKProbe(an_sae(k=3), 0), ValueError, "expected a whole number >= 1"),
        (lambda: TopKProbe(sf.Features(drawn(4, D), drawn(4, D)), 2), TypeError, "expected the whole SAE"),
        (lambda: MAKERS["a feature"]()(drawn(2, D + 1)), ValueError, f"x has width {D + 1} and the probe {D}"),
        (lambda: MAKERS["a feature"]()(torch.ones(2, D).int()), TypeError, "x has dtype torch.int32"),
        (lambda: MAKERS["a feature"]().at("x"), ValueError, "FeatureProbe.at: key 'x' is no place"),
    ],
)
def test_bad_input_is_named(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


# --- files -------------------------------------------------------------------------------------------------------------


def test_a_file_holds_all_of_it(probe: Probe, tmp_path: Path) -> None:
    again = Probe.load(probe.save(tmp_path / "probe"), SAES)
    assert type(again) is type(probe)
    assert (again.place, again.after, again.origin) == (probe.place, probe.after, probe.origin)
    assert (again.names, again.bounds, again.width) == (probe.names, probe.bounds, probe.width)
    assert again.numbers() == probe.numbers()
    assert equal(again(drawn(4, D)), probe(drawn(4, D)))
    second = again.save(tmp_path / "again")
    for name in ("probe.json", "probe.safetensors"):
        assert (second / name).read_bytes() == (tmp_path / "probe" / name).read_bytes()


def test_a_file_keeps_where_a_probe_is_not_read(tmp_path: Path) -> None:
    assert Probe.load(MAKERS["one direction"]().at(None).save(tmp_path)).place is None


def test_what_needs_a_whole_encoder_is_written_by_its_name(tmp_path: Path) -> None:
    for name in ("a selected feature", "the largest", "the largest above thresholds", "a transcoder's largest"):
        saved = MAKERS[name]().save(tmp_path)
        assert load_file(saved / "probe.safetensors") == {}
        with pytest.raises(FileNotFoundError, match=r"Probe.load: .*probe.json names .* was not given.*saes="):
            Probe.load(saved)
        with pytest.raises(FileNotFoundError, match="is not among"):
            Probe.load(saved, an_sae(k=1))
    SAES[3].save(tmp_path / "saes" / "one")
    assert Probe.load(saved, tmp_path / "saes").sae.fingerprint == SAES[3].fingerprint  # type: ignore[attr-defined]


def rewrite(folder: Path, **changes: Any) -> None:
    text = {**json.loads((folder / "probe.json").read_bytes()), **changes}
    (folder / "probe.json").write_text(json.dumps({k: v for k, v in text.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"type": "Oracle"}, "does not describe a probe: unknown probe 'Oracle'; known are BarrierProbe, FeatureProbe"),
        ({"type": "LogisticProbe"}, "does not describe a probe"),
        ({"numbers": {"bias": "much"}}, "does not describe a probe: LinearProbe: bias must be a number"),
        ({"numbers": {"bias": 0.0, "code": "x"}}, "does not describe a probe: .*code"),
        ({"numbers": []}, "does not describe a probe"),
        ({"place": ["nowhere", 1]}, "does not describe a probe: .*site is 'nowhere'"),
        ({"place": 4}, "does not describe a probe"),
        ({"after": "yes"}, "after must be True or False"),
        ({"origin": None}, "does not describe a probe"),
        ({"tensors": []}, "holds the tensor 'weight', which probe.json does not name"),
        ({"tensors": ["weight", "bias"]}, "lacks the tensor 'bias'"),
        ({"tensors": ...}, "has keys"),
        ({"schema": 2}, "newer than this version of steerfast"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    MAKERS["one direction"]().save(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"^Probe.load: .*{match}"):
        Probe.load(tmp_path)


def test_features_that_are_not_those_of_the_rows_are_refused(tmp_path: Path) -> None:
    MAKERS["features"]().save(tmp_path)
    rewrite(tmp_path, numbers={"features": [12, 3], "normalisation": "none"})
    with pytest.raises(ValueError, match=r"does not describe a probe: Encoder: .*do not fit"):
        Probe.load(tmp_path)


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    MAKERS["features"]().save(tmp_path)
    tensors = load_file(tmp_path / "probe.safetensors")
    save_file({**tensors, "threshold": torch.ones(7)}, tmp_path / "probe.safetensors")
    rewrite(tmp_path, tensors_sha256=hashlib.sha256((tmp_path / "probe.safetensors").read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="does not describe a probe"):
        Probe.load(tmp_path)


# --- conditions on probes ------------------------------------------------------------------------------------------------


def held(scores: list[float], on: float, off: float, above: bool, before: bool, counts: list[bool]) -> list[bool]:
    """The states of one request, token by token."""
    sign, state, found = (1 if above else -1), before, []
    for score, counted in zip(scores, counts, strict=True):
        if counted and sign * score > sign * on:
            state = True
        elif counted and sign * score < sign * off:
            state = False
        found.append(state)
    return found


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("gap", [0.0, 0.7])
def test_hysteresis_is_the_state_machine(above: bool, gap: float) -> None:
    release = 0.25 - gap if above else 0.25 + gap
    condition = sf.Condition(LinearProbe(drawn(D)), 0.25, above, release=release)
    score = drawn(40, 30, seed=3)
    score[drawn(40, 30, seed=4) > 1.2] = torch.nan
    score[3, 4:9] = 0.25
    counts, before = drawn(40, 30, seed=5) > -0.7, drawn(40, seed=6) > 0
    wanted = [
        held(row, condition.threshold, release, above, first, known)
        for row, first, known in zip(score.tolist(), before.tolist(), counts.tolist(), strict=True)
    ]
    got = condition.decide(score, before, counts)
    assert got.tolist() == wanted
    state, pieces = before, []
    for part, known in zip(score.split([1, 10, 0, 19], 1), counts.split([1, 10, 0, 19], 1), strict=True):
        pieces.append(condition.decide(part, state, known))
        state = pieces[-1][:, -1] if part.shape[1] else state
    assert torch.equal(torch.cat(pieces, 1), got)
    compiled = torch.compile(condition.decide, fullgraph=True)
    assert torch.equal(compiled(score, before, counts), got)
    assert torch.equal(
        condition.decide(score), condition.decide(score, torch.zeros(40, dtype=torch.bool), score == score)
    )


def test_a_condition_on_rows_is_the_probe_and_the_threshold() -> None:
    x = drawn(2, 9, D)
    for name in MAKERS:
        made = MAKERS[name]()
        if not made.single:
            continue
        score = made(x)
        theta = float(score.flatten().sort().values[8:10].mean())
        assert torch.equal(sf.Condition(made, theta)(x), score > theta)
        below = sf.Condition(made, theta, above=False)
        x[0, 0, 0] = torch.nan
        assert torch.equal(below(x), made(x) < theta)
        assert not below(x)[0, 0]
        x[0, 0, 0] = 0.5
        kept = sf.Condition(made, theta, release=float(score.min()))
        assert torch.equal(kept(x), kept.decide(made(x)))
        assert kept(x[0, 0]).shape == ()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: sf.Condition(MAKERS["features"](), 1.0), ValueError, "several numbers per row; name one"),
        (lambda: sf.Condition(MAKERS["the largest"](), 1.0), ValueError, "several numbers per row; name one"),
        (lambda: sf.Condition(an_sae(k=2), 1.0), ValueError, "several numbers per row; name one"),
        (lambda: sf.Condition(MAKERS["a probability"](), 1.5), ValueError, "LogisticProbe lies between 0 and 1"),
        (
            lambda: sf.Condition(MAKERS["a similarity"](), 0.5, release=-0.1),
            ValueError,
            "release is -0.1; a similarity",
        ),
        (lambda: sf.Condition(MAKERS["a feature"](), torch.nan), ValueError, "threshold must be finite"),
        (lambda: sf.Condition(MAKERS["a feature"](), 1.0, similarity="tanh"), ValueError, "it is for a direction"),
        (
            lambda: sf.Condition(MAKERS["a feature"](), 1.0, release=1.1),
            ValueError,
            "expected release <= threshold with above",
        ),
        (
            lambda: sf.Condition(MAKERS["a feature"](), 1.0, False, release=0.9),
            ValueError,
            "expected release >= threshold",
        ),
        (lambda: sf.Condition("here", 1.0), TypeError, "direction must be a tensor"),
        (
            lambda: sf.When(sf.Condition(drawn(D), 0.5, release=0.4), sf.Add(drawn(D))),
            ValueError,
            "When: release is 0.4, and When decides once per request; use WhenToken",
        ),
    ],
)
def test_what_a_condition_refuses(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_a_condition_takes_what_is_taken_for_a_probe() -> None:
    x = drawn(40, D)
    assert torch.equal(sf.Condition(a_barrier(), 0.0)(x), a_barrier()(x) > 0)
    assert torch.equal(
        replace(sf.Condition(drawn(D), 0.1), above=False)(x), sf.Condition(drawn(D), 0.1, above=False)(x)
    )
    rows = an_sae(threshold=THETA, normalisation="layer_norm").rows([12, 3])
    assert equal(FeatureProbe(rows, [0, 1])(x), MAKERS["features of scaled rows"]()(x))


def test_where_a_condition_is_read() -> None:
    edit = sf.Add(drawn(D))
    assert sf.When(sf.Condition(DIRECTION, 0.5), edit).reads is None  # a direction is read where the edit stands
    assert sf.When(sf.Condition(DIRECTION, 0.5), edit).condition.probe.origin == ORIGIN
    assert sf.When(sf.Condition(MAKERS["one direction"](), 0.5), edit).reads == Place("attn_out", 3)
    assert sf.When(sf.Condition(MAKERS["one direction"](), 0.5), edit, layer=2).reads == Place("resid_post", 2)
    heads = LinearProbe(drawn(8), place=("head_out", 3))
    each = sf.WhenToken(sf.Condition(heads, 0.0), edit)  # another width, at a place of its own
    with pytest.raises(ValueError, match="read at head_out 3; give read="):
        each.apply(drawn(4, D))
    read, x = drawn(4, 8, seed=1), drawn(4, D)
    moved = (each.apply(x, read=read) != x).any(1)
    assert torch.equal(moved, heads(read) > 0)
    assert 0 < int(moved.sum()) < 4
    with pytest.raises(ValueError, match="the condition has width 8 and the intervention 37"):
        sf.WhenToken(sf.Condition(heads.at(None), 0.0), edit)


def test_apply_holds_a_gate_open() -> None:
    w = torch.eye(D)[0]
    x = torch.zeros(1, 5, D)
    x[0, :, 0] = torch.tensor([0.0, 3.0, 1.5, 0.5, 1.5])
    edit = sf.WhenToken(sf.Condition(LinearProbe(w), 2.0, release=1.0), sf.Add(torch.eye(D)[1]))
    assert edit.apply(x)[0, :, 1].tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert repr(edit).startswith("WhenToken(LinearProbe(d 37, nowhere yet) > 2.0 until < 1.0, Add(")


def test_a_plan_keeps_the_probe_of_a_condition(probe: Probe, tmp_path: Path) -> None:
    if not probe.single:
        return
    theta = float(probe(drawn(9, D)).median())
    condition = sf.Condition(probe, theta, release=theta)
    plan = sf.Plan({6: sf.WhenToken(condition, sf.Add(drawn(D)))})
    again = sf.Plan.load(plan.save(tmp_path / "plan"), SAES)
    (edit,) = again.edits[Place("resid_post", 6)]
    assert isinstance(edit, sf.WhenToken)
    assert edit.condition.numbers() == condition.numbers()
    assert edit.reads == probe.place
    assert torch.equal(edit.condition(drawn(30, D)), condition(drawn(30, D)))


def test_a_plan_of_schema_2_is_read(tmp_path: Path) -> None:
    sf.Plan({3: sf.When(sf.Condition(drawn(D), 0.25, False, "tanh"), sf.Add(drawn(D)), layer=1)}).save(tmp_path)
    text = json.loads((tmp_path / "plan.json").read_bytes())
    (item,) = text["edits"][0]["interventions"]
    item["tensors"]["direction"] = item["tensors"].pop("probe.direction")
    item["numbers"]["condition"] = {"threshold": 0.25, "above": False, "similarity": "tanh"}
    (tmp_path / "plan.json").write_text(json.dumps({**text, "schema": 2}))
    (edit,) = sf.Plan.load(tmp_path).edits[Place("resid_post", 3)]
    assert isinstance(edit, sf.When)
    x = drawn(200, D)
    assert torch.equal(edit.condition(x), sf.Condition(drawn(D), 0.25, False, "tanh")(x))
    assert edit.reads == Place("resid_post", 1)
