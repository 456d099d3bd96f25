"""Compressed attention and selection kernels through Triton's interpreter: small sizes, float32 and float16, against the torch operators.

On a machine with a CUDA device the same kernels are compiled instead.
"""
import pytest
import torch

from erwin_nsa.geometry.balltree import slot_layout
from erwin_nsa.kernels.compressed import compressed_attention_triton, compressed_reference, select_balls_triton
from erwin_nsa.kernels.env import INTERPRET
from erwin_nsa.nn.compressed import SelectionRule, ball_windows, compressed_attention, select_balls

pytestmark = pytest.mark.usefixtures("nan_empty")
DEVICE = "cpu" if INTERPRET else "cuda"
CASES = {"one": ((1, 1, 5), 8, 1, (1,)), "tiny": ((2, 1, 4), 4, 1, (31, 1)), "odd": ((3, 3, 20), 12, 1, (50, 1, 29)),
         "overlap": ((4, 2, 5), 4, 2, (33, 2)), "group": ((6, 1, 48), 16, 1, (70,)), "wide": ((2, 2, 128), 32, 2, (65, 40))}
cases = pytest.mark.parametrize("heads, b, overlap, sizes", CASES.values(), ids=CASES)


def problem(heads, b, overlap, sizes, dtype=torch.float32):
    """q, kc, vc, memory key and value, NaN where no point or window is; windows, runs, host maxima."""
    H, H_kv, d = heads
    windows = ball_windows(slot_layout(sizes, (b,)), b, b // overlap)
    g, S, W = torch.Generator().manual_seed(0), windows.num_slots, len(windows)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE, dtype)
    tensors = [draw(S, H, d), draw(W, H_kv, d), draw(W, H_kv, d), draw(H_kv, d), draw(H_kv, d)]
    runs = torch.tensor(windows.runs, device=DEVICE)
    tensors[0][~windows.slots.mask] = float("nan")
    for t in tensors[1:3]: t[(windows.table < 0).all(1)] = float("nan")
    return tensors, windows, runs, dict(max_occupied=max(r[1] for r in windows.runs), max_windows=max(r[3] for r in windows.runs))


def with_grads(op, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = op(*leaves)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, pull)]


@pytest.mark.parametrize("memory", [False, True], ids=["", "memory"])
@cases
def test_output_and_gradients(heads, b, overlap, sizes, memory):
    tensors, windows, runs, most = problem(heads, b, overlap, sizes)
    tensors = tensors if memory else tensors[:3]
    mine = with_grads(lambda q, kc, vc, *m: compressed_attention_triton(q, kc, vc, runs, m or None, **most), tensors)
    true = with_grads(lambda q, kc, vc, *m: compressed_attention(q, kc, vc, windows, m or None), [t.double() for t in tensors])
    for name, a, e in zip("out dq dkc dvc dmk dmv".split(), mine, true):
        assert a.shape == e.shape and (a - e).abs().max() <= 2e-5 * max(1, e.abs().max()), name                 # NaN fails too
    assert (mine[0][~windows.slots.mask] == 0).all() and (mine[1][~windows.slots.mask] == 0).all()


def test_reference_is_the_torch_operator():
    tensors, windows, runs, _ = problem(*CASES["overlap"])
    expected = compressed_attention(*tensors[:3], windows, tuple(tensors[3:]))
    assert torch.allclose(compressed_reference(*tensors[:3], runs, tuple(tensors[3:])), expected, atol=1e-6)


def test_half_precision():
    tensors, windows, runs, most = problem(*CASES["odd"], dtype=torch.float16)
    mine = with_grads(lambda q, kc, vc, *m: compressed_attention_triton(q, kc, vc, runs, m, **most), tensors)
    true = with_grads(lambda q, kc, vc, *m: compressed_reference(q, kc, vc, runs, m), [t.double() for t in tensors])
    for a, e in zip(mine, true):
        assert a.dtype == torch.float16 and (a - e).norm() <= 3e-3 * e.norm()


