"""Message passing by Triton kernels, in the interpreter: small float32 and float16 graphs against the published step in float64, forward and every gradient.

`tests/gpu/test_cuda_mpnn.py` runs the compiled kernels.
"""
import pytest
import torch

from erwin_nsa.kernels.env import INTERPRET          # before anything that imports triton
from erwin_nsa.kernels import mpnn as kernels
from erwin_nsa.kernels.mpnn import mean_messages_triton, tile_sizes
from erwin_nsa.nn import mpnn
from erwin_nsa.nn.mpnn import MPNN, EdgeLists, StepParams, edge_degree, edge_lists, mpnn_step, published_mpnn_step

interpreted = pytest.mark.skipif(not INTERPRET, reason="a CUDA device is here: tests/gpu runs the compiled kernels")
NAMES = ("output", "h", "pos", *StepParams._fields)
# N, c, D, E, kind of graph, edges of a piece
CASES = [(1, 4, 3, 2, "loops", 128), (1, 8, 1, 300, "loops", 128), (31, 20, 2, 200, "random", 128), (31, 4, 3, 150, "hub", 16), (31, 48, 4, 150, "fan", 16), (60, 64, 3, 500, "uneven", 32),
         (507, 20, 3, 4056, "random", 128), (9, 5, 3, 0, "random", 128), (40, 16, 2, 320, "doubled", 8), (7, 100, 3, 60, "hub", 16), (4, 256, 3, 12, "random", 128)]
cases = pytest.mark.parametrize("case", CASES, ids=["n{}c{}D{}E{}-{}-{}".format(*c) for c in CASES])


def graph(n, E, kind, seed=0):
    """Edges in random order; the last point is isolated where there are others."""
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(max(1, n - 1), (2, E), generator=g)
    if kind == "hub": edges[1] = 2                                            # all end in one point
    if kind == "fan": edges[0] = 3                                            # all start in one point
    if kind == "uneven": edges = (edges * torch.rand(2, E, generator=g) ** 3).long()
    if kind == "doubled": edges[:, E // 2:] = edges[:, :E - E // 2]
    if kind == "loops": edges[0] = edges[1]
    return edges[:, torch.randperm(E, generator=g)]


def step_inputs(case, dtype=torch.float32, seed=0):
    """h, pos, eight parameters, edges, gradient of the output."""
    n, c, D, E, kind, _ = case
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape, by=1.0: (by * torch.randn(*shape, generator=g)).to(dtype)
    params = r(c, 2 * c + D, by=c ** -0.5), r(c), 1 + r(c, by=.3), r(c), r(c, 2 * c, by=c ** -0.5), r(c), 1 + r(c, by=.3), r(c)
    return [r(n, c), torch.randn(n, D, generator=g), *params], graph(n, E, kind), r(n, c)


def run(step, inputs, edges, pull, double=False, **options):
    """Output and gradients of h, pos and all parameters."""
    leaves = [(t.double() if double else t.clone()).requires_grad_() for t in inputs]
    out = step(*leaves[:2], edges, StepParams(*leaves[2:]), **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, pull.to(out.dtype), allow_unused=True, materialize_grads=True)]


def assert_close(mine, exact, tol):
    for name, a, e in zip(NAMES, mine, exact):
        error, scale = (a.double() - e).abs().max().item(), max(1.0, e.abs().max().item())
        assert error <= tol * scale, f"{name}: off by {error:.1e} at a size of {scale:.1e}"        # NaN fails too


@interpreted
@cases
def test_output_and_gradients(case, nan_empty, monkeypatch):
    """Against the published step in float64, with NaN in every buffer before it is written."""
    monkeypatch.setattr(mpnn, "PIECE", case[-1])
    inputs, edges, pull = step_inputs(case)
    exact = run(published_mpnn_step, inputs, edges, pull, double=True)
    assert_close(run(mpnn_step, inputs, edges, pull, impl="triton", geometry_grad=True), exact, 3e-6)


@interpreted
@pytest.mark.parametrize("case", [CASES[2], (20, 16, 3, 120, "uneven", 128)], ids=["random", "uneven"])
def test_half_precision(case, nan_empty):
    inputs, edges, pull = step_inputs(case, torch.float16)
    exact = run(published_mpnn_step, inputs, edges, pull, double=True)
    mine = run(mpnn_step, inputs, edges, pull, impl="triton", geometry_grad=True)
    assert mine[0].dtype == mine[1].dtype == torch.float16 and mine[2].dtype == torch.float32
    assert_close(mine, exact, 5e-3)


@interpreted
@pytest.mark.parametrize("settings", [dict(K=1, T=4), dict(K=8, T=64), dict(K=8, T=2)], ids=str)
def test_tiles_change_rounding_only(settings, monkeypatch):
    monkeypatch.setattr(mpnn, "PIECE", 16)
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(("forward", "target", "source"), settings | dict(programs=3)))
    case = (8, 12, 2, 60, "uneven", 16)
    inputs, edges, pull = step_inputs(case)
    exact = run(published_mpnn_step, inputs, edges, pull, double=True)
    assert_close(run(mpnn_step, inputs, edges, pull, impl="triton", geometry_grad=True), exact, 3e-6)


