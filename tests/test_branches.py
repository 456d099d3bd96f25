"""Every attention branch, and the layer that joins them, against dense float64 attention with its mask written out.

`check` compares an operator with its oracle: the output at all slots, and the gradients of all inputs for a random pull on `rows`
(all slots of small clouds, 96 of large ones, where the oracle would need S x S numbers a head for every gradient).
"""
import math

import pytest
import torch

from erwin_nsa.geometry.balltree import BallTree, slot_layout
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn import runtime
from erwin_nsa.nn.compressed import BallCompression, SelectionRule, ball_windows, compressed_attention, select_balls
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.local import local_attention
from erwin_nsa.nn.nsa import NSAttention, make_frames
from erwin_nsa.nn.oracle import compressed_visibility, dense_attention, local_visibility, selected_visibility
from erwin_nsa.nn.selected import selected_attention

pytestmark = pytest.mark.usefixtures("nan_empty")

PAPER = (128, 32, 16, 4, 2, 8)                                      # m, b, k, H, H_kv, d
LARGE = (128, 32, 16, 2, 1, 8)
CASES = [(PAPER, (1,)), (PAPER, (2,)), (PAPER, (31,)), (PAPER, (33,)), (PAPER, (507,)), (PAPER, (300, 1, 33)),
         ((12, 4, 3, 3, 1, 5), (50, 1, 29)), ((96, 32, 5, 6, 2, 20), (130, 2, 97)), ((32, 32, 16, 2, 2, 4), (100,)),
         ((16, 48, 3, 4, 2, 7), (150, 1, 49)), ((7, 7, 2, 1, 1, 3), (20, 6)), ((8, 1, 4, 2, 1, 4), (21, 3)),
         (LARGE, (3586,)), (LARGE, (5000,))]
cases = pytest.mark.parametrize("setting, sizes", CASES, ids=[f"m{s[0]}b{s[1]}k{s[2]}H{s[3]}kv{s[4]}d{s[5]}-n{'_'.join(map(str, n))}"
                                                              for s, n in CASES])
small = pytest.mark.parametrize("setting, sizes", [(PAPER, (300, 1, 33)), ((12, 4, 3, 3, 1, 5), (50, 1, 29))], ids=["paper", "odd"])


# ---- tools

def layout(setting, sizes):
    return slot_layout(tuple(sizes), tuple(sorted({setting[0], setting[1]}, reverse=True)))


def inputs(setting, slots, seed=0, dtype=torch.float64):
    """q, k, v, pos, sigma of a batch."""
    g = torch.Generator().manual_seed(seed)
    H, H_kv, d = setting[3:]
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    S = len(slots)
    return draw(S, H, d), draw(S, H_kv, d), draw(S, H_kv, d), draw(S, 3), -1 + 0.5 * draw(H)


def some_rows(slots):
    S = len(slots)
    return torch.arange(S) if S < 1000 else torch.randperm(S, generator=torch.Generator().manual_seed(1))[:96].sort().values


