"""Message passing by Triton kernels on a CUDA device: within three times the error of plain torch in the same format, against the published step in float64.

Needs torch, numpy and pytest. Run: `python -m pytest tests/gpu/test_cuda_mpnn.py -n 10`.
"""
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available(): pytest.skip("no CUDA device here: tests/test_kernels_mpnn.py runs the interpreter", allow_module_level=True)

from erwin_nsa.kernels import mpnn as kernels
from erwin_nsa.nn import mpnn
from erwin_nsa.nn.mpnn import MPNN, StepParams, edge_lists, mpnn_step, published_mpnn_step
from erwin_nsa.nn.runtime import resolve_impl

CUDA = torch.device("cuda")
FORMATS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = ("output", "h", "pos", *StepParams._fields)
# N, c, D, E, kind of graph
CASES = [(1, 4, 3, 2, "random"), (31, 20, 2, 200, "random"), (31, 4, 4, 1500, "hub"), (31, 48, 1, 1500, "fan"), (507, 64, 3, 8112, "knn"), (9, 16, 3, 0, "random"), (507, 5, 2, 6000, "uneven"),
         (507, 100, 3, 8112, "random"), (300, 128, 3, 2400, "random"), (200, 200, 3, 3000, "uneven"), (200, 256, 2, 3000, "hub"), (3586, 64, 3, 57_376, "knn"), (3586, 32, 3, 57_376, "uneven"),
         (65_536, 64, 3, 1_048_576, "knn"), (65_536, 16, 3, 1_048_576, "uneven"), (20_000, 64, 3, 400_000, "hub")]
cases = lambda *which: pytest.mark.parametrize("case", [CASES[i] for i in which] if which else CASES, ids=["n{}c{}D{}E{}-{}".format(*(CASES[i])) for i in (which or range(len(CASES)))])


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def graph(n, E, kind, seed=0):
    """Edges in random order; the last point is isolated where there are others, except in "knn", where all have the same number of edges."""
    g = torch.Generator("cuda").manual_seed(seed)
    edges = torch.randint(max(1, n - 1), (2, E), generator=g, device=CUDA)
    if kind == "knn": edges[1] = torch.arange(E, device=CUDA) // (E // n)
    if kind == "hub": edges[1, E // 4:] = 2
    if kind == "fan": edges[0] = 3
    if kind == "uneven": edges = (edges * torch.rand(2, E, generator=g, device=CUDA) ** 3).long()
    return edges[:, torch.randperm(E, generator=g, device=CUDA)]


def step_inputs(case, dtype, seed=0):
    """h, pos, eight parameters, edges, gradient of the output."""
    n, c, D, E, kind = case
    g = torch.Generator("cuda").manual_seed(seed)
    r = lambda *shape, by=1.0: (by * torch.randn(*shape, generator=g, device=CUDA)).to(dtype)
    params = r(c, 2 * c + D, by=c ** -0.5), r(c), 1 + r(c, by=.3), r(c), r(c, 2 * c, by=c ** -0.5), r(c), 1 + r(c, by=.3), r(c)
    return [r(n, c), torch.randn(n, D, generator=g, device=CUDA), *params], graph(n, E, kind), r(n, c)


def run(step, inputs, edges, pull, double=False, **options):
    """Output and gradients of h, pos and all parameters."""
    leaves = [(t.double() if double else t.clone()).requires_grad_() for t in inputs]
    out = step(*leaves[:2], edges, StepParams(*leaves[2:]), **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, pull.to(out.dtype), allow_unused=True, materialize_grads=True)]


def rms(t): return t.double().square().mean().sqrt().item()


def assert_within_budget(case, form):
    torch.backends.cuda.matmul.allow_tf32 = form == "tf32"
    inputs, edges, pull = step_inputs(case, FORMATS[form])
    exact = run(published_mpnn_step, inputs, edges, pull, double=True)
    mine, plain = (run(mpnn_step, inputs, edges, pull, impl=impl, geometry_grad=True) for impl in ("triton", "torch"))
    floor = {"fp32": 3e-7, "tf32": 1e-4, "fp16": 1.5e-4, "bf16": 1.2e-3}[form]
    for name, a, p, e in zip(NAMES, mine, plain, exact):
        error, allowed = rms(a.double() - e), 3 * rms(p.double() - e) + floor * max(1, rms(e))
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e} at a size of {rms(e):.2e}"


@pytest.mark.parametrize("form", FORMATS)
@cases()
def test_error_budget(case, form, nan_empty): assert_within_budget(case, form)


@cases(4, 6, 12)
def test_many_pieces(case, nan_empty, monkeypatch):
    """Nearly every point is cut."""
    monkeypatch.setattr(mpnn, "PIECE", 8)
    assert_within_budget(case, "fp32")


@pytest.mark.parametrize("settings", [dict(K=1, T=4, num_warps=4), dict(K=8, T=16, num_warps=4), dict(K=2, T=1, num_warps=1)], ids=str)
def test_tiles_change_rounding_only(settings, monkeypatch):
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(("forward", "target", "source"), settings | dict(programs=1)))
    assert_within_budget(CASES[4], "fp32")


