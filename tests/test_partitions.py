"""Partitions: every one is a permutation of every cloud, keeps its promises on odd sizes and ties, and runs under the models."""
import itertools
import math

import numpy as np
import pytest
import torch

from erwin_nsa.data.chains import load_windows
from erwin_nsa.data.store import join_trees
from erwin_nsa.geometry.balltree import BallTree, balls
from erwin_nsa.geometry.neighbours import knn_graph
from erwin_nsa.geometry.partitions import (PARTITIONS, balanced_kmeans, graph_clusters, grid_cells, hilbert, hilbert_index, morton_index,
                                           partition_quality, partition_tree, segments, shifted_order, tree_from_order)
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.erwin import Erwin, ErwinConfig
from erwin_nsa.nn.model import ErwinNSA

every = pytest.mark.parametrize("name", PARTITIONS)
OF_POSITIONS = ("ball_tree", "hilbert", "morton", "balanced_kmeans")
of_positions = pytest.mark.parametrize("name", OF_POSITIONS)
VIEWS = ("order", "inverse", "perm", "perm_inverse")


def cloud(n: int, D: int = 3, kind: str = "random", seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """(n, D) points of one kind."""
    rng = np.random.default_rng([seed, n, D])
    pos = rng.normal(size=(n, D))
    if kind == "duplicates": pos = pos[rng.integers(0, max(1, n // 3), n)]
    if kind == "equal": pos[:] = pos[0]
    if kind == "line": pos = rng.integers(0, n, (n, 1)) * np.ones(D)
    if kind == "lattice": pos = rng.integers(0, 6, (n, D)).astype(float)
    if kind == "huge": pos *= 1e30
    if kind == "tiny": pos *= 1e-30
    return torch.as_tensor(pos).to(dtype)


def batch_of(sizes, D=3, kind="random", seed=0, dtype=torch.float32):
    return PointBatch.from_clouds([cloud(n, D, kind, seed + i, dtype) for i, n in enumerate(sizes)])


def ball_sets(tree, pos, size, view):
    """Balls as sets of positions (with repeats), so that numbering and twins do not matter."""
    found = [row[row >= 0] for row in tree.points_of(view).view(-1, size)]
    return sorted(sorted(map(tuple, pos[row].tolist())) for row in found if len(row))


def assert_is_a_tree(tree, points):
    N, S = len(points.pos), len(tree.slots)
    assert torch.equal(tree.order[tree.inverse], torch.arange(N)) and int(tree.mask.sum()) == N
    for view in range(tree.num_views):
        ids = tree.points_of(view)
        assert torch.equal(ids[tree.mask].sort().values, torch.arange(N)) and (ids[~tree.mask] == -1).all()
        assert torch.equal(points.batch[ids[tree.mask]], tree.slots.cloud[tree.mask])
        assert torch.equal(tree.perm[view][tree.perm_inverse[view]], torch.arange(S))
    for size in tree.slots.ball_sizes:
        count = tree.mask.view(-1, size).sum(1)
        for c in range(len(points)):
            own = count[tree.slots.cloud.view(-1, size)[:, 0] == c]
            assert ((own > 0) & (own < size)).sum() <= 1, "only one ball of a cloud is half full"


# ---- a partition is a permutation of every cloud

@every
@pytest.mark.parametrize("D", [2, 3])
@pytest.mark.parametrize("sizes", [(1,), (2,), (31,), (507,), (3584,), (90, 1, 40, 129), (1, 1, 700)], ids=str)
def test_any_size(name, sizes, D):
    points = batch_of(sizes, D)
    order = PARTITIONS[name](points, (128, 32))
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(sum(sizes)))
    assert torch.equal(points.batch[order], points.batch)
    assert_is_a_tree(partition_tree(points, name, (128, 32)), points)


@every
@pytest.mark.parametrize("kind", ["duplicates", "equal", "line", "lattice", "huge", "tiny"])
def test_any_positions(name, kind):
    for dtype, D in itertools.product((torch.float32, torch.float64), (2, 3)):
        points = batch_of((65, 3, 200), D, kind, dtype=dtype)
        assert_is_a_tree(partition_tree(points, name, (32, 8)), points)


@every
def test_odd_ball_sizes_and_one_view(name):
    points = batch_of((100, 7, 55))
    for sizes in ((24, 12, 4), (7,), (8, 8), (16, 48)):
        assert_is_a_tree(partition_tree(points, name, sizes), points)
        alone = partition_tree(points, name, sizes, rotate=0)
        assert alone.num_views == 1 and torch.equal(alone.order, partition_tree(points, name, sizes).order)


@every
def test_positions_may_need_a_gradient(name):
    points = batch_of((40, 9))
    with_grad = PointBatch(points.pos.clone().requires_grad_(), points.sizes)
    assert torch.equal(partition_tree(with_grad, name, (8, 4)).perm, partition_tree(points, name, (8, 4)).perm)


# ---- numbering, batch, repetition

@of_positions
@pytest.mark.parametrize("kind", ["random", "lattice", "duplicates"])
def test_numbering_does_not_matter(name, kind):
    pos = cloud(343, 3, kind)
    mixed = pos[torch.randperm(343, generator=torch.Generator().manual_seed(1))]
    a, b = (partition_tree(PointBatch.from_tensors(p), name, (64, 16)) for p in (pos, mixed))
    for size, view in itertools.product((64, 16), range(2)):
        assert ball_sets(a, pos, size, view) == ball_sets(b, mixed, size, view)


@every
@pytest.mark.parametrize("kind", ["random", "lattice"])
def test_a_cloud_does_not_depend_on_its_batch(name, kind):
    """Also where batch mates are far larger and have more levels of cuts; a batch is the trees of its clouds, joined."""
    sizes = (40, 600, 1, 130)
    points = batch_of(sizes, kind=kind)
    parts = [partition_tree(PointBatch.from_tensors(p), name, (64, 16)) for p in points.split(points.pos)]
    whole, joined = partition_tree(points, name, (64, 16)), join_trees(parts)
    for key in VIEWS: assert torch.equal(getattr(whole, key), getattr(joined, key)), key


@every
def test_twice_the_same(name):
    points = batch_of((300, 20))
    a, b = (partition_tree(points, name, (32, 8)) for _ in range(2))
    for key in VIEWS: assert torch.equal(getattr(a, key), getattr(b, key)), key


def test_the_ball_tree_is_the_ball_tree():
    for D in (2, 3):
        points = batch_of((500, 31, 1, 2), D)
        for rotate in (0.0, 45.0, 30.0):
            a, b = BallTree.build(points, (64, 16), rotate), partition_tree(points, "ball_tree", (64, 16), rotate)
            for key in VIEWS: assert torch.equal(getattr(a, key), getattr(b, key)), key
            assert (a.slots, a.layout, a.rotate) == (b.slots, b.layout, b.rotate)


# ---- curves

@pytest.mark.parametrize("bits, D", [(1, 2), (2, 2), (3, 2), (7, 2), (1, 3), (2, 3), (3, 3), (5, 3)])
def test_consecutive_hilbert_cells_are_neighbours(bits, D):
    """Every cell of a full grid once, from the first to the last index, by steps of one along one axis."""
    cells = torch.cartesian_prod(*[torch.arange(2 ** bits)] * D)
    index = hilbert_index(cells, bits)
    assert torch.equal(index.sort().values, torch.arange(2 ** (bits * D)))
    assert (cells[index.argsort()].diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("bits, D", [(6, 2), (4, 3)])
def test_aligned_hilbert_runs_are_cubes(bits, D):
    """2^(jD) consecutive cells, from a multiple of that on, fill a cube of side 2^j: balls of such sizes are compact."""
    cells = torch.cartesian_prod(*[torch.arange(2 ** bits)] * D)
    path = cells[hilbert_index(cells, bits).argsort()]
    for j in range(1, bits):
        run = path.view(-1, 2 ** (j * D), D)
        assert (run.amax(1) - run.amin(1) == 2 ** j - 1).all()


@pytest.mark.parametrize("bits, D", [(31, 2), (21, 3), (4, 3), (1, 2)])
def test_morton_against_bits_dealt_by_hand(bits, D):
    rng = np.random.default_rng(0)
    cells = np.vstack([rng.integers(0, 2 ** bits, (50, D)), np.zeros((1, D), int), np.full((1, D), 2 ** bits - 1)])
    dealt = [int("".join("".join(column) for column in zip(*[f"{int(c):0{bits}b}" for c in row])), 2) for row in cells]
    assert morton_index(torch.from_numpy(cells), bits).tolist() == dealt
    assert max(dealt) == 2 ** (bits * D) - 1


@pytest.mark.parametrize("bits, D", [(31, 2), (21, 3)])
def test_hilbert_keys_are_positive_and_unlike_at_full_width(bits, D):
    """At the bits in use: neighbours along the curve cannot be listed, but distinct cells have distinct keys of 63 bits at most."""
    cells = torch.from_numpy(np.random.default_rng(1).integers(0, 2 ** bits, (20_000, D)))
    cells = torch.cat([cells, cells ^ 1, torch.full((1, D), 2 ** bits - 1), torch.zeros(1, D, dtype=torch.long)]).unique(dim=0)
    index = hilbert_index(cells, bits)
    assert (index >= 0).all() and len(index.unique()) == len(cells)
    assert int(index[(cells == 0).all(1)]) == 0, "the curve starts at the origin"


def test_cells_are_cubes_around_each_cloud():
    points = PointBatch.from_clouds([torch.tensor([[0.0, 0.0, 0.0], [8.0, 4.0, 0.0], [2.0, 1.0, 0.0]]), torch.tensor([[5.0, 5.0, 5.0]] * 2)])
    assert grid_cells(points, 3).tolist() == [[0, 0, 0], [7, 4, 0], [2, 1, 0], [0, 0, 0], [0, 0, 0]]
    far = PointBatch.from_tensors(torch.tensor([[-1.7e308, 0.0], [1.7e308, 0.0], [0.0, 1e308]], dtype=torch.float64))
    assert grid_cells(far, 2).tolist() == [[0, 0], [3, 0], [2, 1]]


def test_hilbert_orders_grid_points_as_cells():
    side = 16
    pos = torch.cartesian_prod(*[torch.arange(side)] * 2)
    mixed = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))
    order = hilbert(PointBatch.from_tensors(pos[mixed].double() + 0.25), (16, 4))
    assert (pos[mixed][order].diff(dim=0).abs().sum(1) == 1).all()


# ---- balanced k-means

def squares(pos, groups):
    return sum(float((pos[g] - pos[g].mean(0)).square().sum()) for g in groups)


@pytest.mark.parametrize("seed", range(6))
def test_two_balls_are_the_best_two(seed):
    """With many starts, a single cut finds the best of all balanced ones."""
    pos = cloud(9, 2, seed=seed, dtype=torch.float64)
    best = min(squares(pos, (list(g), [i for i in range(9) if i not in g])) for g in itertools.combinations(range(9), 8 - 3))
    order = balanced_kmeans(PointBatch.from_tensors(pos), (5,), starts=40, rounds=12)
    assert math.isclose(squares(pos, (order[:5].tolist(), order[5:].tolist())), best, rel_tol=1e-9)


@pytest.mark.parametrize("D", [2, 3])
def test_kmeans_is_tighter_than_the_ball_tree(D):
    points = batch_of((1024, 700), D)
    for size in (64, 16):
        spread = {name: partition_quality(points, partition_tree(points, name, (64, 16)), size)["spread"] for name in OF_POSITIONS}
        assert spread["balanced_kmeans"] < min(spread["ball_tree"], spread["hilbert"], spread["morton"])


def test_kmeans_depends_on_its_seed_alone():
    points = batch_of((600,))
    torch.manual_seed(1)
    first = balanced_kmeans(points, (32,), seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, balanced_kmeans(points, (32,), seed=3)) and not torch.equal(first, balanced_kmeans(points, (32,), seed=4))


# ---- chains and graphs

def renumbered_chain(n, seed=0):
    """Bonds of a linear chain whose beads are numbered at random, and the beads along it."""
    along = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.stack([along[:-1], along[1:]]), along.tolist()


@pytest.mark.parametrize("n", [1, 2, 31, 507])
def test_segments_follow_the_bonds(n):
    bonds, along = renumbered_chain(n)
    points = PointBatch.from_tensors(cloud(n))
    assert segments(points, (8,), bonds).tolist() in (along, along[::-1])
    assert segments(points, (8,), bonds.flip(0)).tolist() in (along, along[::-1]), "bonds have no direction"
    assert segments(points, (8,)).tolist() == list(range(n))


def test_segments_keep_side_groups_and_pieces_together():
    """A comb (each backbone bead carries one side bead) and a second chain in the same cloud."""
    backbone = torch.stack([torch.arange(9), torch.arange(1, 10)])
    teeth = torch.stack([torch.arange(10), torch.arange(10, 20)])
    other = torch.tensor([[22, 21], [21, 20]])
    order = segments(PointBatch.from_tensors(cloud(23)), (4,), torch.cat([backbone, teeth, other], 1))
    place = order.argsort()
    assert ((place[teeth[0]] - place[teeth[1]]).abs() <= 3).all()
    assert sorted(order[-3:].tolist()) == [20, 21, 22] and order[-2] == 21


def test_segments_in_a_batch_are_segments_alone():
    (a, along_a), (b, along_b) = renumbered_chain(40, 1), renumbered_chain(25, 2)
    both = segments(batch_of((40, 25)), (8,), torch.cat([a, b + 40], 1))
    assert both[:40].tolist() in (along_a, along_a[::-1]) and (both[40:] - 40).tolist() in (along_b, along_b[::-1])


def test_graph_clusters_cut_a_chain_into_segments():
    bonds, along = renumbered_chain(100)
    order = graph_clusters(PointBatch.from_tensors(cloud(100)), (16, 4), bonds)
    place = torch.tensor(along).argsort()
    for size in (16, 4):
        for ball in order.split(size):
            where = place[ball].sort().values
            assert int(where[-1] - where[0]) == len(ball) - 1
    assert partition_quality(batch_of((100,)), partition_tree(batch_of((100,)), "graph_clusters", (16, 4), edge_index=bonds), 16, bonds)["bonds_cut"] == pytest.approx(6 / 99)


def test_graph_clusters_take_any_graph():
    """No edges, loops, edges twice, a ring, several pieces; the same answer for edges given in any order."""
    points = PointBatch.from_tensors(cloud(60))
    ring = torch.stack([torch.arange(60), (torch.arange(60) + 1) % 60])
    pieces = ring[:, (torch.arange(60) % 7 > 0)]
    loops = torch.arange(60).repeat(2, 1)
    for edges in (ring, pieces, loops, torch.zeros(2, 0, dtype=torch.long), torch.cat([ring, ring, loops], 1)):
        a = graph_clusters(points, (16, 4), edges)
        assert torch.equal(a.sort().values, torch.arange(60))
        assert torch.equal(a, graph_clusters(points, (16, 4), edges[:, torch.randperm(edges.shape[1])]))
    near = partition_quality(points, partition_tree(points, "graph_clusters", (16, 4), edge_index=ring), 16, ring)
    assert near["bonds_cut"] <= 8 / 60


def test_edges_that_do_not_fit():
    points = batch_of((5, 5))
    for f in (segments, graph_clusters):
        for edges, says in ((torch.tensor([[0], [10]]), "rows 0 to 9"), (torch.tensor([[4], [5]]), "edges between clouds"), (torch.tensor([[0.0], [1.0]]), "integers"),
                            (torch.tensor([0, 1]), "(2, E)"), (torch.tensor([[-1], [1]]), "rows 0 to 9")):
            with pytest.raises(ValueError) as e: f(points, (4,), edges)
            assert says in str(e.value)


def test_segments_of_a_simulated_chain_cut_few_bonds():
    window = load_windows("val")[0]
    points, bonds = PointBatch.from_tensors(torch.from_numpy(window.pos)), torch.from_numpy(window.edge_index)
    cut = {}
    for name in PARTITIONS:
        options = dict(edge_index=bonds) if name in ("segments", "graph_clusters") else {}
        cut[name] = partition_quality(points, partition_tree(points, name, (32, 8), **options), 32, bonds)["bonds_cut"]
    assert max(cut["segments"], cut["graph_clusters"]) < 0.5 * min(cut[name] for name in OF_POSITIONS)


# ---- views

def test_shifted_views_straddle_every_wall():
    """At both ball sizes, neighbours in the order that a wall parts in one view share a ball in the other."""
    for sizes in ((128, 32), (16, 4), (8,), (64, 16, 4)):
        n = 10 * max(sizes)
        order = shifted_order(torch.arange(n), (n,), sizes)
        place = order.argsort()
        for size in sizes:
            parted = [i for i in range(n - 1) if i // size != (i + 1) // size]
            assert parted and all(int(place[i]) // size == int(place[i + 1]) // size for i in parted)
    assert shifted_order(torch.arange(6), (4, 2), (4,)).tolist() == [2, 3, 0, 1, 4, 5]


def test_second_view_can_be_chosen():
    points = batch_of((200,))
    turned, moved = (partition_tree(points, "hilbert", (32, 8), second=s) for s in ("rotated", "shifted"))
    assert torch.equal(turned.order, moved.order) and not torch.equal(turned.perm[1], moved.perm[1])
    assert torch.equal(moved.points_of(1)[moved.mask], shifted_order(hilbert(points, (32, 8)), (200,), (32, 8)))
    for name in PARTITIONS:
        tree = partition_tree(points, name, (32, 8))
        met = partition_quality(points, tree, 32)
        assert met["neighbours_met"] > met["neighbours_inside"] or name == "segments"     # random numbering: a segment of points is any points


# ---- orders that do not fit

@pytest.mark.parametrize("order, says", [
    ([0, 1, 2, 3, 4, 5, 5], "there twice"), ([0, 1, 2, 4, 3, 5, 6], "belongs to another cloud"), ([0, 1, 2, 3, 4, 5, 7], "7 at place 6"),
    ([-1, 1, 2, 3, 4, 5, 6], "-1 at place 0"), ([0, 1, 2, 3, 4, 5], "(7,) integers"), ([0.0] * 7, "(7,) integers"), ([True] * 7, "(7,) integers"),
], ids=["twice", "another cloud", "too large", "negative", "short", "floats", "mask"])
def test_orders_that_do_not_fit(order, says):
    points = batch_of((4, 3))
    for call in (lambda: tree_from_order(points, torch.tensor(order), (2,), 0), lambda: partition_tree(points, lambda p, sizes: torch.tensor(order), (2,)),
                 lambda: tree_from_order(points, [torch.arange(7), torch.tensor(order)], (2,), 45)):
        with pytest.raises(ValueError) as e: call()
        assert says in str(e.value) and "do:" in str(e.value)


def test_other_mistakes_are_named():
    points, order = batch_of((4, 3)), torch.arange(7)
    for call, says in ((lambda: tree_from_order(points, order, (2,)), "two orders, or one with rotate=0"), (lambda: tree_from_order(points, [order] * 2, (2,), 0), "two orders"),
                       (lambda: tree_from_order(points, [order] * 3, (2,)), "one or two of (7,)"), (lambda: tree_from_order(points, [], (2,)), "nothing"),
                       (lambda: tree_from_order(points, order, (6, 4), 0), "do not nest"), (lambda: partition_tree(points, "peano"), "one of ball_tree, hilbert"),
                       (lambda: partition_tree(points, "hilbert", second="both"), "'rotated' or 'shifted'")):
        with pytest.raises(ValueError) as e: call()
        assert says in str(e.value)
    assert tree_from_order(points, np.arange(7)[::1], (2,), 0).points_of().tolist()[:4] == [0, 1, 2, 3]
    assert torch.equal(tree_from_order(points, order.int(), (2,), 0).order, tree_from_order(points, order, (2,), 0).order)


# ---- quality

def test_quality_by_hand():
    points = PointBatch.from_tensors(torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 0.0], [16.0, 0.0], [40.0, 0.0]]))
    edges = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 4]])                      # the loop does not count
    found = partition_quality(points, tree_from_order(points, [torch.arange(5), torch.tensor([1, 2, 3, 4, 0])], (2,)), 2, edges, k=1)
    nearest = dict(zip(*knn_graph(points.pos, 1).flip(0).tolist()))
    assert nearest == {0: 1, 1: 0, 2: 3, 3: 2, 4: 3}
    assert found == pytest.approx(dict(radius=(1 + 3 + 0) / 3, spread=math.sqrt((1 + 1 + 9 + 9) / 5), neighbours_inside=4 / 5, neighbours_met=1.0, bonds_cut=2 / 4))


