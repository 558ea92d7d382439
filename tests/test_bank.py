"""The bank: addresses stay, rows are never lost, a change reaches the device whole and in one copy."""

from __future__ import annotations

import pytest
import reference
import torch
from test_interventions import EXAMPLES

import steerfast as sf
from steerfast.bank import Runs, _Buffers
from steerfast.ops.slots import needs, slot_of

D = 12


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def edit(bank: sf.Bank, x: torch.Tensor, slot: int) -> torch.Tensor:
    return sf.ops.subspace(x, *bank.tensors, torch.full((x.shape[0],), slot, dtype=torch.int32))


def test_addresses_never_change():
    bank = sf.Bank(D, slots=4, directions=8)
    before = [t.data_ptr() for t in bank.tensors]
    flow = sf.Flow(sf.Barrier(torch.eye(D)[:2], torch.tensor([0.5, -0.5]), torch.ones(2)), angle=0.3)
    slots = [bank.register(one) for one in (sf.Add(rows(1)[0], 2.0), sf.Ablate(rows(3)), flow)]
    bank.set_strength(slots[0], 9.0)
    bank.release(slots[1])
    bank.register(sf.Amplify(rows(3), 0.5))
    assert [t.data_ptr() for t in bank.tensors] == before
    x = torch.randn(2, D)
    got = sf.ops.subspace(x, *bank.tensors, rows=torch.zeros(2, dtype=torch.int32))
    torch.testing.assert_close(got, x + 9 * rows(1)[0])


def test_a_full_bank_refuses_and_is_unchanged():
    bank = sf.Bank(D, slots=2, directions=4)
    bank.register(sf.Add(rows(1)[0]))
    copies = [t.clone() for t in bank.tensors]
    with pytest.raises(RuntimeError, match="no 4 neighbouring directions are free"):
        bank.register(sf.Ablate(rows(4)))
    assert all(torch.equal(a, b) for a, b in zip(copies, bank.tensors, strict=True))
    bank.register(sf.Ablate(rows(3)))
    with pytest.raises(RuntimeError, match="all 2 slots are taken"):
        bank.register(sf.Add(rows(1)[0]))
    with pytest.raises(TypeError, match=r"Bank.register: expected an intervention such as sf.Add\(v\); got Tensor"):
        bank.register(rows(1)[0])


def test_a_released_slot_edits_nothing_and_is_used_again():
    bank = sf.Bank(D, slots=2)
    slot = bank.register(sf.Add(rows(1)[0]))
    x, owner = torch.randn(3, D), torch.full((3,), slot, dtype=torch.int32)
    bank.release(slot)
    assert torch.equal(sf.ops.subspace(x, *bank.tensors, owner), x)
    assert bank.register(sf.Ablate(rows(1))) == slot
    assert not torch.equal(sf.ops.subspace(x, *bank.tensors, owner), x)


def test_no_row_is_lost_over_many_registrations():
    bank, held = sf.Bank(D, slots=6, directions=12), {}
    generator = torch.Generator().manual_seed(3)
    for step in range(300):
        if held and torch.rand(1, generator=generator) < 0.5:
            slot = sorted(held)[int(torch.randint(len(held), (1,), generator=generator))]
            bank.release(slot)
            del held[slot]
        else:
            amplify = sf.Amplify(rows(1 + step % 3, step), 0.5)
            try:
                held[bank.register(amplify)] = amplify
            except RuntimeError:
                continue
        x = torch.randn(1, D)
        for slot, amplify in held.items():
            got = sf.ops.subspace(x, *bank.tensors, torch.tensor([slot], dtype=torch.int32))
            torch.testing.assert_close(got, sf.ops.amplify(x, amplify.features, 0.5))
    for slot in list(held):
        bank.release(slot)
    bank.register(sf.Ablate(rows(12)))  # everything is free again, in one piece


def test_runs_merge_with_both_neighbours():
    runs = Runs(6)
    a, b, c = (runs.take(2, "things") for _ in range(3))
    runs.give(a, 2)
    runs.give(c, 2)
    runs.give(b, 2)
    assert runs.free == [(0, 6)]