@interpreted
def test_same_bits_twice_and_with_cached_lists(monkeypatch):
    monkeypatch.setattr(mpnn, "PIECE", 32)
    case = (20, 16, 3, 160, "uneven", 32)
    inputs, edges, pull = step_inputs(case)
    a, b, c = (run(mpnn_step, inputs, e, pull, impl="triton", geometry_grad=True) for e in (edges, edges, edge_lists(edges, case[0])))
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(a, b, c))


@interpreted
def test_far_from_the_origin():
    """Coordinates are subtracted first: a shift by 2^10 of positions on a grid of 2^-10 changes no bit."""
    inputs, edges, pull = step_inputs(CASES[2])
    inputs[1] = (inputs[1] * 1024).round() / 1024
    a = run(mpnn_step, inputs, edges, pull, impl="triton", geometry_grad=True)
    inputs[1] = inputs[1] + 1024
    assert all(torch.equal(x, y) for x, y in zip(a, run(mpnn_step, inputs, edges, pull, impl="triton", geometry_grad=True)))


@interpreted
def test_isolated_points_hear_nothing_whatever_they_hold():
    """Infinite features of a point without edges reach nobody, its mean is exactly zero, and its gradient, be it NaN, goes nowhere."""
    n, c = 6, 8
    leaves = [t.requires_grad_() for t in (torch.randn(n, 2 * c), torch.randn(c, 3), torch.randn(c), torch.randn(c), torch.randn(c))]
    pos, pull = torch.randn(n, 3), torch.randn(n, c)
    with torch.no_grad(): leaves[0][5], pos[5], pull[5] = float("inf"), float("nan"), float("nan")
    out = mean_messages_triton(leaves[0], pos, *leaves[1:], *edge_lists(graph(n, 20, "random"), n)[1:])
    assert (out[5] == 0).all() and out.isfinite().all()
    grads = torch.autograd.grad(out, leaves, pull)
    assert all(g.isfinite().all() for g in grads) and (grads[0][5] == 0).all()