def test_quality_of_nothing_is_nan():
    points = batch_of((1, 1))
    found = partition_quality(points, partition_tree(points, "hilbert", (4,)), 4, torch.zeros(2, 0, dtype=torch.long))
    assert found["radius"] == found["spread"] == 0 and all(math.isnan(found[k]) for k in ("neighbours_inside", "neighbours_met", "bonds_cut"))


@pytest.mark.parametrize("view", [0, 1])
def test_quality_agrees_with_balls(view):
    points = batch_of((300, 50))
    tree = partition_tree(points, "morton", (32, 8))
    found, level = partition_quality(points, tree, 8, view=view), balls(tree, points.pos, size=8, view=view)
    assert found["radius"] == pytest.approx(float(level.radius[level.count > 0].mean()), rel=1e-6)
    ids = tree.points_of(view).view(-1, 8)
    away = [(points.pos[r[r >= 0]] - points.pos[r[r >= 0]].mean(0)).square().sum(1) for r in ids if (r >= 0).any()]
    assert found["spread"] == pytest.approx(float(torch.cat(away).mean().sqrt()), rel=1e-5)


# ---- under the models

TINY = dict(c_in=3, c_hidden=8, depth=2, num_heads=2, head_dim=4, local_ball_size=16, compressed_ball_size=4, num_selected_balls=2, mp_steps=1)