def test_cloud_ignores_its_batch_mates():
    """Output and dq of a cloud alone and in a batch, equal in every bit."""
    heads, b, overlap, sizes = CASES["odd"]
    tensors, windows, runs, most = problem(heads, b, overlap, sizes)
    together = with_grads(lambda q, kc, vc: compressed_attention_triton(q, kc, vc, runs, **most), tensors[:3])
    slot, n, first, count = windows.runs[0]
    q, kc, vc = tensors[0][:60], tensors[1][:5], tensors[2][:5]
    leaf = q.detach().clone().requires_grad_()
    out = compressed_attention_triton(leaf, kc, vc, runs[:1], max_occupied=n, max_windows=count)
    pull = torch.randn(together[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)[:60]
    assert torch.equal(out, together[0][:60]) and torch.equal(torch.autograd.grad(out, leaf, pull)[0], together[1][:60])


@pytest.mark.parametrize("exclude_own", [False, True], ids=["", "others"])
@pytest.mark.parametrize("per", ["point", "ball"])
@pytest.mark.parametrize("rule", ["mean_logits", "sum_probabilities"])
@pytest.mark.parametrize("heads, b, overlap, sizes, k", [((4, 2, 5), 4, 2, (33, 2), 3), ((3, 1, 20), 3, 1, (40, 1), 17)], ids=["overlap", "odd"])
def test_selection_is_that_of_torch(heads, b, overlap, sizes, k, rule, per, exclude_own):
    """Random scores have no ties: the same balls in the same order."""
    tensors, windows, runs, most = problem(heads, b, overlap, sizes)
    q, kc, key = tensors[0], tensors[1], tensors[3]
    how = SelectionRule(k, rule, per, exclude_own)
    expected = select_balls(q.double(), kc.double(), windows, how, key.double())
    chosen = select_balls_triton(q, kc, runs, k, b, overlap, rule, per, exclude_own, key, **most)
    assert chosen.dtype == torch.int64 and torch.equal(chosen, expected.to(DEVICE))


def test_given_lse_gives_the_same_selection():
    (q, kc, vc, mk, mv), windows, runs, most = problem(*CASES["overlap"])
    _, lse = compressed_attention_triton(q, kc, vc, runs, (mk, mv), **most, return_lse=True)
    args = (q, kc, runs, 3, 4, 2, "sum_probabilities", "point", False, mk)
    assert torch.equal(select_balls_triton(*args, lse, **most), select_balls_triton(*args, **most))


def test_equal_scores_go_to_the_lower_index():
    """Small whole numbers have exact scores and many ties: a stable sort says what must come out."""
    _, windows, runs, most = problem((2, 1, 4), 2, 1, (300,))
    g = torch.Generator().manual_seed(3)
    q, kc = torch.randint(-1, 2, (300, 2, 4), generator=g).float(), torch.randint(-1, 2, (150, 1, 4), generator=g).float()
    expected = torch.einsum("shd,wd->sw", q, kc[:, 0]).sort(dim=1, descending=True, stable=True).indices[:, :20]
    assert torch.equal(select_balls_triton(q.to(DEVICE), kc.to(DEVICE), runs, 20, 2, **most)[0].cpu(), expected)


def test_compiles_whole():
    (q, kc, vc, mk, mv), _, runs, most = problem(*CASES["tiny"])
    f = lambda q, kc: (compressed_attention_triton(q, kc, vc, runs, (mk, mv), **most), select_balls_triton(q, kc, runs, 2, 4, **most))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager" if INTERPRET else "inductor")
    q = q.requires_grad_()
    (a, chosen), (b, expected) = compiled(q, kc), f(q, kc)
    assert torch.equal(a, b) and torch.equal(chosen, expected)
    pull = torch.ones_like(a)
    assert torch.equal(torch.autograd.grad(a, q, pull)[0], torch.autograd.grad(b, q, pull)[0])


def test_registration():
    (q, kc, vc, mk, mv), _, runs, most = problem(*CASES["overlap"])
    leaves = [t.nan_to_num().requires_grad_() for t in (q, kc, vc, mk, mv)]
    ops = torch.ops.erwin_nsa
    torch.library.opcheck(ops.compressed_fwd.default, (*leaves, runs, *most.values()))
    torch.library.opcheck(ops.compressed_fwd.default, (*leaves[:3], None, None, runs, *most.values()))
    q, kc = q.nan_to_num(), kc.nan_to_num()
    torch.library.opcheck(ops.compressed_select.default, (q, kc, None, None, runs, 3, 4, 2, False, False, True, most["max_occupied"]))


def test_no_slot_and_no_cloud():
    empty, none = torch.zeros(0, 2, 4, device=DEVICE), torch.zeros(0, 4, dtype=torch.int64, device=DEVICE)
    out = compressed_attention_triton(empty, empty[:, :1], empty[:, :1], none, max_occupied=0, max_windows=0)
    assert out.shape == (0, 2, 4) and select_balls_triton(empty, empty[:, :1], none, 3, 4, max_occupied=0, max_windows=0).shape == (1, 0, 3)


@pytest.mark.parametrize("change, says", [
    (dict(q=torch.zeros(8, 3, 4)), "H a multiple of H_kv"), (dict(kc=torch.zeros(2, 2, 4).half()), "both float32, float16 or bfloat16"),
    (dict(vc=torch.zeros(3, 2, 4)), "needed: the same"), (dict(runs=torch.zeros(1, 4)), "needed: int64 (B, 4)"),
    (dict(q=torch.zeros(8, 2, 4).double()), "both float32, float16 or bfloat16")], ids=["heads", "dtype", "values", "runs", "double"])
def test_what_it_refuses(change, says):
    args = dict(q=torch.zeros(8, 2, 4), kc=torch.zeros(2, 2, 4), vc=torch.zeros(2, 2, 4), runs=torch.tensor([[0, 8, 0, 2]])) | change
    with pytest.raises(ValueError) as raised:
        compressed_attention_triton(**{name: t.to(DEVICE) for name, t in args.items()}, max_occupied=8, max_windows=2)
    assert says in str(raised.value)


@pytest.mark.parametrize("change, says", [(dict(k=0), "k of 1 to 64"), (dict(k=65), "k of 1 to 64"), (dict(per="cloud"), "'point' or 'ball'"),
                                          (dict(ball_size=3), "slots / b * ratio"), (dict(ratio=2), "slots / b * ratio")], ids=str)
def test_what_selection_refuses(change, says):
    (q, kc, *_), _, runs, most = problem((2, 1, 4), 4, 1, (8,))
    with pytest.raises(ValueError) as raised: select_balls_triton(q, kc, runs, **(dict(k=2, ball_size=4) | change), **most)
    assert says in str(raised.value)
