"""The ball tree in Triton, run by the interpreter on the CPU: the same tree as the torch code, item by item, on sizes that take every path."""
import numpy as np
import pytest
import torch

from erwin_nsa.geometry import balltree as readable
from erwin_nsa.geometry.balltree import BallTree, erwin_plan, full_plan, order_keys
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.kernels import balltree as kernels
from erwin_nsa.kernels.balltree import grow, grow_reference, schedule
from erwin_nsa.kernels.env import INTERPRET

pytestmark = [pytest.mark.skipif(not INTERPRET, reason="the interpreter is off: tests/gpu has the tests of compiled kernels"),
              pytest.mark.usefixtures("nan_empty")]
SIZES = [(1,), (2,), (31,), (33,), (130,), (507,), (507, 1, 300)]
KINDS = ["random", "lattice", "equal", "line"]
BALLS = {"full": [(128, 32), (12, 4), (16,)], "erwin": [(128, 32), (16,)]}
CPU = torch.device("cpu")


def cloud(kind, n, D=3, dtype=torch.float32, seed=0):
    """(n, D) points of one kind."""
    g = torch.Generator().manual_seed(seed + n)
    if kind == "random": pos = torch.randn(n, D, generator=g, dtype=torch.float64)
    elif kind == "lattice": pos = torch.randint(-2, 3, (n, D), generator=g).double()
    elif kind == "equal": pos = torch.full((n, D), 0.3, dtype=torch.float64)
    else: pos = torch.randint(0, 2 * n, (n, 1), generator=g) * torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)[:, :D]
    return pos.to(dtype)


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch):
    """The interpreter takes as long for a small tile as for a large one."""
    monkeypatch.setattr(kernels, "TILES", kernels.TILES | dict(rank=dict(BI=128, BJ=512)))


def small_tiles(monkeypatch, pairs=0):
    """Tiles so small that a hundred points have large nodes; places by sorting."""
    monkeypatch.setattr(kernels, "TILES", kernels.TILES | dict(rank=dict(BI=64, BJ=64), level=dict(BLOCK=32, num_warps=1), finish=dict(BLOCK=64, A_WARP=64)))
    monkeypatch.setattr(kernels, "COUNT_PAIRS", pairs)