@pytest.mark.parametrize("form", ["fp32", "bf16"])
@cases(4, 6, 11, 15)
def test_same_bits_twice_and_with_cached_lists(case, form, nan_empty):
    inputs, edges, pull = step_inputs(case, FORMATS[form])
    a, b, c = (run(mpnn_step, inputs, e, pull, impl="triton", geometry_grad=True) for e in (edges, edges, edge_lists(edges, case[0])))
    for name, x, y, z in zip(NAMES, a, b, c): assert torch.equal(x, y) and torch.equal(x, z), name


@cases(11, 15)
def test_nothing_waits_for_the_device(case):
    """Lists, forward and backward, without a single synchronisation, after one call to compile."""
    inputs, edges, pull = step_inputs(case, torch.float32)
    run(mpnn_step, inputs, edges, pull, impl="triton", geometry_grad=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: run(mpnn_step, inputs, edges, pull, impl="triton", geometry_grad=True)
    finally: torch.cuda.set_sync_debug_mode("default")


def test_no_edge_tensor_in_memory():
    """Forward and backward of one step stay below a single (E, c) tensor."""
    case = CASES[13]
    inputs, edges, pull = step_inputs(case, torch.float32)
    lists = edge_lists(edges, case[0])
    leaves = [t.requires_grad_() for t in inputs]
    def step(): return torch.autograd.grad(mpnn_step(*leaves[:2], lists, StepParams(*leaves[2:]), impl="triton"), [leaves[0], *leaves[2:]], pull)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - before < 4 * case[3] * case[1]


def test_automatic_choice():
    h, pos = torch.zeros(4, 8, device=CUDA), torch.zeros(4, 3, device=CUDA)
    choose = lambda h, pos: resolve_impl("auto", mpnn._runnable(h, pos))
    assert choose(h, pos) == choose(h.bfloat16(), pos) == "triton"
    assert choose(h.double(), pos) == choose(h, pos.double()) == choose(h.expand(4, 8).repeat(1, 40), pos) == choose(h.cpu(), pos.cpu()) == "torch"


def test_autocast():
    """Under autocast the products and the messages come in bfloat16, the residual stays float32."""
    torch.manual_seed(0)
    model, h, pos, edges = MPNN(64).to(CUDA), torch.randn(507, 64, device=CUDA), torch.randn(507, 3, device=CUDA), graph(507, 8112, "knn")
    exact = model(h, pos, edges)
    with torch.autocast("cuda", torch.bfloat16): mixed = model(h, pos, edges)
    mixed.square().sum().backward()
    assert mixed.dtype == torch.float32 and rms(mixed - exact) < 3e-2 * rms(exact)
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


@cases(4, 6)
def test_registration(case):
    n, c, D, E, kind = case
    lists = edge_lists(graph(n, E, kind), n)[1:]
    tensors = [torch.randn(*s, device=CUDA).to(torch.float32 if i == 1 else torch.float16) for i, s in enumerate(((n, 2 * c), (n, D), (c, D), (c,), (c,), (c,)))]
    for exact in (False, True): torch.library.opcheck(kernels.mean_messages_bwd, (torch.randn(n, c, device=CUDA).half(), *tensors[:5], *lists, exact))
    torch.library.opcheck(kernels.mean_messages_fwd, (*[t.requires_grad_() for t in tensors], *lists))


@pytest.mark.parametrize("cached", [False, True], ids=["edge_index", "lists"])
def test_compiles_as_one_graph(cached):
    torch.manual_seed(0)
    model, h, pos, edges = MPNN(32, steps=2).to(CUDA), torch.randn(507, 32, device=CUDA), torch.randn(507, 3, device=CUDA), graph(507, 8112, "uneven")
    if cached: edges = edge_lists(edges, 507)
    compiled = torch.compile(model, fullgraph=True)
    a, b = compiled(h, pos, edges), model(h, pos, edges)
    assert rms(a - b) <= 1e-6 * rms(b)
    grads = [torch.autograd.grad(x.square().sum(), list(model.parameters())) for x in (a, b)]
    for (name, _), x, y in zip(model.named_parameters(), *grads): assert rms(x - y) <= 1e-5 * rms(y), name


def test_a_captured_graph_replays_with_other_edges():
    """Lists are built inside of the graph: new edges in the same memory give new results."""
    case = CASES[11]
    inputs, edges, pull = step_inputs(case, torch.float32)
    leaves, options = [t.clone().requires_grad_() for t in inputs], dict(impl="triton", geometry_grad=True)
    def step():
        out = mpnn_step(*leaves[:2], edges, StepParams(*leaves[2:]), **options)
        return [out, *torch.autograd.grad(out, leaves, pull)]
    stream, captured = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        with torch.cuda.graph(captured, stream=stream): found = step()
    for seed, kind in ((1, "uneven"), (2, "hub")):
        edges.copy_(graph(case[0], case[3], kind, seed))
        captured.replay()
        torch.cuda.synchronize()
        for name, a, b in zip(NAMES, found, run(mpnn_step, inputs, edges, pull, **options)): assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max())), name


def test_edges_to_nowhere_stop_the_program():
    """The check of `edge_lists` runs on the device; it ends the process that built the lists."""
    program = ("import torch; from erwin_nsa.nn.mpnn import edge_lists\n"
               "edge_lists(torch.tensor([[0, 1], [1, 7]], device='cuda'), 3); torch.cuda.synchronize()")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "assert" in done.stderr.lower()
