"""Selected attention in Triton against the torch operator: errors in units of the torch operator's own, bits, memory nobody wrote, compilation.

Run: `python -m pytest tests/gpu/test_cuda_selected.py -n 8`.
"""
import math

import pytest
import torch
from formats import cut

from erwin_nsa.geometry.balltree import slot_layout
from erwin_nsa.kernels import selected
from erwin_nsa.kernels.selected import selected_attention_reference, selected_attention_triton
from erwin_nsa.nn.selected import selected_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
#        sizes            b   k   H  H_kv d
CASES = [((1,),           32, 16, 4, 2, 16), ((31,),     32, 16, 4, 4, 4), ((33,),       32, 16, 16, 1, 64), ((507,),      32, 16, 6, 2, 20),
         ((300, 1, 33),   32, 3, 3, 1, 48),  ((3586,),   32, 16, 16, 1, 16), ((5000,),   32, 16, 8, 4, 32),  ((50, 1, 29), 5, 3, 2, 1, 5),
         ((700, 1),       128, 2, 1, 1, 128), ((90, 40), 1, 7, 16, 2, 24), ((260, 3),    48, 5, 16, 16, 64), ((1500,),     16, 40, 4, 1, 64)]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"n{'_'.join(map(str, c[0]))}-b{c[1]}k{c[2]}H{c[3]}kv{c[4]}d{c[5]}")
