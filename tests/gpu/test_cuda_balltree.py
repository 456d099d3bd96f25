"""The ball tree in Triton against the torch code, compiled: every item of every view, ties and all; no waiting, CUDA graphs, memory.

Needs torch, numpy and pytest, nothing else. Run: `python -m pytest tests/gpu/test_cuda_balltree.py -n 10`.
"""
import pytest
import torch

from erwin_nsa.geometry.balltree import BallTree, order_keys, _views
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.kernels import balltree as kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
NAMES = ("order", "inverse", "perm", "perm_inverse")
SIZES = [(1,), (2,), (31,), (33,), (130,), (507,), (3586,), (5000,), (16384,), (507, 1, 300), (3586, 1, 890, 5000, 2), (40,) * 300, (20_000, 3, 4097, 4096)]
KINDS = ["random", "lattice", "equal", "line"]
per_kind = pytest.mark.parametrize("kind", KINDS)


def cloud(kind, sizes, D=3, dtype=torch.float32, seed=0):
    """(N, D) points of one kind, made on the CPU."""
    g, n = torch.Generator().manual_seed(seed), sum(sizes)
    if kind == "random": pos = torch.randn(n, D, generator=g, dtype=torch.float64)
    elif kind == "lattice": pos = torch.randint(-9, 10, (n, D), generator=g).double()
    elif kind == "equal": pos = torch.full((n, D), 0.3, dtype=torch.float64)
    else: pos = torch.randint(0, 2 * n, (n, 1), generator=g) * torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)[:, :D]
    return pos.to(CUDA, dtype)


def build(pos, sizes, impl="triton", ball_sizes=(128, 32), rotate=45.0, layout="full"):
    return BallTree.build(PointBatch(pos, sizes), ball_sizes, rotate, layout, impl)


def assert_same(mine, expected):
    for name in NAMES:
        a, e = getattr(mine, name).cpu(), getattr(expected, name).cpu()
        assert a.dtype == e.dtype and torch.equal(a, e), f"{name} differs in {(a != e).sum()} of {e.numel()} places"