def test_a_slot_is_kept_until_its_last_holder_lets_go():
    bank, x = sf.Bank(D, slots=2), torch.randn(2, D)
    slot = bank.register(sf.Add(rows(1)[0]))
    bank.hold(slot)
    bank.release(slot)
    torch.testing.assert_close(edit(bank, x, slot), x + rows(1)[0])
    bank.release(slot)
    assert torch.equal(edit(bank, x, slot), x)
    for call in (
        bank.release,
        bank.hold,
        lambda s: bank.replace(s, sf.Add(rows(1)[0])),
        lambda s: bank.set_strength(s, 1.0),
    ):
        with pytest.raises(ValueError, match=f"slot {slot} is not registered"):
            call(slot)


def test_replace_changes_method_and_rank_and_keeps_number_holders_and_addresses():
    bank, x = sf.Bank(D, slots=2, directions=7), torch.randn(3, D)
    slot, other = bank.register(sf.Add(rows(1)[0])), bank.register(sf.Add(rows(1, 5)[0]))
    bank.hold(slot)
    before = [t.data_ptr() for t in bank.tensors]
    bank.replace(slot, sf.Amplify(rows(5), 0.5))
    torch.testing.assert_close(edit(bank, x, slot), sf.ops.amplify(x, rows(5), 0.5))
    torch.testing.assert_close(edit(bank, x, other), x + rows(1, 5)[0])
    bank.release(slot)
    torch.testing.assert_close(edit(bank, x, slot), sf.ops.amplify(x, rows(5), 0.5))
    assert [t.data_ptr() for t in bank.tensors] == before


def test_a_replacement_that_does_not_fit_leaves_the_slot_as_it_was():
    bank, x = sf.Bank(D, slots=2, directions=4), torch.randn(3, D)
    slot, other = bank.register(sf.Amplify(rows(2), 0.5)), bank.register(sf.Add(rows(1)[0]))
    copies = [t.clone() for t in bank.tensors]
    with pytest.raises(RuntimeError, match="neighbouring directions"):
        bank.replace(slot, sf.Ablate(rows(4)))
    with pytest.raises(ValueError, match="width 3; this bank has 12"):
        bank.replace(slot, sf.Add(torch.ones(3)))
    assert all(torch.equal(a, b) for a, b in zip(copies, bank.tensors, strict=True))
    bank.release(other)
    bank.register(sf.Ablate(rows(2, 3)))  # the rows beside the slot are still its own
    torch.testing.assert_close(edit(bank, x, slot), sf.ops.amplify(x, rows(2), 0.5))


def staged(bank: sf.Bank) -> list[int]:
    """Give a bank the twin that it has on a GPU; returns the sizes of the copies that its commits make."""
    s, m = bank.slots.shape[0], bank.coefficients.shape[0]
    bank._host = _Buffers.of(bank.width, s, bank.vectors.shape[0], m, bank.vectors.dtype, "cpu", pinned=False)
    copies: list[int] = []

    class Block(torch.Tensor):
        def __getitem__(self, key):
            copies.append(key.stop - key.start)
            return torch.Tensor.__getitem__(self, key).as_subclass(torch.Tensor)

    bank._device = bank._device._replace(block=bank._device.block.as_subclass(Block))
    return copies


def test_a_step_sees_all_of_a_change_or_nothing_and_gets_it_in_one_copy():
    bank, x = sf.Bank(D, slots=4), torch.randn(2, D)
    copies = staged(bank)
    first = bank.register(sf.Add(rows(1)[0], 2.0))
    second = bank.register(sf.Ablate(rows(3)))
    assert not bank.slots.any()  # nothing has reached the device
    assert not bank.vectors.any()
    torch.testing.assert_close(edit(bank, x, first), x + 2 * rows(1)[0])
    assert len(copies) == 1
    edit(bank, x, second)
    assert len(copies) == 1  # nothing changed, nothing is copied
    bank.set_strength(first, 5.0)
    assert bank.coefficients[0, 2] == 2.0
    torch.testing.assert_close(edit(bank, x, first), x + 5 * rows(1)[0])
    assert copies[1] == 32  # one row of constants
    bank.replace(second, sf.Amplify(rows(2), 0.5))
    bank.release(first)
    torch.testing.assert_close(edit(bank, x, second), sf.ops.amplify(x, rows(2), 0.5))
    assert torch.equal(edit(bank, x, first), x)
    assert len(copies) == 3