def pull_on(op, tensors, rows):
    """Output, and gradients for a random pull on the given rows of it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = op(*leaves)
    pull = torch.randn(out[rows].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad((out[rows] * pull).sum(), leaves, allow_unused=True, materialize_grads=True)
    return out.detach(), grads


def assert_close(a, b, name, tol=1e-10):
    error = (a - b).abs().max().item() if a.numel() else 0.0
    scale = max(1.0, b.abs().max().item() if b.numel() else 0.0)
    assert a.shape == b.shape and error <= tol * scale, f"{name}: off by {error:.2e} at a scale of {scale:.2e}"   # NaN fails too


def check(op, oracle, tensors, slots, names):
    """`oracle(rows, *tensors)` gives the output at some slots."""
    rows = some_rows(slots)
    out, grads = pull_on(op, tensors, rows)
    with torch.no_grad():
        expected = torch.cat([oracle(r, *tensors) for r in torch.arange(len(slots)).split(512)])
    assert_close(out, expected, "output")
    assert (out[~slots.mask] == 0).all()
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    part = oracle(rows, *leaves)
    pull = torch.randn(part.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for name, mine, theirs in zip(names, grads, torch.autograd.grad((part * pull).sum(), leaves, allow_unused=True, materialize_grads=True)):
        assert_close(mine, theirs, f"gradient of {name}")


def local_oracle(slots, m):
    visible = local_visibility(slots, m)
    def oracle(rows, q, k, v, pos, sigma):
        pos = pos.masked_fill(~slots.mask[:, None], 0)
        apart = torch.cdist(pos[rows], pos, compute_mode="donot_use_mm_for_euclid_dist")
        return dense_attention(q[rows], k, v, visible[rows], sigma[:, None, None] * apart)[0]
    return oracle


def compressed_oracle(slots, windows, memory):
    visible = compressed_visibility(slots, windows.table)
    if memory: visible = torch.cat([visible, slots.mask[:, None]], 1)
    def oracle(rows, q, kc, vc, *mem):
        k, v = (kc, vc) if not memory else (torch.cat([kc, mem[0][None]]), torch.cat([vc, mem[1][None]]))
        return dense_attention(q[rows], k, v, visible[rows])[0]
    return oracle


def selected_oracle(slots, indices, b, causal=False):
    visible, times = selected_visibility(slots, indices, b, causal)
    return lambda rows, q, k, v: dense_attention(q[rows], k, v, visible[:, rows], times=times[:, rows])[0]


def random_selection(slots, setting, per, seed=3):
    """(H_kv, R, k) unique balls a row, a quarter of the entries and some whole rows -1."""
    g = torch.Generator().manual_seed(seed)
    _, b, k, _, H_kv, _ = setting
    R, W = len(slots) // (1 if per == "point" else b), len(slots) // b
    chosen = torch.rand(H_kv, R, W, generator=g).argsort(-1)[..., :k]
    chosen = torch.nn.functional.pad(chosen, (0, k - chosen.shape[-1]), value=-1)
    chosen = chosen.masked_fill(torch.rand(chosen.shape, generator=g) < 0.25, -1)
    return chosen.masked_fill(torch.rand(H_kv, R, 1, generator=g) < 0.1, -1)


def window_table(slots, b, s):
    """The windows by a loop: slots of each, -1 outside its cloud or where no point is."""
    rows = []
    for w in range(len(slots) // s):
        at = range(w * s - (b - s), w * s + s)
        own = slots.cloud[w * s]
        rows.append([i if i >= 0 and slots.cloud[i] == own and slots.mask[i] else -1 for i in at])
    return torch.tensor(rows)


# ---- the oracle itself

def test_the_oracle_is_attention_by_hand():
    """One query, two visible keys: weights e^a / (e^a + e^b)."""
    q, k = torch.tensor([[[2.0]]]), torch.tensor([[[0.5]], [[0.0]], [[9.0]]])
    v = torch.tensor([[[1.0]], [[3.0]], [[99.0]]])
    out, weights = dense_attention(q, k, v, torch.tensor([[True, True, False]]))
    a = math.exp(1) / (math.exp(1) + 1)
    assert torch.allclose(weights[0, 0], torch.tensor([a, 1 - a, 0])) and torch.allclose(out, torch.tensor(a + 3 * (1 - a)))
    assert (dense_attention(q, k, v, torch.zeros(1, 3, dtype=torch.bool))[0] == 0).all()
    twice = dense_attention(q, k, v, torch.tensor([[True, True, False]]), times=torch.tensor([[2, 1, 0]]))[1]
    assert torch.allclose(twice[0, 0, 0], torch.tensor(2 * math.e / (2 * math.e + 1)))


# ---- forward and all gradients

@cases
def test_local(setting, sizes):
    slots = layout(setting, sizes)
    m = setting[0]
    check(lambda *t: local_attention(*t, slots.mask, m), local_oracle(slots, m), inputs(setting, slots), slots, "q k v pos sigma".split())


@pytest.mark.parametrize("memory", [False, True], ids=["", "memory"])
@pytest.mark.parametrize("overlap", [1, 2], ids=["", "overlap"])
@cases
def test_compressed(setting, sizes, overlap, memory):
    slots, b = layout(setting, sizes), setting[1]
    if b % overlap: pytest.skip(f"windows of {b} have no half")
    windows = ball_windows(slots, b, b // overlap)
    q, g = inputs(setting, slots)[0], torch.Generator().manual_seed(4)
    kc, vc = torch.randn(2, len(windows), *setting[4:], generator=g, dtype=torch.float64)
    extra = list(torch.randn(2, *setting[4:], generator=g, dtype=torch.float64)) if memory else []
    check(lambda q, kc, vc, *mem: compressed_attention(q, kc, vc, windows, mem or None), compressed_oracle(slots, windows, memory),
          [q, kc, vc, *extra], slots, "q kc vc memory_key memory_value".split())


@pytest.mark.parametrize("per", ["point", "ball"])
@cases
def test_selected(setting, sizes, per):
    """Selections of any kind: missing, empty, of empty balls, and of other clouds, which the operator does not forbid."""
    slots, b = layout(setting, sizes), setting[1]
    indices = random_selection(slots, setting, per)
    check(lambda *t: selected_attention(*t, indices, slots.mask, b), selected_oracle(slots, indices, b),
          inputs(setting, slots)[:3], slots, "qkv")


@small
def test_selected_published(setting, sizes):
    """The published kernel: balls chosen twice count twice, later slots are hidden."""
    slots, b = layout(setting, sizes), setting[1]
    indices = random_selection(slots, setting, "point") // 2 * 2
    indices = indices.masked_fill(indices < 0, -1)
    for causal in (False, True):
        check(lambda *t: selected_attention(*t, indices, slots.mask, b, causal), selected_oracle(slots, indices, b, causal),
              inputs(setting, slots)[:3], slots, "qkv")


@pytest.mark.parametrize("phi", ["mlp", "attention", "mean"])
@pytest.mark.parametrize("overlap", [1, 2], ids=["", "overlap"])
@small
def test_compression(setting, sizes, overlap, phi):
    """phi of each window by a loop; an MLP sees zeros where no point is, a pool does not see them at all."""
    slots, b, d = layout(setting, sizes), setting[1], setting[5]
    windows = ball_windows(slots, b, b // overlap)
    expected = window_table(slots, b, b // overlap)
    assert torch.equal(windows.table, expected)
    torch.manual_seed(0)
    compress = BallCompression(b, d, phi).double()
    t = inputs(setting, slots)[1]

    def by_loop(t):
        out = []
        for row in expected:
            if (row < 0).all(): continue
            x = torch.where((row >= 0)[:, None, None], t[row.clamp(min=0)], 0).transpose(0, 1)          # (H_kv, b, d)
            if phi == "mlp": out.append(compress.mlp(x.flatten(1)))
            elif phi == "mean": out.append(x[:, row >= 0].mean(1))
            else: out.append((compress.score(x[:, row >= 0]).softmax(1) * x[:, row >= 0]).sum(1))
        return torch.stack(out)
    used = (expected >= 0).any(1)
    rows = torch.arange(int(used.sum()))
    (a, ga), (e, ge) = (pull_on(f, [t], rows) for f in (lambda t: compress(t, windows.table)[used], by_loop))
    assert_close(a, e, phi)
    assert_close(ga[0], ge[0], f"gradient of {phi}")
    for slot, occupied, first, count in windows.runs:
        assert used[first:first + count].all(), "windows in use hold a point"
    assert sum(run[3] for run in windows.runs) == used.sum()


# ---- selection

def chosen_by_loop(q, kc, windows, how, memory_key):
    """Scores of every ball for every query, ranked: one set a row, empty for masked slots."""
    slots, b, ratio = windows.slots, windows.size, windows.size // windows.stride
    S, (H, d), H_kv = len(slots), q.shape[1:], kc.shape[1]
    logits = torch.einsum("shd,whd->hsw", q, kc.repeat_interleave(H // H_kv, 1)) * d ** -0.5
    visible = compressed_visibility(slots, windows.table)
    if how.rule == "mean_logits": votes = logits.unflatten(0, (H_kv, -1)).mean(1)
    else:
        logits = logits.masked_fill(~visible, float("-inf"))
        if memory_key is not None:
            extra = torch.einsum("shd,hd->hs", q, memory_key.repeat_interleave(H // H_kv, 0)) * d ** -0.5
            logits = torch.cat([logits, extra[..., None]], -1)
        votes = logits.softmax(-1)[..., :visible.shape[1]].nan_to_num().unflatten(0, (H_kv, -1)).sum(1)
    rows = []
    for h in range(H_kv):
        for r in range(S if how.per == "point" else S // b):
            queries = [r] if how.per == "point" else [s for s in range(r * b, r * b + b) if slots.mask[s]]
            score = {}
            for w in range(S // b):
                mine = [i for i in range(w * ratio, (w + 1) * ratio) if queries and slots.mask[queries[0]] and visible[queries[0], i]]
                own = how.exclude_own and w == queries[0] // b if queries else False
                if mine and slots.mask[w * b] and not own: score[w] = votes[h, queries][:, mine].mean().item()
            rows.append(sorted(sorted(score, key=score.get, reverse=True)[:how.k]))
    return rows


@pytest.mark.parametrize("exclude_own", [False, True], ids=["", "others"])
@pytest.mark.parametrize("memory", [False, True], ids=["", "memory"])
@pytest.mark.parametrize("overlap", [1, 2], ids=["", "overlap"])
@pytest.mark.parametrize("per", ["point", "ball"])
@pytest.mark.parametrize("rule", ["mean_logits", "sum_probabilities"])
def test_selection_ranks_by_the_votes(rule, per, overlap, memory, exclude_own):
    setting, sizes = (12, 4, 3, 4, 2, 5), (26, 1, 13)
    slots = layout(setting, sizes)
    windows, g = ball_windows(slots, 4, 4 // overlap), torch.Generator().manual_seed(5)
    q, kc = inputs(setting, slots)[0], torch.randn(len(windows), 2, 5, generator=g, dtype=torch.float64)
    key = torch.randn(2, 5, generator=g, dtype=torch.float64) if memory else None
    how = SelectionRule(3, rule, per, exclude_own)
    chosen = select_balls(q, kc, windows, how, key)
    rows = [sorted(i for i in row if i >= 0) for row in chosen.flatten(0, 1).tolist()]
    assert rows == chosen_by_loop(q, kc, windows, how, key)
    assert chosen.shape == (2, len(slots) // (1 if per == "point" else 4), 3) and not chosen.requires_grad


@cases
def test_selection_is_unique_and_of_the_own_cloud(setting, sizes):
    slots, b, k = layout(setting, sizes), setting[1], setting[2]
    windows = ball_windows(slots, b, b)
    q = inputs(setting, slots)[0]
    kc = torch.randn(len(windows), *setting[4:], generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for per in ("point", "ball"):
        chosen = select_balls(q, kc, windows, SelectionRule(k, per=per))
        first = torch.arange(len(slots)) if per == "point" else torch.arange(0, len(slots), b)
        valid = chosen >= 0
        assert torch.equal(slots.cloud[(chosen * b).clamp(min=0)][valid], slots.cloud[first][None, :, None].expand_as(chosen)[valid])
        assert slots.mask[(chosen * b).clamp(min=0)][valid].all(), "no empty ball is chosen"
        full = torch.tensor([min(k, w) for w in slots.balls_per_cloud(b)])[slots.cloud[first]] * slots.mask[first]
        assert torch.equal(valid.sum(-1), full.expand(len(chosen), -1))
        ordered = chosen.sort(-1).values
        assert not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()


def test_published_selection_by_loop():
    """Slot t of a cloud uses the row of its slot t // b, and no ball after its own."""
    setting, sizes = (16, 4, 3, 4, 2, 5), (64, 16)
    slots = layout(setting, sizes)
    windows = ball_windows(slots, 4, 4)
    q, kc = inputs(setting, slots)[0], torch.randn(len(windows), 2, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    right = select_balls(q, kc, windows, SelectionRule(3, exclude_own=True))
    wrong = select_balls(q, kc, windows, SelectionRule(3, exclude_own=True, published=True))
    for t in range(80):
        start = 0 if t < 64 else 64
        expected = right[:, start + (t - start) // 4].clamp(max=t // 4)
        assert torch.equal(wrong[:, t].sort().values, expected.sort().values), t


# ---- nothing leaks out of masked slots

@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
@small
def test_masked_slots_may_hold_anything(setting, sizes, poison):
    """q, k, v, pos of masked slots, compressed rows of empty windows, and the pull on masked outputs."""
    slots, (m, b, k, H, H_kv, d) = layout(setting, sizes), setting
    mask, windows = slots.mask, ball_windows(slots, b, b)
    clean = inputs(setting, slots)
    dirty = [t.masked_fill(~mask.view(-1, *[1] * (t.ndim - 1)), poison) for t in clean[:4]] + [clean[4]]
    kc, vc = torch.randn(2, len(windows), H_kv, d, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    empty = (windows.table < 0).all(1)[:, None, None]
    assert (~mask).any() and empty.any()
    rules = [SelectionRule(k, rule, per) for rule in ("mean_logits", "sum_probabilities") for per in ("point", "ball")]
    chosen = [[select_balls(t[0], c, windows, r) for r in rules] for t, c in ((clean, kc), (dirty, kc.masked_fill(empty, poison)))]
    assert all(torch.equal(a, e) for a, e in zip(*chosen))
    ops = [(lambda *t: local_attention(*t, mask, m), clean, dirty),
           (lambda *t: compressed_attention(*t, windows), [clean[0], kc, vc], [dirty[0], *(t.masked_fill(empty, poison) for t in (kc, vc))]),
           *[(lambda *t, i=i: selected_attention(*t, i, mask, b), clean[:3], dirty[:3]) for i in chosen[0][:2]]]
    for op, a, e in ops:
        (out, grads), (out2, grads2) = pull_on(op, a, mask.nonzero().flatten()), pull_on(op, e, mask.nonzero().flatten())
        assert torch.equal(out, out2) and all(torch.equal(x, y) for x, y in zip(grads, grads2))
        leaves = [t.detach().clone().requires_grad_() for t in e]
        pull = torch.ones_like(out).masked_fill(~mask[:, None, None], poison)
        assert all(torch.isfinite(t).all() for t in torch.autograd.grad(op(*leaves), leaves, pull))


# ---- empty selections

def test_nothing_selected_gives_zero_and_moves_nothing():
    setting, sizes = (12, 4, 3, 3, 1, 5), (50, 1, 29)
    slots = layout(setting, sizes)
    t = inputs(setting, slots)[:3]
    none = torch.full((1, len(slots), 3), -1)
    out, grads = pull_on(lambda *t: selected_attention(*t, none, slots.mask, 4), t, torch.arange(len(slots)))
    assert (out == 0).all() and all((g == 0).all() for g in grads)
    empty = int((~slots.mask.view(-1, 4).any(1)).nonzero()[0])                      # a ball without a point
    out, grads = pull_on(lambda *t: selected_attention(*t, torch.full_like(none, empty), slots.mask, 4), t, torch.arange(len(slots)))
    assert (out == 0).all() and all((g == 0).all() for g in grads)
    some = none.clone()
    some[:, 7] = torch.tensor([0, -1, 2])
    out, grads = pull_on(lambda *t: selected_attention(*t, some, slots.mask, 4), t, torch.arange(len(slots)))
    assert (out[7] != 0).all() and (out.sum((1, 2)) != 0).sum() == 1
    assert (grads[0].abs().sum((1, 2)) > 0).nonzero().flatten().tolist() == [7]
    assert (grads[2].abs().sum((1, 2)) > 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_a_selection_of_no_balls_can_be_trained_through():
    slots = layout((12, 4), (20,))
    q, k, v = (torch.randn(24, 2, 4, requires_grad=True) for _ in range(3))
    out = selected_attention(q, k, v, torch.zeros(2, 24, 0, dtype=torch.long), slots.mask, 4)
    assert (out == 0).all() and out.requires_grad


# ---- derivatives by differences

TINY = (4, 2, 2, 2, 1, 3)


@pytest.mark.parametrize("memory", [False, True], ids=["", "memory"])
@pytest.mark.parametrize("sizes", [(5,), (3, 1)], ids=str)
def test_gradcheck(sizes, memory):
    """Finite differences in float64, positions and distance bias included."""
    slots = layout(TINY, sizes)
    leaves = [t.requires_grad_() for t in inputs(TINY, slots)]
    assert torch.autograd.gradcheck(lambda *t: local_attention(*t, slots.mask, 4), leaves)
    for stride in (2, 1):
        windows = ball_windows(slots, 2, stride)
        k, v = (torch.randn(len(windows), 1, 3, dtype=torch.float64, requires_grad=True) for _ in "kv")
        extra = [torch.randn(1, 3, dtype=torch.float64, requires_grad=True) for _ in "kv"] if memory else []
        assert torch.autograd.gradcheck(lambda q, k, v, *mem: compressed_attention(q, k, v, windows, mem or None), [leaves[0], k, v, *extra])
    for per in ("point", "ball"):
        indices = random_selection(slots, TINY, per)
        assert torch.autograd.gradcheck(lambda *t: selected_attention(*t, indices, slots.mask, 2), leaves[:3])


def test_coincident_points_have_finite_gradients():
    """The distance has a kink at zero; its gradient there is taken as zero."""
    slots = layout(TINY, (4,))
    q, k, v, pos, sigma = inputs(TINY, slots)
    pos = pos[:1].expand(len(slots), -1)
    _, grads = pull_on(lambda *t: local_attention(*t, slots.mask, 4), [q, k, v, pos, sigma], torch.arange(4))
    assert all(torch.isfinite(g).all() for g in grads) and (grads[3] == 0).all()


# ---- arithmetic

def all_ops(setting, sizes, dtype, seed=0):
    """(name, operator, oracle, inputs) of every branch."""
    slots, (m, b, k, H, H_kv, d) = layout(setting, sizes), setting
    windows, g = ball_windows(slots, b, b), torch.Generator().manual_seed(9)
    t = inputs(setting, slots, seed, dtype)
    kc, vc, key, value = (torch.randn(*s, H_kv, d, generator=g, dtype=torch.float64).to(dtype) for s in [(len(windows),)] * 2 + [()] * 2)
    yield "local", lambda *t: local_attention(*t, slots.mask, m), local_oracle(slots, m), t, slots
    yield "compressed", lambda q, kc, vc, *mem: compressed_attention(q, kc, vc, windows, mem), compressed_oracle(slots, windows, True), \
        (t[0], kc, vc, key, value), slots
    for per in ("point", "ball"):
        i = random_selection(slots, setting, per)
        yield f"selected by {per}", lambda *t, i=i: selected_attention(*t, i, slots.mask, b), selected_oracle(slots, i, b), t[:3], slots


@small
def test_two_calls_are_equal_in_every_bit(setting, sizes):
    for name, op, _, t, slots in all_ops(setting, sizes, torch.float32):
        (a, ga), (b, gb) = (pull_on(op, t, torch.arange(len(slots))) for _ in range(2))
        assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(ga, gb)), name


@pytest.mark.parametrize("elements", [1, 1000, 10**9])
@small
def test_chunks_do_not_show(setting, sizes, elements, monkeypatch):
    """The smallest chunks and one chunk for all: the same numbers to rounding."""
    plain = [pull_on(op, t, torch.arange(len(s))) for _, op, _, t, s in all_ops(setting, sizes, torch.float64)]
    slots, b, k = layout(setting, sizes), setting[1], setting[2]
    q, windows = inputs(setting, slots)[0], ball_windows(slots, b, b)
    kc = torch.randn(len(windows), *setting[4:], generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    rules = [SelectionRule(k, rule, per, True) for rule in ("mean_logits", "sum_probabilities") for per in ("point", "ball")]
    chosen = [select_balls(q, kc, windows, r) for r in rules]
    monkeypatch.setitem(runtime.CHUNK_ELEMENTS, "cpu", elements)
    for (out, grads), (name, op, _, t, s) in zip(plain, all_ops(setting, sizes, torch.float64)):
        again, grads2 = pull_on(op, t, torch.arange(len(s)))
        assert_close(again, out, name, 1e-13)
        for a, e in zip(grads2, grads): assert_close(a, e, name, 1e-12)
    assert all(torch.equal(select_balls(q, kc, windows, r), c) for r, c in zip(rules, chosen))


def float32_errors(setting, sizes, seed):
    """(operator, what, relative RMS error against float64, that of dense float32 attention on the same inputs)."""
    rms = lambda a, e: ((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt().clamp(min=1e-30)).item()
    for name, op, oracle, t, slots in all_ops(setting, sizes, torch.float32, seed):
        rows = torch.arange(len(slots))
        mine, plain = pull_on(op, t, rows), pull_on(lambda *t: oracle(rows, *t), t, rows)
        exact = pull_on(lambda *t: oracle(rows, *t), [x.double() for x in t], rows)
        parts = {"local": "q k v pos sigma", "compressed": "q kc vc memory_key memory_value"}.get(name, "q k v").split()
        for part, a, p, e in zip(["output", *parts], [mine[0], *mine[1]], [plain[0], *plain[1]], [exact[0], *exact[1]]):
            yield name, part, rms(a, e), rms(p, e)


def pooled_errors(setting, sizes, only=lambda part: True):
    """The same over five draws: {(operator, what): (error, plain error)}. A single draw of 16 numbers is luck."""
    sums = {}
    for seed in range(5):
        for name, part, error, plain in float32_errors(setting, sizes, seed):
            if only(part): sums.setdefault((name, part), []).append((error, plain))
    return {key: torch.tensor(pairs).square().mean(0).sqrt().tolist() for key, pairs in sums.items()}


@small
def test_float32_error_is_that_of_plain_torch(setting, sizes):
    """At most 3 times the error of plain torch; no tolerance set by hand."""
    for (name, part), (error, plain) in pooled_errors(setting, sizes, lambda part: part != "sigma").items():
        assert error <= 3 * plain + 1e-8, f"{name}, {part}: {error:.2e} against {plain:.2e}"


def test_float32_error_of_the_distance_bias():
    error, plain = pooled_errors(PAPER, (300, 1, 33), lambda part: part == "sigma")["local", "sigma"]
    assert error <= 3 * plain + 1e-8, f"{error:.2e} against {plain:.2e}"


def test_float32_position_gradient_far_from_the_origin():
    """Moving a cloud by 100 units moves neither distances nor their gradients."""
    slots = layout(PAPER, (300,))
    t, rows = list(inputs(PAPER, slots, 0, torch.float32)), torch.arange(len(slots))
    t[3] = t[3] + 100
    op, oracle = lambda *t: local_attention(*t, slots.mask, 128), local_oracle(slots, 128)
    mine, plain = pull_on(op, t, rows)[1][3], pull_on(lambda *t: oracle(rows, *t), t, rows)[1][3]
    exact = pull_on(lambda *t: oracle(rows, *t), [x.double() for x in t], rows)[1][3]
    error, budget = ((a.double() - exact).norm() / exact.norm() for a in (mine, plain))
    assert error <= 3 * budget, f"{error:.2e} against {budget:.2e}"


def test_large_logits_do_not_overflow():
    slots = layout((8, 4), (15,))
    q, k, v = (1e4 * torch.randn(16, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out = selected_attention(q, k, v, torch.arange(4).expand(2, 16, 4), slots.mask, 4)
    assert torch.isfinite(out).all()
    assert torch.isfinite(local_attention(q, k, v, torch.rand(16, 3) * 1e6, torch.full((2,), -1.0), slots.mask, 8)).all()


# ---- the layer

def layer_oracle(layer, x, frame, rows):
    """The gated sum of three dense attentions, (len(rows), c): projections as in the paper, every mask explicit."""
    cfg, slots = layer.config, frame.slots
    H, H_kv, d, b = cfg.num_heads, cfg.num_kv_heads, cfg.width, cfg.compressed_ball_size
    x = layer.norm(x.masked_fill(~slots.mask[:, None], 0))
    heads = lambda t: (t @ layer.qkv.weight.T).view(len(t), -1, d).split((H, H_kv, H_kv), dim=1)
    q, k, v = heads(x)
    windows = ball_windows(slots, b, cfg.stride)
    kc, vc = layer.phi_k(k, windows.table), layer.phi_v(v, windows.table)
    memory = () if layer.memory is None else tuple(layer.memory)
    compressed = compressed_oracle(slots, windows, bool(memory))(rows, q, kc, vc, *memory)
    indices = select_balls(q, kc, windows, layer.rule, memory[0] if memory else None)
    selected = selected_oracle(slots, indices, b, cfg.mode == "reference")(rows, q, k, v)
    real = slots.mask.view(-1, cfg.local_ball_size, 1).to(x)
    p = frame.pos.view(*real.shape[:2], -1)
    relative = (p - (p * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)).flatten(0, 1)
    local = local_oracle(slots, cfg.local_ball_size)(rows, *heads(x + layer.position(relative)), frame.pos, layer.sigma)
    gates = layer.gate(x[rows]).sigmoid().view(len(rows), 3, H, 1)
    return layer.out((gates[:, 0] * compressed + gates[:, 1] * selected + gates[:, 2] * local).flatten(1))


OPTIONS = {"paper": {}, "overlap": dict(compressed_stride=16, score="sum_probabilities"),
           "shared": dict(selection="ball", phi="attention", memory=False, exclude_own=True),
           "mean": dict(phi="mean", selection="ball", score="sum_probabilities", compressed_stride=8),
           "reference": dict(mode="reference", compressed_stride=16, exclude_own=True)}
LAYERS = [((n,) if isinstance(n, int) else n, name) for n in (1, 2, 31, 33, 507, (200, 1, 33)) for name in OPTIONS] + \
    [((3586,), "paper"), ((5000,), "shared")]


@pytest.mark.parametrize("sizes, option", LAYERS, ids=[f"{o}-n{'_'.join(map(str, n))}" for n, o in LAYERS])
def test_layer(sizes, option):
    """Both views; gradients of the features, the positions and every parameter."""
    torch.manual_seed(0)
    large = sum(sizes) > 1000
    cfg = ErwinNSAConfig(c_in=8, c_hidden=12, depth=1, **{**dict(num_heads=2 if large else 4, num_kv_heads=1 if large else 2, head_dim=6,
                         gate_init=(0.3, -0.2, 0.1)), **OPTIONS[option]})
    layer = NSAttention(cfg).double()
    with torch.no_grad():
        for p in layer.parameters(): p.add_(0.3 * torch.randn_like(p))
    batch = PointBatch.from_clouds([torch.randn(n, 3, dtype=torch.float64) for n in sizes])
    tree = BallTree.build(batch, cfg.ball_sizes)
    S, rows = len(tree.slots), some_rows(tree.slots)
    for view in range(2) if not large else [1]:
        x = torch.randn(S, 12, dtype=torch.float64).requires_grad_()
        pos = batch.pos.clone().requires_grad_()
        leaves = {"x": x, "pos": pos, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
        frame = make_frames(tree, pos, cfg.local_ball_size)[view]
        out = layer(x, frame)
        assert (out[~tree.mask] == 0).all()
        part = layer_oracle(layer, x, frame, rows)
        assert_close(out[rows], part, "output")
        if large:
            with torch.no_grad():
                for r in torch.arange(S).split(512): assert_close(out[r], layer_oracle(layer, x, frame, r), f"output from {r[0]}")
        pull = torch.randn_like(part)
        grads = [torch.autograd.grad((o * pull).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True, retain_graph=True)
                 for o in (out[rows], part)]
        for name, a, e in zip(leaves, *grads): assert_close(a, e, f"gradient of {name}, view {view}", 1e-9)


@pytest.mark.parametrize("option", OPTIONS)
def test_layer_ignores_what_masked_slots_hold(option):
    torch.manual_seed(0)
    cfg = ErwinNSAConfig(c_in=8, c_hidden=12, depth=1, num_heads=4, num_kv_heads=2, head_dim=6, **OPTIONS[option])
    layer, batch = NSAttention(cfg), PointBatch.from_clouds([torch.randn(n, 3) for n in (200, 1, 33)])
    tree = BallTree.build(batch, cfg.ball_sizes)
    frame, x = make_frames(tree, batch.pos, 128)[1], torch.randn(len(tree.slots), 12)
    out = layer(x, frame)
    for poison in (float("nan"), float("inf")):
        dirty = x.masked_fill(~tree.mask[:, None], poison).requires_grad_()
        again = layer(dirty, frame)
        assert torch.equal(out, again)
        layer.zero_grad()
        again.sum().backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())
        assert (dirty.grad[~tree.mask] == 0).all() and torch.isfinite(dirty.grad).all()


# ---- what is refused

def test_shapes_that_do_not_fit():
    slots = layout((8, 4), (15,))
    q, k, v, pos, sigma = torch.randn(16, 4, 5), torch.randn(16, 2, 5), torch.randn(16, 2, 5), torch.randn(16, 3), torch.zeros(4)
    mask, windows, picks = slots.mask, ball_windows(slots, 4, 4), torch.zeros(2, 16, 1, dtype=torch.long)
    kc = torch.randn(4, 2, 5)
    for call, message in [
        (lambda: local_attention(q, k[:, :1].expand(-1, 3, -1), v, pos, sigma, mask, 8), "H a multiple of H_kv"),
        (lambda: local_attention(q, k, v, pos, sigma, mask[:8], 8), r"needed: \(16,\) bool"),
        (lambda: local_attention(q, k, v, pos, sigma, mask.long(), 8), "int64.*bool"),
        (lambda: local_attention(q, k, v, pos, sigma, mask, 5), "ball_size is 5 for 16 slots"),
        (lambda: local_attention(q, k, v, pos, sigma[:2], mask, 8), "one a head"),
        (lambda: local_attention(q, k, v, pos[:8], sigma, mask, 8), "pos has 8 rows for 16 slots"),
        (lambda: local_attention(q, k, v, pos, sigma, mask, 8, impl="cuda"), "impl=.cuda. cannot run here"),
        (lambda: compressed_attention(q, kc[:3], kc[:3], windows), "4 windows"),
        (lambda: compressed_attention(q[:8], kc, kc, windows), "for 16 slots"),
        (lambda: compressed_attention(q, kc, kc, windows, impl="nope"), "needed: 'auto' or one of"),
        (lambda: selected_attention(q, k, v, picks[:1], mask, 4), r"needed: \(2, R, k\)"),
        (lambda: selected_attention(q, k, v, picks[:, :5], mask, 4), "R a divisor of 16"),
        (lambda: selected_attention(q, k, v, picks, mask, 5), "ball_size is 5"),
        (lambda: ball_windows(slots, 4, 3), "stride divides size"),
        (lambda: BallCompression(4, 5, "max"), "'mlp', 'attention' or 'mean'"),
        (lambda: SelectionRule(0), "k of 1 or more"),
        (lambda: SelectionRule(3, "best"), "mean_logits"),
    ]:
        with pytest.raises(ValueError, match=message): call()