def assert_same_tree(pos, sizes, ball_sizes, rotate=45.0, layout="full"):
    torch_tree, mine = (BallTree.build(PointBatch(pos, sizes), ball_sizes, rotate, layout, impl) for impl in ("torch", "triton"))
    for name in ("order", "inverse", "perm", "perm_inverse"):
        a, e = getattr(mine, name), getattr(torch_tree, name)
        assert a.dtype == e.dtype and torch.equal(a, e), f"{name} differs in {(a != e).sum()} of {e.numel()} places"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_torch_tree(sizes, kind):
    """Both layouts, with and without the rotated view; ball sizes and dimension take turns."""
    for i, (layout, rotate) in enumerate([("full", 45.0), ("erwin", 45.0), ("full", 0.0), ("erwin", 0.0)][:4 if sum(sizes) < 200 else 2]):
        turn = SIZES.index(sizes) + KINDS.index(kind) + i
        balls = BALLS[layout][turn % len(BALLS[layout])]
        assert_same_tree(torch.cat([cloud(kind, n, 2 + turn // 2 % 2) for n in sizes]), sizes, balls, rotate, layout)


@pytest.mark.parametrize("pairs", [0, 1 << 28], ids=["sorted", "counted"])
@pytest.mark.parametrize("kind", ["random", "lattice"])
def test_large_nodes_beside_small_ones(kind, pairs, monkeypatch):
    small_tiles(monkeypatch, pairs)
    for sizes, balls, layout in (((150, 1, 65), (16, 4), "full"), ((90, 20), (16,), "erwin")):
        assert_same_tree(torch.cat([cloud(kind, n) for n in sizes]), sizes, balls, layout=layout)


def test_balls_larger_than_a_block(monkeypatch):
    """Nothing below the last cut is small: the final balls are copied in pieces; one cloud is never cut."""
    small_tiles(monkeypatch)
    for sizes in ((150,), (300, 100)): assert_same_tree(torch.cat([cloud("random", n) for n in sizes]), sizes, (128,))


@pytest.mark.parametrize("pairs", [0, 1 << 28], ids=["sorted", "counted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_at_the_edge(dtype, pairs, monkeypatch):
    """Infinite and NaN rotated coordinates, two zeros, subnormal numbers, numbers far from the origin."""
    monkeypatch.setattr(kernels, "COUNT_PAIRS", pairs)
    g, top, step = torch.Generator().manual_seed(0), torch.finfo(dtype).max, 1024 * torch.finfo(dtype).eps
    signs, near = torch.randint(-1, 2, (80, 3), generator=g).to(dtype), 1024 + step * torch.randint(0, 3, (80, 3), generator=g).to(dtype)
    flat = near.index_fill(1, torch.tensor([1]), torch.inf)                # no extent along y: infinity minus infinity
    for pos in (signs * top, signs * 0.0, signs * torch.finfo(dtype).smallest_normal / 8, near, flat):
        assert_same_tree(pos, (60, 20), (8, 2))


def test_keys_of_both_views():
    """The rotation is rounded product by product, as in the torch code: every bit of every key."""
    for dtype in (torch.float32, torch.float64):
        for D in (2, 3):
            pos = cloud("random", 400, D, dtype)
            for angle in (45.0, 30.0): assert torch.equal(kernels._keys(pos, (0.0, angle)), order_keys(readable._views(pos, angle)))
            assert torch.equal(kernels._keys(pos.flip(1), (45.0,)), order_keys(readable._views(pos.flip(1), 45.0)[1:]))


@pytest.mark.parametrize("kind", KINDS)
def test_against_sorting_every_node(kind):
    """A judge that shares no code: plain Python, which sorts each node with the tie rule written out."""
    pos = cloud(kind, 77)
    for plan, angles in ((full_plan((50, 27), (12, 4)), (0.0, 45.0)), (erwin_plan((50, 27)), (0.0,))):
        expected = grow_reference(readable._views(pos, max(angles)), plan) if len(angles) == 2 else grow_reference(readable._views(pos, 0), plan)
        assert torch.equal(grow(pos, angles, (50, 27), plan), expected)
        assert torch.equal(readable._grow(readable._views(pos, max(angles)), (50, 27), plan), expected)


def test_points_in_strided_memory():
    pos = cloud("random", 60).T.contiguous().T
    assert not pos.is_contiguous()
    assert_same_tree(pos, (60,), (16, 4))
    assert_same_tree(cloud("random", 120)[::2], (60,), (16, 4))


@pytest.mark.parametrize("sizes, balls", [((1000, 3, 130, 1), (32, 8)), ((77,), (5,)), ((300, 299), (1,))])
@pytest.mark.parametrize("block, tile", [(64, 16), (32, 64)])
def test_work_lists_cover_every_item_once(sizes, balls, block, tile):
    """Each item belongs to one job; above a job's level it lies in one tile of a large node a level; jobs hold what they claim."""
    plan = full_plan(sizes, balls)
    work = schedule(plan, CPU, block, tile)
    covered, P = np.zeros((len(plan.levels) + 1, sum(sizes)), int), sum(sizes)
    nodes = work.nodes.numpy()
    for begin, end, level, node in work.jobs.tolist():
        assert 0 < end - begin <= work.block <= max(16, block)
        covered[level:, begin:end] += 1
        if level < len(plan.levels): assert (nodes[node, 0], nodes[node, 2]) == (begin, end)
    for level, tiles in enumerate(work.tiles):
        for i, (node, begin, leader) in enumerate([] if tiles is None else tiles.tolist()):
            start, _, end, _ = nodes[node]
            assert end - start > block and (begin - start) % tile == 0 and i - leader == (begin - start) // tile
            covered[level, begin:min(begin + tile, end)] += 1
    assert (covered == 1).all() and P == covered.shape[1]
    at = 0
    for level, (start, cut, end) in enumerate(plan.levels):
        after = [*plan.levels, (plan.final[0], None, plan.final[1])][level + 1]
        for s, c, e in zip(start, cut, end):
            child = nodes[at, 3] - sum(len(x[0]) for x in plan.levels[:level + 1])
            assert tuple(nodes[at, :3]) == (s, c, e) and after[0][child] == s and after[2][child] == c
            assert c == e or (after[0][child + 1], after[2][child + 1]) == (c, e)
            at += 1


def test_tables_are_made_once():
    plan = full_plan((100, 20), (16, 4))
    assert schedule(plan, CPU, 64, 16) is schedule(full_plan((100, 20), (16, 4)), CPU, 64, 16)


def test_what_cannot_run_is_refused():
    points = PointBatch(torch.rand(20, 3), (20,))
    with pytest.raises(ValueError, match="'auto', 'torch' or 'triton'"): BallTree.build(points, (4,), impl="cuda")
    assert kernels.why_not_grow(torch.zeros(2, 3)) is None
    assert "float16" in kernels.why_not_grow(torch.zeros(2, 3).half())
    assert "536870912" in kernels.why_not_grow(torch.zeros(1).expand(1 << 29, 3))


def test_a_refusal_names_the_reason(monkeypatch):
    monkeypatch.setattr(kernels, "why_not_grow", lambda pos: "needs cake")
    points = PointBatch(torch.rand(20, 3), (20,))
    with pytest.raises(ValueError, match="needs cake"): BallTree.build(points, (4,), impl="triton")
    assert torch.equal(BallTree.build(points, (4,)).order, BallTree.build(points, (4,), impl="torch").order)