@pytest.mark.parametrize(
    ("dtype", "width", "directions"),
    [(torch.bfloat16, 3, 5), (torch.float64, 7, 3), (torch.float16, 1, 1), (torch.float32, 4, 0)],
)
def test_odd_sizes_are_aligned(dtype, width, directions):
    bank = sf.Bank(width, slots=3, directions=directions, dtype=dtype)
    assert bank.vectors.shape == (directions, width)
    assert all(t.data_ptr() % 16 == 0 for t in bank.tensors if t.numel())
    assert not any(t.any() for t in bank.tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("columns", [1, 2])
def test_a_captured_graph_follows_every_change_of_the_bank(columns):
    """Capture once; then other owners, strengths, contents, methods and ranks between replays."""
    d, n = 576, 32
    bank = sf.Bank(d, slots=6, directions=128, dtype=torch.bfloat16, device="cuda")
    wide = torch.randn(40, d, generator=torch.Generator().manual_seed(0))
    first = bank.register(sf.Add(wide[0], 2.0))
    second = bank.register(sf.Ablate(wide[1:4]))
    x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
    static, rows = x.clone(), torch.full((n, columns), -1, dtype=torch.int32, device="cuda")
    scale, tensors = torch.ones(n, columns, device="cuda"), bank.tensors

    def step():
        sf.ops.subspace_(static, *tensors, rows, scale, max_rank=32)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def check():
        bank.commit()
        static.copy_(x)
        graph.replay()
        expected = reference.subspace(x, *tensors, rows, scale)
        torch.testing.assert_close(static.double().cpu(), expected, atol=0.1, rtol=2e-2)
        idle = (rows < 0).all(1)
        assert torch.equal(static[idle], x[idle])

    check()  # nobody is steered
    rows[::2, 0] = first
    check()
    bank.set_strength(first, -3.0)
    rows[1::2, columns - 1] = second
    check()
    bank.replace(second, sf.Amplify(wide[4:36] / d**0.5, 0.5, keep_norm=True))
    scale.fill_(0.5)
    check()
    bank.release(first)
    check()


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_slot_is_read_as_it_was_written(name):
    """Alone and behind others: its header, its rows and its size say the same."""
    slot = EXAMPLES[name][0].slot()
    bank = sf.Bank(D, slots=3)
    bank.register(EXAMPLES["LoReFT"][0])
    number = bank.register(EXAMPLES[name][0])
    for tables, index in ((slot.tables(), 0), (bank.tensors, number)):
        back = slot_of(*tables, index)
        assert (back.mode, back.steps, back.keep_norm) == (slot.mode, slot.steps, slot.keep_norm)
        assert (back.size, back.modes, back.rank) == (slot.size, slot.modes, slot.rank)
        assert (back.project is back.lift) == (slot.project is slot.lift)
        for ours, theirs in ((back.directions, slot.directions), (back.numbers, slot.numbers)):
            assert torch.equal(ours, theirs)
    assert slot.size == (len(slot.tables()[0]), len(slot.tables()[1]))


def test_slots_need_the_room_of_the_largest():
    slots = [sf.Add(rows(1)[0]).slot(), EXAMPLES["LoReFT"][0].slot(), sf.Ablate(rows(3)).slot()]
    assert [slot.size for slot in slots] == [(1, 2), (4, 3), (3, 4)]
    assert needs(slots) == (8, 9)
    assert needs(slots, 1) == (4, 4)
    assert needs([]) == (0, 0)
