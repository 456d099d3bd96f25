"""Local ball attention by Triton kernels, in the interpreter: small float32 and float16 sizes against float64, forward and every gradient.

`tests/gpu/test_cuda_local.py` runs the compiled kernels.
"""
import pytest
import torch

from erwin_nsa.kernels.env import INTERPRET          # before anything that imports triton
from erwin_nsa.kernels import local
from erwin_nsa.geometry.balltree import slot_layout
from erwin_nsa.kernels.local import local_attention_triton, local_reference, plan
from erwin_nsa.nn.local import local_attention

pytestmark = [pytest.mark.skipif(not INTERPRET, reason="a CUDA device is here: tests/gpu runs the compiled kernels"), pytest.mark.filterwarnings("ignore:divide by zero")]

NAMES = "q k v pos sigma".split()
# m, H, H_kv, d, D, sizes
CASES = [(16, 2, 1, 4, 3, (1,)), (16, 4, 2, 8, 3, (31,)), (64, 2, 2, 20, 2, (33, 2, 70)), (12, 3, 1, 5, 3, (40, 1)), (4, 2, 2, 16, 3, (33,)), (7, 1, 1, 3, 1, (20, 6)),
         (96, 2, 1, 48, 3, (100, 3)), (128, 2, 1, 16, 3, (150,)), (130, 2, 1, 16, 3, (150,)), (300, 2, 1, 5, 3, (290,)), (256, 1, 1, 128, 3, (250,))]
IDS = ["m{}H{}kv{}d{}D{}-n{}".format(*c[:5], "_".join(map(str, c[5]))) for c in CASES]


def inputs(case, dtype=torch.float32, seed=0):
    m, H, H_kv, d, D, sizes = case
    mask = slot_layout(sizes, (m,)).mask
    S, g = len(mask), torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    return [draw(S, H, d).to(dtype), draw(S, H_kv, d).to(dtype), draw(S, H_kv, d).to(dtype), draw(S, D), -1 + 0.5 * draw(H)], mask


def run(op, tensors, mask, m, double=False, with_pos=True):
    """Output and gradients of q, k, v, pos, sigma."""
    leaves = [(t.double() if double else t.clone()).requires_grad_(with_pos or i != 3) for i, t in enumerate(tensors)]
    out = op(*leaves, mask, m)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t.requires_grad], pull)]


def assert_close(mine, exact, tol):
    for name, a, e in zip(["output", *NAMES], mine, exact):
        error, scale = (a.double() - e).abs().max().item(), max(1.0, e.abs().max().item())
        assert error <= tol * scale, f"{name}: off by {error:.1e} at a size of {scale:.1e}"        # NaN fails too


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward_and_gradients(case, nan_empty):
    """NaN wherever no point is, and in every buffer before it is written."""
    tensors, mask = inputs(case)
    dirty = [t.masked_fill(~mask.view(-1, *[1] * (t.ndim - 1)), float("nan")) if len(t) == len(mask) else t for t in tensors]
    mine = run(local_attention_triton, dirty, mask, case[0])
    assert_close(mine, run(local_reference, tensors, mask, case[0], double=True), 3e-6)
    for t in mine[:4]: assert (t[~mask] == 0).all()


@pytest.mark.parametrize("case", CASES[1:6], ids=IDS[1:6])
def test_half_precision(case, nan_empty):
    tensors, mask = inputs(case, torch.float16)
    assert_close(run(local_attention_triton, tensors, mask, case[0]), run(local_reference, tensors, mask, case[0], double=True), 5e-3)


def test_the_torch_operator_says_the_same():
    case = CASES[2]
    tensors, mask = inputs(case)
    assert_close(run(local_attention_triton, tensors, mask, case[0]), [t.double() for t in run(local_attention, tensors, mask, case[0])], 3e-6)


def test_heads_split_among_programs(monkeypatch):
    """Few balls and many heads per key head: dK and dV in parts, summed; every grouping gives the same."""
    case = (16, 8, 2, 8, 3, (40,))
    tensors, mask = inputs(case)
    exact = run(local_reference, tensors, mask, 16, double=True)
    for size in (1, 2, 4):
        monkeypatch.setattr(local, "group_size", lambda heads, programs, device: min(size, heads))
        assert_close(run(local_attention_triton, tensors, mask, 16, with_pos=False), [*exact[:4], exact[5]], 3e-6)


