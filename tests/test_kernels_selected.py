"""Selected attention in Triton, run by the interpreter on the CPU: against the torch operator in float64, on sizes that take every path."""
import pytest
import torch

from erwin_nsa.geometry.balltree import slot_layout
from erwin_nsa.kernels import selected
from erwin_nsa.kernels.env import INTERPRET
from erwin_nsa.kernels.selected import invert_selection, selected_attention_reference, selected_attention_triton, walk_lists
from erwin_nsa.nn.selected import selected_attention

pytestmark = [pytest.mark.skipif(not INTERPRET, reason="the interpreter is off: tests/gpu has the tests of compiled kernels"),
              pytest.mark.usefixtures("nan_empty")]
#        sizes         b  k  H  H_kv d
CASES = [((1,),        4, 2, 2, 1, 5), ((31,), 8, 3, 4, 2, 4), ((33,), 20, 2, 2, 2, 20), ((13, 1, 6), 4, 4, 3, 3, 48), ((19, 3), 8, 3, 16, 1, 16),
         ((24,),       5, 3, 6, 2, 7), ((9, 5), 1, 4, 2, 1, 4), ((50,), 36, 2, 2, 1, 16), ((130,), 64, 2, 2, 1, 4), ((49,), 20, 3, 26, 2, 4)]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"n{'_'.join(map(str, c[0]))}-b{c[1]}k{c[2]}H{c[3]}kv{c[4]}d{c[5]}")
per_row = pytest.mark.parametrize("per", ["point", "ball"])
PARTS = ("output", "dq", "dk", "dv")


