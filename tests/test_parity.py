"""`layout="erwin"` against the published package: the same balls at every level, in the main and in the rotated tree.

Balls are compared in place: the i-th run of 2, 4, 8, ... slots of a cloud must hold the same points in both trees. Inside a ball
the order is free (`nth_element` leaves what it leaves), and exact copies of a point stand for each other.
"""
import numpy as np
import pytest
import torch

from erwin_nsa.geometry.balltree import BallTree, _views, rotation_matrix
from erwin_nsa.geometry.points import PointBatch

published = pytest.importorskip("balltree", reason='the published tree is absent: pip install "erwin_nsa[parity]" '
                                                   '(balltree-erwin, compiles C++)')
LARGE = [65, 97, 127, 128, 129, 255, 257, 500, 513, 890, 1000, 1025, 2047, 2049, 3586, 4096, 4097, 4999, 5000]


# ---- both trees, in one form

def distinct(n: int, D: int, rng) -> torch.Tensor:
    """(n, D) float32 points, no two with an equal coordinate on any axis."""
    while True:
        pos = rng.normal(size=(n, D)).astype(np.float32)
        if all(len(np.unique(pos[:, a])) == n for a in range(D)):
            return torch.from_numpy(pos)


def ours(batch: PointBatch, m: int, rotate: float = 45.0):
    """Per cloud: (main, copy flags, rotated) point of each occupied slot."""
    tree = BallTree.build(batch, (m,), rotate=rotate, layout="erwin")
    real = torch.zeros(len(tree.slots), dtype=torch.bool)
    real[tree.inverse] = True
    keep, counts = tree.mask, tree.slots.occupied
    views = [tree.points_of(v)[keep].numpy() for v in range(tree.num_views)]
    return split(views[0], counts), split(real[keep].numpy(), counts), split(views[-1], counts)


def theirs(batch: PointBatch, m: int, rotate: float = 45.0):
    main, real, turned = published.build_balltree_with_rotations(batch.pos, batch.batch, [], [m], rotate)
    counts = [2 ** max(1, int(np.ceil(np.log2(n)))) for n in batch.sizes]
    return split(main.numpy(), counts), split(real.numpy(), counts), split(main[turned[0]].numpy(), counts)


def split(values, counts):
    return np.split(values, np.cumsum(counts)[:-1])


def balls(ids: np.ndarray, size: int) -> np.ndarray:
    """(balls, size) sorted ids: a ball as a multiset; a cloud smaller than a ball is one ball."""
    return np.sort(ids.reshape(-1, min(size, len(ids))), axis=1)


def assert_same_trees(batch: PointBatch, m: int) -> int:
    """Every level of the main tree, copies per ball, and the rotated tree from whole clouds down to m. Returns balls compared."""
    label = np.unique(batch.pos.numpy(), axis=0, return_inverse=True)[1].reshape(-1)     # equal points, equal labels
    compared = 0
    for cloud, (a, ra, ta, b, rb, tb) in enumerate(zip(*ours(batch, m), *theirs(batch, m))):
        where = f"cloud {cloud} of {batch.sizes[cloud]} points, D={batch.pos.shape[1]}"
        assert len(a) == len(b), where
        for level in range(1, len(a).bit_length()):
            size = 2 ** level
            assert np.array_equal(balls(label[a], size), balls(label[b], size)), f"{where}: main balls of {size}"
            assert np.array_equal(ra.reshape(-1, size).sum(1), rb.reshape(-1, size).sum(1)), f"{where}: copies in balls of {size}"
            if size >= min(m, len(a)):
                assert np.array_equal(balls(label[ta], size), balls(label[tb], size)), f"{where}: rotated balls of {size}"
            compared += len(a) // size
    return compared


def make(sizes, D, seed, edit=lambda p, rng: p) -> PointBatch:
    rng = np.random.default_rng(seed)
    return PointBatch.from_clouds([edit(distinct(n, D, rng), rng) for n in sizes])


# ---- without ties