@interpreted
def test_positions_stay_without_gradient_unless_asked():
    inputs, edges, pull = step_inputs(CASES[2])
    assert (run(mpnn_step, inputs, edges, pull, impl="triton")[2] == 0).all()
    leaves = [t.requires_grad_() for t in inputs]
    grad, = torch.autograd.grad(mpnn_step(*leaves[:2], edges, StepParams(*leaves[2:]), impl="triton").pow(2).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"): grad.sum().backward()


@interpreted
def test_registration():
    n, c, D = 9, 8, 3
    lists = edge_lists(graph(n, 40, "random"), n)[1:]
    tensors = [torch.randn(*s) for s in ((n, 2 * c), (n, D), (c, D), (c,), (c,), (c,))]
    for exact in (False, True): torch.library.opcheck(kernels.mean_messages_bwd, (torch.randn(n, c), *tensors[:5], *lists, exact))
    torch.library.opcheck(kernels.mean_messages_fwd, (*[t.requires_grad_() for t in tensors], *lists))


@interpreted
@pytest.mark.parametrize("cached", [False, True], ids=["edge_index", "lists"])
def test_compiles_whole(cached):
    """A module of two steps, lists built inside or outside of the graph."""
    torch.manual_seed(0)
    model, h, pos, edges = MPNN(8, steps=2, impl="triton"), torch.randn(20, 8), torch.randn(20, 3), graph(20, 70, "random")
    if cached: edges = edge_lists(edges, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    a, b = compiled(h, pos, edges), model(h, pos, edges)
    assert torch.equal(a, b)
    grads = [torch.autograd.grad(x.square().sum(), list(model.parameters())) for x in (a, b)]
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(*grads))


@interpreted
def test_the_models_take_edge_lists():
    """`ErwinNSA(x, pos, edge_index=EdgeLists)`, with torch and with the kernel."""
    from erwin_nsa.nn.model import ErwinNSA
    torch.manual_seed(0)
    model = ErwinNSA(c_in=3, c_hidden=8, depth=1, num_heads=2, num_kv_heads=1, local_ball_size=16, compressed_ball_size=8, num_selected_balls=2, mp_steps=2)
    x, pos, edges = torch.randn(40, 3), torch.randn(40, 3), graph(40, 200, "random")
    plain = model(x, pos, edge_index=edges)
    assert torch.equal(model(x, pos, edge_index=edge_lists(edges, 40)), plain)
    model.mpnn.impl = "triton"
    assert torch.allclose(model(x, pos, edge_index=edge_lists(edges, 40)), plain, atol=1e-5)


@cases
def test_lists_hold_every_edge_once_in_both_orders(case, monkeypatch):
    n, _, _, E, kind, piece = case
    monkeypatch.setattr(mpnn, "PIECE", piece)
    edges = graph(n, E, kind)
    lists = edge_lists(edges, n)
    assert lists.others.dtype == lists.rows.dtype == lists.pieces.dtype == torch.int32 and lists.pieces.shape[2] % 128 == 0
    assert torch.equal(lists.degree, edge_degree(edges, n)) and lists.edge_index is edges
    for order in (0, 1):
        found, pieces = {}, lists.pieces[order].T.tolist()
        used = [p for p in pieces if p[0] >= 0]
        assert pieces[:len(used)] == used and all(p == [-1] * 4 for p in pieces[len(used):])
        for point, begin, end, degree in lists.rows[order].T.tolist() + used:
            assert 0 <= end - begin <= piece and degree == int((edges[1 - order] == point).sum()) and (degree <= piece) == (end - begin == degree)
            found[point] = found.get(point, []) + lists.others[order, begin:end].tolist()
        for point in range(n): assert found[point] == edges[order, edges[1 - order] == point].tolist(), "in the order they were given"


def test_lists_move_and_are_refused():
    lists = edge_lists(graph(9, 20, "random"), 9)
    assert isinstance(lists.to("cpu"), EdgeLists) and all(torch.equal(a, b) for a, b in zip(lists, lists.to("cpu")))
    assert lists.to("meta").rows.device.type == "meta"
    model, h, pos = MPNN(4, steps=1), torch.randn(8, 4), torch.randn(8, 3)
    with pytest.raises(ValueError, match="edge lists of 9 points for 8 points"): model(h, pos, lists)
    with pytest.raises(ValueError, match="from 0 to 9"): edge_lists(torch.tensor([[0], [9]]), 9)
    with pytest.raises(ValueError, match=r"\(2, E\)"): edge_lists(torch.zeros(3, 4, dtype=torch.long), 9)


@interpreted
def test_what_the_kernel_cannot_do_is_said():
    h, pos, edges = torch.randn(8, 4), torch.randn(8, 3), graph(8, 20, "random")
    for change, message in ((dict(h=h.double(), pos=pos), "float32 at most"), (dict(h=h, pos=pos.double()), "float32 positions")):
        model = MPNN(4, steps=1, impl="triton").to(change["h"].dtype)
        with pytest.raises(ValueError, match=message): model(change["h"], change["pos"], edges)
        model.impl = "auto"
        assert model(change["h"], change["pos"], edges).isfinite().all()
    with pytest.raises(ValueError, match="bfloat16 wrongly"): MPNN(4, steps=1, impl="triton").bfloat16()(h.bfloat16(), pos, edges)
    with pytest.raises(ValueError, match="impl='fast'"): MPNN(4, impl="fast")


GOOD = dict(uv=torch.zeros(9, 8), pos=torch.zeros(9, 3), weight=torch.zeros(4, 3), bias=torch.zeros(4), scale=torch.zeros(4), shift=torch.zeros(4))


@interpreted
@pytest.mark.parametrize("change, message", [(dict(uv=torch.zeros(9, 7)), "uv has shape"), (dict(pos=torch.zeros(8, 3)), "needed: .N, 2c."), (dict(weight=torch.zeros(3, 4)), "c, D"), (dict(bias=torch.zeros(3)), r"\(4,\) each"),
                                             (dict(uv=torch.zeros(9, 8, dtype=torch.float64)), "Cast them"), (dict(rows=torch.zeros(2, 4, 8, dtype=torch.int32)), "edge_lists"),
                                             (dict(others=torch.zeros(2, 20, dtype=torch.int64)), "all int32"), (dict(uv=torch.zeros(9, 8, dtype=torch.bfloat16)), "bfloat16 wrongly")])
def test_what_the_kernel_refuses(change, message):
    lists = edge_lists(graph(9, 20, "random"), 9)._asdict()
    lists.pop("edge_index")
    with pytest.raises(ValueError, match=message): mean_messages_triton(**{**GOOD, **lists, **change})


def test_no_points():
    empty = edge_lists(torch.zeros(2, 0, dtype=torch.long), 0)
    for edges in (empty.edge_index, empty): assert MPNN(4, steps=1)(torch.zeros(0, 4), torch.zeros(0, 3), edges).shape == (0, 4)
    if INTERPRET: assert MPNN(4, steps=1, impl="triton")(torch.zeros(0, 4), torch.zeros(0, 3), empty).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("c", [1, 3, 4, 5, 16, 20, 48, 64, 100, 128, 200, 256])
def test_tiles_fit(c, dtype, monkeypatch):
    """Powers of two, rows of pieces in whole tiles, at most 16 channels a thread."""
    monkeypatch.setattr(kernels, "INTERPRET", False)
    width = max(4, 1 << (c - 1).bit_length())
    for kernel in ("forward", "target", "source"):
        t = tile_sizes(kernel, c, dtype)
        assert all(x & (x - 1) == 0 for x in (t["K"], t["T"], t["num_warps"])) and 128 % t["T"] == 0
        assert t["K"] * t["T"] * width <= 16 * 32 * t["num_warps"]