def make(case, per, kind="repeats", seed=0):
    """Tensors, a gradient to pull on the output with, and the other arguments."""
    sizes, b, k, H, H_kv, d = case
    mask = slot_layout(tuple(sizes), (b,)).mask
    S, W, g = len(mask), len(mask) // b, torch.Generator().manual_seed(seed)
    shape = (H_kv, S if per == "point" else W, k)
    picks = {"repeats": torch.randint(-1, W, shape, generator=g), "none": torch.full(shape, -1),
             "same": torch.full(shape, W - 1), "own": (torch.arange(shape[1])[:, None] * W // shape[1]).expand(shape)}[kind]
    draw = lambda h: torch.randn(S, h, d, generator=g)
    return [draw(H), draw(H_kv), draw(H_kv)], draw(H), (picks, mask, b)


def run(op, tensors, pull, rest, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out = op(*leaves, *rest)
    return [t.detach().double() for t in (out, *torch.autograd.grad(out, leaves, pull.to(dtype)))]


def assert_same(mine, exact, tol):
    for name, a, e in zip(PARTS, mine, exact):
        assert (a - e).abs().max() <= tol * max(1.0, e.abs().max()), f"{name}: off by {(a - e).abs().max():.1e} at {e.abs().max():.1e}"


@cases
@per_row
def test_equals_the_torch_operator(case, per):
    tensors, pull, rest = make(case, per)
    assert_same(run(selected_attention_triton, tensors, pull, rest, torch.float32), run(selected_attention, tensors, pull, rest, torch.float64), 2e-6)


@pytest.mark.parametrize("kind", ["none", "same", "own"])
@per_row
def test_odd_selections(kind, per):
    tensors, pull, rest = make(CASES[4], per, kind)
    mine = run(selected_attention_triton, tensors, pull, rest, torch.float32)
    assert_same(mine, run(selected_attention_reference, tensors, pull, rest, torch.float64), 3e-6)
    if kind == "none": assert all((t == 0).all() for t in mine)


@per_row
def test_half_precision_and_its_tiles(per):
    tensors, pull, rest = make(((40, 3), 8, 3, 4, 1, 64), per)
    assert_same(run(selected_attention_triton, tensors, pull, rest, torch.float16), run(selected_attention, tensors, pull, rest, torch.float64), 3e-3)


@per_row
def test_masked_slots_may_hold_anything(per):
    """NaN in masked rows of q, k, v and of the gradient that comes in: same bits as zeros there, twice in a row."""
    tensors, pull, rest = make(CASES[4], per)
    gone = ~rest[1][:, None, None]
    a, b, c = (run(selected_attention_triton, [t.masked_fill(gone, x) for t in tensors], pull.masked_fill(gone, x), rest, torch.float32)
               for x in (float("nan"), 0.0, 0.0))
    for name, x, y, z in zip(PARTS, a, b, c): assert torch.equal(x, y) and torch.equal(y, z), name


@pytest.mark.parametrize("P", [1, 2, 3])
def test_walking_together_changes_nothing(P, monkeypatch):
    """Tiles of two balls, so that the odd one out is masked."""
    tensors, pull, rest = make(CASES[4], "point")
    monkeypatch.setattr(selected, "TILES", dict(walk=dict(P=P), forward=dict(BN=16), query=dict(BN=16)))
    assert_same(run(selected_attention_triton, tensors, pull, rest, torch.float32), run(selected_attention, tensors, pull, rest, torch.float64), 2e-6)


def test_short_pieces_add_up(monkeypatch):
    """Lists cut into pieces of one pick."""
    tensors, pull, rest = make(CASES[4], "ball")
    monkeypatch.setattr(selected, "_piece_size", lambda *a: 1)
    assert_same(run(selected_attention_triton, tensors, pull, rest, torch.float32), run(selected_attention, tensors, pull, rest, torch.float64), 2e-6)


def test_pairs_and_lists_agree(monkeypatch):
    """Balls with 256 rows and more, the last of them partial: partial gradients by pairs; with no memory allowed for those, by lists."""
    tensors, pull, rest = make(((70,), 32, 3, 8, 1, 4), "ball")
    calls = []
    kernel = selected._pair_kernel
    monkeypatch.setattr(selected, "_pair_kernel", type("Spy", (), {"__getitem__": lambda _, grid: calls.append(grid) or kernel[grid]})())
    exact, pairs = run(selected_attention, tensors, pull, rest, torch.float64), run(selected_attention_triton, tensors, pull, rest, torch.float32)
    monkeypatch.setattr(selected, "PAIR_BYTES", 0)
    lists = run(selected_attention_triton, tensors, pull, rest, torch.float32)
    assert len(calls) == 1
    for mine in (pairs, lists): assert_same(mine, exact, 2e-6)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("some", [False, True], ids=["all", "live"])
def test_inverse_lists_hold_every_pick_once(chunk, some, nan_empty):
    """Lists ascend; every ball has pieces for its picks; rows without a point are left out."""
    g = torch.Generator().manual_seed(0)
    picks, live = torch.randint(-1, 7, (2, 90, 4), generator=g), (torch.rand(90, generator=g) > 0.3 * some).to(torch.uint8)
    order, offset, start, owner = (t.tolist() for t in invert_selection(picks, 6, chunk, live if some else None))
    for kv in range(2):
        for ball in range(6):
            at = kv * 6 + ball
            assert order[offset[at]:offset[at + 1]] == [kv * 360 + i for i in (picks[kv].flatten() == ball).nonzero().flatten().tolist() if live[i // 4]]
            assert start[at + 1] - start[at] >= -(-(offset[at + 1] - offset[at]) // chunk) and owner[start[at]:start[at + 1]] == [at] * (start[at + 1] - start[at])
    assert start[-1] <= len(owner)
    rows = invert_selection(picks, 6, chunk, live if some else None, 4)[0].tolist()
    assert rows[:offset[-1]] == [i // 4 for i in order[:offset[-1]]]


def test_inverse_lists_of_many_stretches():
    """More balls than a block and more picks than a stretch; the same as a stable sort."""
    picks = torch.randint(0, 70, (1, 500, 3), generator=torch.Generator().manual_seed(0))
    order, offset, *_ = invert_selection(picks, 70, 8)
    assert torch.equal(order[:1500].long(), picks.flatten().argsort(stable=True)) and offset.diff().tolist() == picks.flatten().bincount(minlength=70).tolist()


def test_union_holds_every_pick_of_every_row():
    """Entries and times decode to (row, ball) pairs: the same multiset as the picks, no entry twice; balls with an empty slot stand last."""
    picks = torch.randint(-1, 9, (2, 10, 4), generator=torch.Generator().manual_seed(0))
    full = (torch.arange(9) != 3).int()
    entries, times, count = walk_lists(picks, full, together=4)
    for kv in range(2):
        for g in range(3):
            whole, n = count[kv, g].tolist()
            balls = entries[kv, g, :n].tolist()
            assert len(set(balls)) == n and [b == 3 for b in balls] == [i >= whole for i in range(n)]
            pairs = sorted((p, b) for b, row in zip(balls, times[kv, g, :n].exp2().tolist()) for p, t in enumerate(row) for _ in range(round(t)))
            assert pairs == sorted((p, i) for p, row in enumerate(picks[kv, 4 * g:4 * g + 4].tolist()) for i in row if i >= 0)


def test_lists_have_no_gaps():
    """A list alone: full balls in the order of the picks, then the others, then -1; a ball that does not exist is none."""
    entries, _, count = walk_lists(torch.tensor([[[1, -1, 4, 2], [9, 0, 0, 3]]]), torch.tensor([1, 0, 1, 0, 1], dtype=torch.int32))
    assert entries.tolist() == [[[4, 2, 1, -1], [0, 0, 3, -1]]] and count.tolist() == [[[2, 3], [2, 3]]]


@per_row
def test_operator_is_well_behaved(per):
    tensors, _, (picks, mask, b) = make(CASES[0], per)
    torch.library.opcheck(torch.ops.erwin_nsa.selected_fwd.default, (*(t.requires_grad_() for t in tensors), picks, mask, b))


def test_compiles_whole():
    tensors, pull, rest = make(CASES[1], "ball")
    op = torch.compile(lambda q, k, v: selected_attention_triton(q, k, v, *rest), fullgraph=True, backend="aot_eager")
    a, e = (run(f, tensors, pull, (), torch.float32) for f in (op, lambda *t: selected_attention_triton(*t, *rest)))
    assert all(torch.equal(x, y) for x, y in zip(a, e))


def test_what_does_not_fit_is_refused():
    tensors, _, (picks, mask, b) = make(CASES[1], "point")
    q, k, v = tensors
    for says, args in (("multiple of H_kv", (q[:, :3], k, v, picks, mask, b)), ("divisors of 32", (q, k, v, picks[:, :5], mask, b)),
                       ("Cast them", (q.double(), k, v, picks, mask, b)), ("at most 128", (*(t.repeat(1, 1, 33) for t in tensors), picks, mask, b))):
        with pytest.raises(ValueError, match=says): selected_attention_triton(*args)
    assert (selected_attention_triton(q, k, v, picks[..., :0], mask, b) == 0).all()