@pytest.mark.parametrize("D", [2, 3])
def test_every_small_cloud(D):
    """All sizes from 2 to 64, each alone: rotated balls of 2, 8 and 32 points."""
    for n in range(2, 65):
        assert_same_trees(make([n], D, n), (2, 8, 32)[n % 3])


@pytest.mark.parametrize("D", [2, 3])
@pytest.mark.parametrize("m", [2, 16, 128])
def test_all_small_clouds_in_one_batch(D, m):
    sizes = np.random.default_rng(m).permutation(np.arange(2, 65)).tolist()
    assert_same_trees(make(sizes, D, m + D), m)


@pytest.mark.parametrize("D", [2, 3])
@pytest.mark.parametrize("n", LARGE)
def test_large_cloud_alone(n, D):
    assert_same_trees(make([n], D, n), 128 if n % 2 else 32)


@pytest.mark.parametrize("seed", range(100))
def test_random_sizes(seed):
    """Sizes drawn log-uniformly from 2 to 5000, balls of 2 to 256, 2-D and 3-D in turn."""
    rng = np.random.default_rng(1000 + seed)
    n = int(np.exp(rng.uniform(np.log(2), np.log(5001))))
    assert_same_trees(make([n], 2 + seed % 2, seed), 2 ** int(rng.integers(1, 9)))