per_row = pytest.mark.parametrize("per", ["point", "ball"])
FORMATS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=FORMATS)
def dtype(request):
    """The format, with the switch of TF32 set to match."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param == "tf32"
    yield FORMATS[request.param]
    torch.backends.cuda.matmul.allow_tf32 = before


def choose(kind, W, shape, g):
    """Picks (H_kv, R, k)."""
    H_kv, R, k = shape
    if kind == "unique":
        picks = torch.full(shape, -1)
        n = min(k, W)
        picks[..., :n] = torch.rand(H_kv, R, W, generator=g).argsort(-1)[..., :n]
        return picks.masked_fill(torch.rand(shape, generator=g) < 0.2, -1)
    if kind == "near": return (torch.arange(R)[:, None] * W // R + torch.randint(-3, 4, shape, generator=g)).clamp(-1, W - 1)
    if kind == "own": return (torch.arange(R)[:, None] * W // R).expand(shape).masked_fill(torch.arange(k) > 0, -1)
    if kind == "none": return torch.full(shape, -1)
    if kind == "same": return torch.full(shape, W - 1).masked_fill(torch.arange(k) > 0, -1)
    return torch.randint(-1, W, shape, generator=g)                          # "repeats"


def make(case, per, kind="unique", seed=0):
    sizes, b, k, H, H_kv, d = case
    mask = slot_layout(tuple(sizes), (b,)).mask
    S, g = len(mask), torch.Generator().manual_seed(seed)
    draw = lambda h: torch.randn(S, h, d, generator=g)
    picks = choose(kind, S // b, (H_kv, S if per == "point" else S // b, k), g)
    return [draw(H), draw(H_kv), draw(H_kv)], draw(H).to(CUDA), (picks.to(CUDA), mask.to(CUDA), b)


def run(op, tensors, pull, rest, dtype):
    """Output and gradients in float64."""
    leaves = [t.to(CUDA, dtype).requires_grad_() for t in tensors]
    out = op(*leaves, *rest)
    return [t.detach().double() for t in (out, *torch.autograd.grad(out, leaves, pull.to(dtype)))]


def assert_within_budget(case, per, kind, dtype):
    """Root mean square error at most 3 times that of the torch operator, for the output and every gradient. In TF32: of the operator in float64 on inputs of that format, since torch uses TF32 as it sees fit.
    Gradients can cancel to nothing, as where a row sees one key; rounding then shows at the size of what cancels."""
    tensors, pull, rest = make(case, per, kind)
    tensors, pull = [t.to(dtype).float() for t in tensors], pull.to(dtype).float()
    exact = run(selected_attention, tensors, pull, rest, torch.float64)
    tf32, mine = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32, run(selected_attention_triton, tensors, pull, rest, dtype)
    plain = run(selected_attention, *(([cut(t) for t in tensors], cut(pull)) if tf32 else (tensors, pull)), rest, torch.float64 if tf32 else dtype)
    rms = lambda t: t.double().square().mean().sqrt().item()
    eps = 2 ** -10 if tf32 else torch.finfo(dtype).eps        # TF32 has the 10 bits of float16
    product = lambda *others: rms(pull * rest[1][:, None, None]) * math.prod(map(rms, others))
    sizes = 0.1, product(tensors[1], tensors[2]), product(tensors[0], tensors[2]), 0.1
    for name, a, p, e, size in zip(("output", "dq", "dk", "dv"), mine, plain, exact, sizes):
        allowed = 3 * rms(p - e) + eps / 4 * max(rms(e), size, 0.1)
        assert rms(a - e) <= allowed, f"{name}: {rms(a - e):.2e}, allowed {allowed:.2e}, torch {rms(p - e):.2e}, scale {rms(e):.2e}"


@cases
@per_row
def test_error_budget(case, per, dtype): assert_within_budget(case, per, "unique", dtype)


@pytest.mark.parametrize("kind", ["repeats", "none", "same", "own", "near"])
@per_row
def test_odd_selections(kind, per, dtype): assert_within_budget(CASES[5], per, kind, dtype)


@per_row
def test_against_dense_float64(per):
    tensors, pull, rest = make(CASES[4], per, "repeats")
    exact = run(selected_attention_reference, tensors, pull, rest, torch.float64)
    for name, a, e in zip(("output", "dq", "dk", "dv"), run(selected_attention_triton, tensors, pull, rest, torch.float32), exact):
        assert (a - e).abs().max() <= 2e-5 * e.abs().max(), name


@per_row
@pytest.mark.parametrize("case", [CASES[4], CASES[7], CASES[5]], ids=["ragged", "odd", "paper"])
def test_nobody_reads_what_nobody_wrote(case, per, nan_empty, monkeypatch):
    """Masked slots and fresh memory hold NaN, masked rows get a NaN gradient; same bits twice in a row."""
    tensors, pull, rest = make(case, per)
    mask = rest[1].cpu()[:, None, None]
    dirty, clean = ([t.masked_fill(~mask, x) for t in tensors] for x in (float("nan"), 0.0))
    pulls = [pull.masked_fill(~mask.to(CUDA), x) for x in (float("nan"), 0.0)]
    for dtype in (torch.float32, torch.bfloat16):
        a, b = run(selected_attention_triton, dirty, pulls[0], rest, dtype), run(selected_attention_triton, clean, pulls[1], rest, dtype)
        for name, x, y in zip(("output", "dq", "dk", "dv"), a, b):
            assert x.isfinite().all() and torch.equal(x, y), name


@per_row
def test_pieces_of_a_long_list_add_up_the_same_way(per):
    """Everybody picks one ball: the list is cut into many pieces."""
    tensors, pull, rest = make(((20_000,), 32, 4, 4, 1, 32), per, "same")
    first, second = (run(selected_attention_triton, tensors, pull, rest, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@per_row
def test_tiles_change_rounding_only(per, monkeypatch):
    tensors, pull, rest = make(CASES[5], per)
    exact = run(selected_attention, tensors, pull, rest, torch.float64)
    for P, tiles in ((1, dict(BM=16, BN=32)), (2, dict(BM=32, BN=32, num_warps=4)), (8, dict(BM=128, BN=64, num_warps=8)), (4, dict(BM=64, BN=128))):
        if per == "ball": P = 1
        pair = dict(BM=128, BN=64) if P == 2 else dict(BM=32, BN=128, num_warps=8)
        monkeypatch.setattr(selected, "TILES", dict(walk=dict(P=P), forward=tiles, query=tiles, pair=pair, key_value=dict(BM=64, FLIP=False, num_warps=2)))
        for name, a, e in zip(("output", "dq", "dk", "dv"), run(selected_attention_triton, tensors, pull, rest, torch.float16), exact):
            assert (a - e).abs().max() <= 6e-3 * e.abs().max(), (name, tiles)


@per_row
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_operator_is_well_behaved(per, index):
    tensors, pull, (picks, mask, b) = make(CASES[4], per)
    args = (*(t.to(CUDA).requires_grad_() for t in tensors), picks.to(index), mask, b)
    torch.library.opcheck(torch.ops.erwin_nsa.selected_fwd.default, args)


@per_row
def test_compiles_whole(per):
    tensors, pull, rest = make(CASES[4], per)
    op = torch.compile(lambda *t: selected_attention_triton(*t, *rest), fullgraph=True)
    a, e = run(lambda *t: op(*t[:3]), tensors, pull, rest, torch.float32), run(selected_attention_triton, tensors, pull, rest, torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(a, e))


@per_row
def test_never_waits_for_the_device(per):
    tensors, pull, rest = make(CASES[5], per)
    leaves = [t.to(CUDA).requires_grad_() for t in tensors]
    for mode in ("default", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try: torch.autograd.grad(selected_attention_triton(*leaves, *rest), leaves, pull)
        finally: torch.cuda.set_sync_debug_mode("default")