@per_kind
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{len(s)}x{s[0]}")
def test_equals_the_torch_tree_of_the_host(sizes, kind):
    """Layouts, views, ball sizes; dimension and format take turns."""
    for i, (layout, rotate, balls) in enumerate([("full", 45.0, (128, 32)), ("full", 0.0, (12, 4)), ("full", 45.0, (16,)), ("erwin", 45.0, (128, 32)), ("erwin", 0.0, (16,))]):
        turn = SIZES.index(sizes) + KINDS.index(kind) + i
        pos = cloud(kind, sizes, 3 - turn % 3 // 2, (torch.float32, torch.float32, torch.float64, torch.float32)[turn % 4])
        args = dict(ball_sizes=balls, rotate=rotate, layout=layout)
        assert_same(build(pos, sizes, **args), build(pos.cpu(), sizes, "torch", **args))


@per_kind
@pytest.mark.parametrize("sizes", [(3586,) * 16, (65536,), (1 << 20,), (1 << 19, 1, 200_000)], ids=lambda s: f"{len(s)}x{s[0]}")
def test_equals_the_torch_tree_of_the_device(sizes, kind):
    pos = cloud(kind, sizes)
    for layout in ("full", "erwin"): assert_same(build(pos, sizes, layout=layout), build(pos, sizes, "torch", layout=layout))


@per_kind
@pytest.mark.parametrize("pairs", [0, 1 << 28], ids=["sorted", "counted"])
def test_tiles_change_nothing(kind, pairs, monkeypatch):
    """Large nodes from a hundred items on, both ways to the places, every number of warps."""
    monkeypatch.setattr(kernels, "COUNT_PAIRS", pairs)
    sizes = (3586, 1, 890)
    pos = cloud(kind, sizes)
    expected = build(pos, sizes, "torch")
    for block, a_warp, level, rank in ((4096, 512, 1024, (32, 32)), (2048, 256, 512, (128, 32)), (1024, 128, 4096, (64, 64)), (64, 64, 64, (16, 16))):
        monkeypatch.setattr(kernels, "TILES", kernels.TILES | dict(finish=dict(BLOCK=block, A_WARP=a_warp), level=dict(BLOCK=level, num_warps=4),
                                                                   rank=dict(BI=rank[0], BJ=rank[1], num_warps=4)))
        assert_same(build(pos, sizes), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keys_are_those_of_the_host(dtype):
    """No product and sum of the rotation is fused."""
    for D in (2, 3):
        pos = cloud("random", (100_000,), D, dtype)
        for angle in (45.0, 30.0): assert torch.equal(kernels._keys(pos, (0.0, angle)).cpu(), order_keys(_views(pos.cpu(), angle)))


@pytest.mark.parametrize("pairs", [0, 1 << 28], ids=["sorted", "counted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_at_the_edge(dtype, pairs, monkeypatch):
    """Infinite and NaN rotated coordinates, two zeros, subnormal numbers, numbers far from the origin."""
    monkeypatch.setattr(kernels, "COUNT_PAIRS", pairs)
    g, top, step = torch.Generator().manual_seed(0), torch.finfo(dtype).max, 1024 * torch.finfo(dtype).eps
    signs, near = torch.randint(-1, 2, (400, 3), generator=g).to(dtype), 1024 + step * torch.randint(0, 5, (400, 3), generator=g).to(dtype)
    flat = near.index_fill(1, torch.tensor([1]), torch.inf)                # no extent along y: infinity minus infinity
    for pos in (signs * top, signs * 0.0, signs * torch.finfo(dtype).smallest_normal / 8, near, flat):
        assert_same(build(pos.to(CUDA), (300, 100), ball_sizes=(8, 2)), build(pos, (300, 100), "torch", ball_sizes=(8, 2)))


@pytest.mark.parametrize("sizes", [(3586, 1, 890), (70_000,)], ids=["small", "large"])
@pytest.mark.parametrize("layout", ["full", "erwin"])
def test_nobody_reads_what_nobody_wrote(sizes, layout, nan_empty):
    pos = cloud("random", sizes)
    expected = build(pos.cpu(), sizes, "torch", layout=layout)
    for _ in range(2): assert_same(build(pos, sizes, layout=layout), expected)


@pytest.mark.parametrize("sizes", [(3586,), (3586,) * 16, (70_000, 300)], ids=lambda s: f"{len(s)}x{s[0]}")
@pytest.mark.parametrize("layout", ["full", "erwin"])
def test_never_waits_and_fits_into_a_graph(sizes, layout):
    """Caches warm: no call that waits; captured once, replayed with other positions, ties included."""
    first, second, third = cloud("random", sizes), cloud("random", sizes, seed=1), cloud("lattice", sizes)
    pos = first.clone()
    build(pos, sizes, layout=layout)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: build(pos, sizes, layout=layout)
    finally: torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): tree = build(pos, sizes, layout=layout)
    for values in (second, third, first):
        pos.copy_(values)
        graph.replay()
        assert_same(tree, build(values, sizes, "torch", layout=layout))


def test_memory_of_a_million_points():
    pos = cloud("random", (1 << 20,))
    build(pos, (1 << 20,))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tree = build(pos, (1 << 20,))
    assert torch.cuda.max_memory_allocated() - before < 1 << 29 and len(tree.order) == 1 << 20


def test_kernels_are_the_choice_on_a_device(monkeypatch):
    """auto takes them; other formats of work fall back or are refused with the reason."""
    calls = []
    monkeypatch.setattr(kernels, "grow", lambda *a, keep=kernels.grow: calls.append(1) or keep(*a))
    pos = cloud("random", (50,))
    assert_same(build(pos, (50,), "auto"), build(pos, (50,), "torch"))
    assert calls == [1]
    with pytest.raises(ValueError, match="CUDA tensor"): build(pos.cpu(), (50,))