def tiles(m, queries, keys, heads=1, fast=False, small=False):
    """A plan of one shape for the two kernels with query rows, and its mirror image for the kernel with key rows."""
    row = local.Tile(queries, keys, heads, 4, None, 1, fast)
    return local.Plan(m, False, small, row, row, local.Tile(keys, queries, heads, 4, None, 1, fast))


@pytest.mark.parametrize("m", [16, 96, 130])
def test_same_bits_twice_and_in_other_tiles(m, monkeypatch):
    """Twice the same bits; and other tiles agree, also where small balls have a kernel of their own."""
    tensors, mask = inputs((m, 2, 1, 16, 3, (m - 5,)))
    a, b = (run(local_attention_triton, tensors, mask, m) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    B = 16 if m < 100 else 64
    monkeypatch.setattr(local, "plan", lambda *_: tiles(m, B, 2 * B))
    assert_close(run(local_attention_triton, tensors, mask, m, with_pos=False), [t.double() for t in (*a[:4], a[5])], 3e-6)


@pytest.mark.parametrize("H, H_kv, most", [(4, 4, 3), (6, 2, 2), (4, 1, 4)])
@pytest.mark.parametrize("n", [64, 60])
def test_heads_that_share_distances(H, H_kv, most, n, monkeypatch, nan_empty):
    """Every number of heads a program, with keys of their own or shared, in full balls and in others."""
    tensors, mask = inputs((32, H, H_kv, 8, 3, (n,)))
    exact = run(local_reference, tensors, mask, 32, double=True)
    monkeypatch.setattr(local, "plan", lambda *_: tiles(32, 16, 16, most))
    assert_close(run(local_attention_triton, tensors, mask, 32, with_pos=False), [*exact[:4], exact[5]], 3e-6)


def test_full_balls_read_no_mask(monkeypatch, nan_empty):
    """The two forms of a loop agree: a batch of full balls, and the same through the form that asks."""
    tensors, mask = inputs((32, 2, 1, 8, 3, (64,)))
    assert mask.all()
    monkeypatch.setattr(local, "plan", lambda *_: tiles(32, 16, 16, 2))
    a = run(local_attention_triton, tensors, mask, 32, with_pos=False)
    even = local._tile
    monkeypatch.setattr(local, "_tile", lambda *args: {**even(*args), "EVEN": False})
    for x, y in zip(a, run(local_attention_triton, tensors, mask, 32, with_pos=False)): torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("small", [False, True])
def test_masked_keys_far_above_the_live_ones(small, monkeypatch):
    """A row whose live logits are all near -300: a masked key, at logit 0, must not overflow into it."""
    tensors, mask = inputs((16, 1, 1, 8, 2, (5,)))
    tensors[0], tensors[1] = torch.full_like(tensors[0], 12.), torch.full_like(tensors[1], -9.) + 0.1 * tensors[1]
    exact = run(local_reference, tensors, mask, 16, double=True)
    monkeypatch.setattr(local, "plan", lambda *_: tiles(16, 16, 16, small=small))
    assert_close(run(local_attention_triton, tensors, mask, 16, with_pos=False), [*exact[:4], exact[5]], 1e-4)


@pytest.mark.parametrize("queries, keys", [(64, 64), (16, 32)], ids=["whole", "tiles"])
def test_distances_by_a_product(queries, keys, monkeypatch, nan_empty):
    """What 16-bit heads use on a GPU: every kernel with distances from embedded positions, far from the origin."""
    tensors, mask = inputs((48, 2, 1, 16, 3, (90, 3)))
    exact = run(local_reference, tensors, mask, 48, double=True)
    tensors[3] = (tensors[3] + 100).masked_fill(~mask[:, None], float("nan"))
    monkeypatch.setattr(local, "plan", lambda *_: tiles(48, queries, keys, 2, fast=True))
    assert_close(run(local_attention_triton, tensors, mask, 48, with_pos=False), [*exact[:4], exact[5]], 1e-4)


@pytest.mark.parametrize("D, m", [(3, 48), (2, 64), (1, 16), (4, 130)])
def test_embedded_positions(D, m):
    """Exactly zero from a point to itself, within 2^-9.5 ball radii elsewhere, 1e-5 on average; NaN in masked slots is not seen."""
    g = torch.Generator().manual_seed(0)
    pos, mask = torch.randn(2 * m, D, generator=g) + 100, torch.rand(2 * m, generator=g) < 0.8
    left, right = local._embedded(pos.masked_fill(~mask[:, None], float("nan")), mask.view(torch.uint8), m)
    assert torch.equal(left, left.bfloat16().float()) and torch.equal(right, right.bfloat16().float())
    for s in (slice(0, m), slice(m, 2 * m)):
        p = pos[s][mask[s]].double()
        got = (left[s][mask[s]] @ right[s][mask[s]].T).clamp(min=0).sqrt()
        error = (got - torch.cdist(p, p)).abs() / (p - p.mean(0)).norm(dim=1).max()
        assert (got.diagonal() == 0).all() and error.max() < 2 ** -9.5 and error.mean() < 2e-5


def test_points_of_a_row_that_coincide():
    """Equal positions: distance zero, no gradient through it, no NaN."""
    tensors, mask = inputs((16, 2, 1, 4, 3, (20,)))
    tensors[3] = torch.zeros_like(tensors[3])
    mine = run(local_attention_triton, tensors, mask, 16)
    assert (mine[4] == 0).all() and all(t.isfinite().all() for t in mine)


def test_far_from_the_origin():
    """Distances come from differences: a shift by 2^10 of positions on a grid of 2^-10 changes no bit."""
    tensors, mask = inputs((32, 2, 1, 8, 3, (50,)))
    tensors[3] = (tensors[3] * 1024).round() / 1024
    a = run(local_attention_triton, tensors, mask, 32)
    tensors[3] = tensors[3] + 1024
    assert all(torch.equal(x, y) for x, y in zip(run(local_attention_triton, tensors, mask, 32), a))


def test_registration():
    tensors, mask = inputs((16, 2, 1, 4, 3, (20,)))
    out, lse = local.local_fwd(*tensors, mask, 16)
    assert lse.shape == (2, len(mask)) and (lse[:, ~mask] == float("inf")).all()
    for with_pos in (False, True): torch.library.opcheck(local.local_bwd, (torch.randn_like(out), *tensors, mask, out, lse, 16, with_pos))
    torch.library.opcheck(local.local_fwd, (*[t.requires_grad_() for t in tensors], mask, 16))
    compiled = torch.compile(lambda *t: local_attention_triton(*t) * 2, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, tensors, mask, 16), [t.double() for t in run(lambda *t: local_attention_triton(*t) * 2, tensors, mask, 16)], 1e-6)


