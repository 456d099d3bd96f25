"""Compressed attention and selection kernels on a CUDA device.

Error budget: against the float64 reference, an output or gradient may be off by three times what dense torch in the same format is off by, plus one
rounding unit of that format at the scale of the data. Run: `python -m pytest tests/gpu/test_cuda_compressed.py -n 8`.
"""
import contextlib

import pytest
import torch

from erwin_nsa.geometry.balltree import slot_layout
from erwin_nsa.kernels.compressed import compressed_attention_triton, compressed_reference, select_balls_triton
from erwin_nsa.kernels.env import INTERPRET
from erwin_nsa.nn.compressed import SelectionRule, ball_windows, select_balls

pytestmark = [pytest.mark.skipif(INTERPRET, reason="no CUDA device here: these tests run compiled kernels"),
              pytest.mark.usefixtures("nan_empty")]
FORMATS = {"f32": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
formats = pytest.mark.parametrize("form", FORMATS)
CASES = {                                                            # H, H_kv, d; b, windows per ball; clouds
    "car": ((16, 1, 64), 32, 1, (3586,)), "paper": ((16, 1, 16), 32, 1, (5000, 1, 507)), "ragged": ((4, 2, 20), 32, 1, (507, 33, 1)),
    "narrow": ((1, 1, 5), 8, 1, (31, 1)), "overlap": ((6, 3, 48), 16, 2, (3586, 2)), "wide": ((8, 8, 128), 32, 1, (1000,)),
    "three": ((3, 1, 32), 48, 1, (150, 1, 49)), "small": ((2, 1, 4), 32, 1, (33,)), "one": ((1, 1, 64), 32, 1, (1,)),
    "large": ((8, 2, 8), 32, 2, (5000,))}
cases = pytest.mark.parametrize("heads, b, overlap, sizes", CASES.values(), ids=CASES)


@contextlib.contextmanager
def tf32(on):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try: yield
    finally: torch.backends.cuda.matmul.allow_tf32 = before


def problem(heads, b, overlap, sizes, dtype=torch.float32):
    """q, kc, vc, memory key and value, NaN where no point or window is; windows, runs, host maxima."""
    H, H_kv, d = heads
    windows = ball_windows(slot_layout(sizes, (b,)), b, b // overlap)
    g, S, W = torch.Generator("cuda").manual_seed(0), windows.num_slots, len(windows)
    draw = lambda *shape: torch.randn(*shape, generator=g, device="cuda").to(dtype)
    tensors = [draw(S, H, d), draw(W, H_kv, d), draw(W, H_kv, d), draw(H_kv, d), draw(H_kv, d)]
    tensors[0][~windows.slots.mask.cuda()] = float("nan")
    for t in tensors[1:3]: t[(windows.table < 0).all(1).cuda()] = float("nan")
    most = dict(max_occupied=max(r[1] for r in windows.runs), max_windows=max(r[3] for r in windows.runs))
    return tensors, windows, torch.tensor(windows.runs, device="cuda"), most


def with_grads(op, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = op(*leaves)
    pull = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").bfloat16().to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, pull)], pull.double().norm()


@pytest.mark.parametrize("memory", [False, True], ids=["", "memory"])
@formats
@cases
def test_error_budget(heads, b, overlap, sizes, form, memory):
    dtype = FORMATS[form]
    tensors, windows, runs, most = problem(heads, b, overlap, sizes, dtype)
    tensors = tensors if memory else tensors[:3]
    reference = lambda q, kc, vc, *m: compressed_reference(q, kc, vc, runs, m or None)
    with tf32(form == "tf32"):
        mine, _ = with_grads(lambda q, kc, vc, *m: compressed_attention_triton(q, kc, vc, runs, m or None, **most), tensors)
        again, _ = with_grads(lambda q, kc, vc, *m: compressed_attention_triton(q, kc, vc, runs, m or None, **most), tensors)
        plain, _ = with_grads(reference, tensors)
    true, scale = with_grads(reference, [t.double() for t in tensors])
    unit = 2.0 ** -8 if form == "tf32" else torch.finfo(dtype).eps     # torch multiplies narrow float32 matrices exactly: the peer may be too good
    for name, a, twice, p, e in zip("out dq dkc dvc dmk dmv".split(), mine, again, plain, true):
        error, budget = (a - e).norm().item(), 3 * (p - e).norm().item() + unit * (e.norm() + (scale if name != "out" else 0)).item()
        assert error <= budget, f"{name}: {error:.2e} for a budget of {budget:.2e} at {e.norm().item():.2e}"                # NaN fails too
        assert torch.equal(a, twice), f"{name}: two runs differ"
    blank = ~windows.slots.mask.cuda()
    assert (mine[0][blank] == 0).all() and (mine[1][blank] == 0).all()


@pytest.mark.parametrize("rule, per", [("mean_logits", "point"), ("mean_logits", "ball"), ("sum_probabilities", "point"), ("sum_probabilities", "ball")])
@pytest.mark.parametrize("name, k", [("paper", 16), ("overlap", 64), ("three", 5)])
def test_selection_is_the_best(name, k, rule, per):
    """float32 against the torch operator in float64: equal lists, but for rows where two scores differ by rounding alone."""
    (q, kc, _, key, _), windows, runs, most = problem(*CASES[name])
    b, overlap = CASES[name][1:3]
    for own in (False, True):
        chosen = select_balls_triton(q, kc, runs, k, b, overlap, rule, per, own, key, **most)
        again = select_balls_triton(q, kc, runs, k, b, overlap, rule, per, own, key, **most)
        expected = select_balls(q.double(), kc.double(), windows, SelectionRule(k, rule, per, own), key.double())
        different = (chosen != expected).any(-1)
        assert torch.equal(chosen, again) and ((chosen >= 0) == (expected >= 0)).all()
        assert different.float().mean() < 2e-3, f"{different.sum().item()} of {different.numel()} rows differ"
        rows, wanted = chosen.sort(-1).values, expected.sort(-1).values
        assert (rows != wanted).any(-1).float().mean() < 1e-3
        assert not ((rows[..., 1:] == rows[..., :-1]) & (rows[..., 1:] >= 0)).any()


@pytest.mark.parametrize("form", ["f16", "bf16"])
@pytest.mark.parametrize("per", ["point", "ball"])
def test_selection_in_half_precision(form, per):
    """The scores of the chosen balls, recomputed in float64, are the best ones up to one rounding of the mean query."""
    tensors, windows, runs, most = problem(*CASES["car"], FORMATS[form])
    q, kc = tensors[:2]
    chosen = select_balls_triton(q, kc, runs, 16, 32, 1, "mean_logits", per, **most)[0]
    real = torch.arange(len(q), device="cuda") < 3586
    mean = q.double().mean(1)[real]
    if per == "ball": mean = torch.stack([part.mean(0) for part in mean.split(32)])
    chosen, score = chosen[:len(mean)], mean @ kc.double()[:, 0].T
    score = score[:, :most["max_windows"]]
    best, got = score.topk(16).values, score.gather(1, chosen)
    slack = 2 * torch.finfo(FORMATS[form]).eps * mean.norm(dim=1, keepdim=True) * kc.nan_to_num().double().norm(dim=2).max()
    assert ((got - best).abs() <= slack).all()


@pytest.mark.parametrize("form", FORMATS)
def test_equal_scores_go_to_the_lower_index(form):
    n, b = 4000, 8
    g = torch.Generator("cuda").manual_seed(3)
    draw = lambda *shape: torch.randint(-1, 2, shape, generator=g, device="cuda").to(FORMATS[form])
    q, kc, runs = draw(n, 4, 16), draw(n // b, 1, 16), torch.tensor([[0, n, 0, n // b]], device="cuda")
    q[:] = q[:, :1]                                                   # one query for all heads: whole numbers stay whole
    expected = (q[:, 0].float() @ kc[:, 0].float().T).sort(dim=1, descending=True, stable=True).indices[:, :40]
    with tf32(form == "tf32"):
        assert torch.equal(select_balls_triton(q, kc, runs, 40, b, max_occupied=n, max_windows=n // b)[0], expected)


def test_nothing_of_size_slots_by_windows():
    n = 1 << 16
    q = torch.randn(n, 4, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kc, vc = (torch.randn(n // 32, 1, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    runs, most = torch.tensor([[0, n, 0, n // 32]], device="cuda"), dict(max_occupied=n, max_windows=n // 32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = compressed_attention_triton(q, kc, vc, runs, **most)
    out.sum().backward()
    select_balls_triton(q, kc, runs, 16, 32, **most)
    used = torch.cuda.max_memory_allocated() - before
    assert used < n * (n // 32), f"{used / 2**20:.0f} MiB, and one byte a pair would be {n * (n // 32) / 2**20:.0f} MiB"


def test_no_wait_for_the_device():
    (q, kc, vc, mk, mv), _, runs, most = problem(*CASES["ragged"])
    leaves = [t.requires_grad_() for t in (q, kc, vc, mk, mv)]
    for attempt in range(2):                                          # the first call compiles
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            compressed_attention_triton(*leaves[:3], runs, tuple(leaves[3:]), **most).sum().backward()
            select_balls_triton(q, kc, runs, 4, 32, **most)
        finally: torch.cuda.set_sync_debug_mode("default")


def test_strided_inputs():
    (q, kc, vc, *_), _, runs, most = problem(*CASES["ragged"])
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, kc, vc)]
    assert torch.equal(compressed_attention_triton(*strided, runs, **most), compressed_attention_triton(q, kc, vc, runs, **most))