@pytest.mark.parametrize("D", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_batches_of_mixed_sizes(seed, D):
    """A tiny cloud beside thousands of points, sizes drawn log-uniformly from 2 to 5000."""
    rng = np.random.default_rng(seed)
    sizes = [2, *np.exp(rng.uniform(np.log(2), np.log(5000), size=6)).astype(int).tolist(), 3586, 3]
    assert_same_trees(make(sizes, D, seed), (256, 128, 64, 8)[seed])


def test_main_tree_without_rotation():
    """`rotate=0` gives no second view, as the package gives none, and the same main tree."""
    batch = make([100, 7], 3, 0)
    tree = BallTree.build(batch, (16,), rotate=0, layout="erwin")
    index, _ = published.build_balltree(batch.pos, batch.batch)
    assert tree.num_views == 1 and published.build_balltree_with_rotations(batch.pos, batch.batch, [], [16], 0)[2] == [None]
    assert np.array_equal(balls(tree.points_of(0)[tree.mask].numpy()[:128], 16), balls(index.numpy()[:128], 16))


# ---- ties

def with_duplicates(pos, rng):
    """A third of the points are exact duplicates of others."""
    n = len(pos)
    source = rng.integers(0, n, size=n)
    return torch.where(torch.from_numpy(rng.random(n) < 1 / 3)[:, None], pos[source], pos)


@pytest.mark.parametrize("D", [2, 3])
@pytest.mark.parametrize("sizes", [(2, 3, 5, 8, 13, 21, 34, 55), (507, 890), (5000,), (3586, 4, 1025)], ids=str)
def test_exact_duplicates(sizes, D):
    assert_same_trees(make(sizes, D, sum(sizes), with_duplicates), 32)


@pytest.mark.parametrize("D", [2, 3])
def test_all_points_equal(D):
    batch = PointBatch.from_clouds([torch.full((n, D), 0.3) for n in (2, 3, 7, 64, 100)])
    assert_same_trees(batch, 8)


def lattice(n, D, rng):
    """n distinct points of a cubic lattice, shuffled: many ties on every axis."""
    side = int(np.ceil(n ** (1 / D)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * D, indexing="ij"), -1).reshape(-1, D)
    return torch.from_numpy(rng.permutation(grid)[:n].astype(np.float32))


def rounded(n, D, rng):
    """Normal points rounded to one decimal, duplicates included."""
    return torch.from_numpy(np.round(rng.normal(size=(n, D)), 1).astype(np.float32))


def collinear(n, D, rng):
    """Points on an axis: the other extents are zero."""
    pos = np.zeros((n, D), np.float32)
    pos[:, D - 1] = rng.integers(0, n, size=n)
    return torch.from_numpy(pos)


def broken_splits(pos: np.ndarray, floor_cut: bool, smallest: int, slack: float = 0.0) -> int:
    """Nodes of a tree that break the rule; `pos` (P, D) in tree order, halved until nodes hold `smallest` items.

    Rule: the cut is on the widest axis, the lowest of several; nothing on its left lies beyond anything on its right."""
    nodes, broken = [(0, len(pos))], 0
    depth = max(0, int(np.ceil(np.log2(len(pos)))) - 1) if floor_cut else int(np.log2(max(len(pos) // smallest, 1)))
    for _ in range(depth):
        below = []
        for a, e in nodes:
            cut = (a + e) // 2
            below += [(a, cut), (cut, e)]
            if e - a < 2:
                continue
            extent = pos[a:e].max(0) - pos[a:e].min(0)
            axes = [int(extent.argmax())] if slack == 0 else np.nonzero(extent >= extent.max() - slack)[0]
            broken += not any(pos[a:cut, x].max() <= pos[cut:e, x].min() + slack for x in axes)
        nodes = below
    return broken


@pytest.mark.parametrize("D", [2, 3])
@pytest.mark.parametrize("kind", [lattice, rounded, collinear])
def test_ties_on_one_axis_keep_the_split_rule(kind, D):
    """Where distinct points tie, either side is right: both trees must keep the rule at every node, and the sizes."""
    rng, m = np.random.default_rng(D), 8
    batch = PointBatch.from_clouds([kind(n, D, rng) for n in (2, 3, 5, 9, 27, 64, 125, 200, 890, 2000)])
    pos = batch.pos.numpy().astype(np.float64)
    turned = pos @ rotation_matrix(45.0, D).astype(np.float32).astype(np.float64)
    for tree in (ours(batch, m), theirs(batch, m)):
        for cloud, (main, real, second) in enumerate(zip(*tree)):
            where = f"{kind.__name__}, cloud of {batch.sizes[cloud]} points"
            assert np.array_equal(np.sort(main[real]), np.arange(len(pos))[batch.batch.numpy() == cloud]), where
            assert broken_splits(pos[main[real]], True, 1) == 0, f"{where}: main tree"
            slack = 1e-5 * max(1.0, np.abs(turned).max())           # float32 rounding of the rotated coordinates
            assert broken_splits(turned[second], False, min(m, len(second)), slack) == 0, f"{where}: rotated tree"
            assert np.array_equal(np.sort(second), np.sort(main)), f"{where}: rotated slots are the main slots"


def test_the_rule_checker_sees_a_broken_split():
    pos = np.stack([np.arange(8.0), np.zeros(8)], 1)
    assert broken_splits(pos, True, 1) == 0
    assert broken_splits(pos[[0, 1, 2, 4, 3, 5, 6, 7]], True, 1) == 1
    assert broken_splits(pos[[0, 2, 1, 3, 4, 5, 6, 7]], False, 2) == 1


# ---- the rotation

@pytest.mark.parametrize("D", [2, 3])
@pytest.mark.parametrize("angle", [45.0, 30.0, 10.0, 90.0])
def test_rotation_matrix_is_the_published_one(angle, D):
    expected = published.generate_rotation_matrix(angle, D, torch.device("cpu"))
    assert torch.allclose(torch.from_numpy(rotation_matrix(angle, D)).float(), expected, atol=6e-8, rtol=0)


@pytest.mark.parametrize("D", [2, 3])
def test_rotated_coordinates_are_the_published_ones(D):
    """Both multiply float32 positions by a float32 matrix; a matrix product with fused multiply-add may differ by an ulp or two.

    On an x86 CPU with torch 2.13 not one of 100,000 coordinates differs, so the cuts of random clouds agree."""
    pos = torch.randn(100_000, D, generator=torch.Generator().manual_seed(D))
    expected = pos @ published.generate_rotation_matrix(45.0, D, torch.device("cpu"))
    assert (_views(pos, 45.0)[1].T - expected).abs().max() <= 2 * torch.finfo(torch.float32).eps * pos.abs().max()