def tiny(**options):
    torch.manual_seed(0)
    return ErwinNSA(ErwinNSAConfig(**{**TINY, **options})).double()


@every
@pytest.mark.parametrize("options", [{}, dict(selection="ball", phi="mean"), dict(rotate=0.0), dict(dimensionality=2)], ids=str)
def test_the_model_runs_on_every_partition(name, options):
    model, D = tiny(**options), options.get("dimensionality", 3)
    points, cfg = batch_of((70, 1, 31), D, dtype=torch.float64), model.config
    x, edges = cloud(102, 3, seed=9, dtype=torch.float64), knn_graph(points.pos, 4, points.batch, loop=True)
    tree = partition_tree(points, name, cfg.ball_sizes, cfg.rotate)
    y = model(x, points.pos, points.batch, edges, tree=tree)
    y.square().sum().backward()
    assert y.shape == (102, 8) and y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    default = model(x, points.pos, points.batch, edges)
    if name == "ball_tree": assert torch.equal(y, default)
    else: assert not torch.allclose(y, default)


@of_positions
def test_features_follow_the_points(name):
    model, pos, x = tiny(), cloud(120, dtype=torch.float64), cloud(120, seed=5, dtype=torch.float64)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(4))
    run = lambda x, pos: model(x, pos, None, knn_graph(pos, 4, loop=True), tree=partition_tree(PointBatch.from_tensors(pos), name, model.config.ball_sizes))
    assert torch.allclose(run(x[order], pos[order]), run(x, pos)[order], rtol=0, atol=1e-10)


def test_a_tree_of_other_settings_is_refused():
    model, points = tiny(mp_steps=0), batch_of((40,), dtype=torch.float64)
    x = cloud(40, dtype=torch.float64)
    for tree in (partition_tree(points, "hilbert", (16, 8)), partition_tree(points, "hilbert", (16, 4), 0), partition_tree(batch_of((41,)), "hilbert", (16, 4))):
        with pytest.raises(ValueError, match="tree holds"): model(x, points.pos, tree=tree)


def test_erwin_refuses_one_level():
    """Erwin pools, and its coarser levels need trees of their own: a single tree is named as what it is."""
    model = Erwin(ErwinConfig(c_in=3, c_hidden=8, enc_depths=(2, 2), enc_num_heads=(2, 2), dec_depths=(2,), dec_num_heads=(2,), strides=(2,), ball_sizes=(16, 16), mp_steps=0))
    points = batch_of((60,))
    with pytest.raises(TypeError, match="needed: ErwinTrees, one tree a level"):
        model(points.pos, points.pos, tree=partition_tree(points, "hilbert", model.config.tree_ball_sizes))