@pytest.mark.parametrize("d", [4, 5, 16, 20, 48, 64, 100, 128])
@pytest.mark.parametrize("m", [4, 7, 16, 33, 64, 96, 128, 200, 256, 300, 512, 1000, 1024])
def test_plans_fit(m, d):
    """Whole balls a tile; tiles in shared memory, logits of a head in registers; a small ball in one tile."""
    wide = max(16, 1 << (d - 1).bit_length())
    for bits, exact in ((16, False), (32, False), (32, True)):
        p = plan(m, d, bits, exact, True)
        assert p.rows % m == 0 and p.pack == (p.rows > m) and (not p.small or p.rows <= p.bwd.keys)
        for t in (p.fwd, p.bwd, p.dq):
            assert t.queries * t.keys <= 128 * t.warps * 8 and not (t.fast and (bits == 32 or p.small))
            own, other = (t.keys, t.queries) if t is p.bwd else (t.queries, t.keys)
            assert 2 * t.heads * (own + other * t.stages) * wide * bits // 8 + (own + other * t.stages) * 64 * t.fast <= 220_000, (p, d, bits)


@pytest.mark.parametrize("change, message", [(dict(ball_size=3), "ball_size is 3 for 32 slots"), (dict(sigma=torch.zeros(3)), "needed: .32, D."), (dict(k=torch.zeros(32, 2, 5)), "H a multiple of H_kv"),
                                             (dict(mask=torch.ones(32)), "bool"), (dict(q=torch.zeros(32, 2, 4, dtype=torch.float64)), "float64 has no kernel"),
                                             (dict(q=torch.zeros(32, 2, 4, dtype=torch.bfloat16)), "bfloat16 wrongly"), (dict(pos=torch.zeros(32, 5)), "at most 4")])
def test_what_it_refuses(change, message):
    good = dict(q=torch.zeros(32, 2, 4), k=torch.zeros(32, 1, 4), v=torch.zeros(32, 1, 4), pos=torch.zeros(32, 3), sigma=torch.zeros(2), mask=torch.ones(32, dtype=torch.bool), ball_size=16)
    with pytest.raises(ValueError, match=message): local_attention_triton(**{**good, **change})
