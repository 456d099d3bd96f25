"""The ball tree as a list of promises, each checked on random batches: odd sizes, ties, lines, single points, extreme numbers."""
import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis", reason='property tests need hypothesis: pip install "erwin_nsa[dev]"')
from hypothesis import given, settings
from hypothesis import strategies as st

from erwin_nsa.geometry.balltree import BallTree, balls, full_plan, rotation_matrix, tree_depth
from erwin_nsa.geometry.points import PointBatch

rules = settings(deadline=None, max_examples=40, derandomize=True)
BALL_SIZES = [(32, 8), (128, 32), (96, 24, 8), (12, 4), (7,), (5, 5), (16,), (1,), (64, 16, 4, 1)]
KINDS = ["normal", "lattice", "line", "equal", "duplicates", "huge", "tiny"]


def cloud(kind: str, n: int, D: int, rng, dtype=torch.float32) -> torch.Tensor:
    """(n, D) points of one kind."""
    pos = rng.normal(size=(n, D))
    if kind == "lattice":
        side = int(np.ceil(n ** (1 / D)))
        pos = rng.permutation(np.stack(np.meshgrid(*[np.arange(side)] * D, indexing="ij"), -1).reshape(-1, D))[:n]
    elif kind == "line":
        pos = rng.integers(0, 2 * n, size=(n, 1)) * np.array([1.0, -2.0, 0.5])[:D]
    elif kind == "equal":
        pos = np.full((n, D), 0.3)
    elif kind == "duplicates":
        pos = pos[rng.integers(0, n, size=n)]
    elif kind in ("huge", "tiny"):
        pos = pos * (1e30 if kind == "huge" else 1e-30)
    return torch.as_tensor(pos).to(dtype)


@st.composite
def cases(draw, layout="full", kinds=KINDS, max_points=90):
    """(PointBatch, ball sizes, seed)."""
    sizes = draw(st.lists(st.integers(1, max_points), min_size=1, max_size=6))
    D, seed = draw(st.sampled_from([2, 3])), draw(st.integers(0, 10**6))
    ball_sizes = draw(st.sampled_from(BALL_SIZES if layout == "full" else [(32, 8), (128,), (4, 2), (16,)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    rng = np.random.default_rng(seed)
    parts = [cloud(draw(st.sampled_from(kinds)), n, D, rng, dtype) for n in sizes]
    return PointBatch.from_clouds(parts), ball_sizes, seed


def labels(pos: torch.Tensor) -> torch.Tensor:
    """(N,) equal points have equal labels."""
    return torch.unique(pos, dim=0, return_inverse=True)[1]


def ball_sets(tree: BallTree, pos: torch.Tensor, size: int, view: int) -> torch.Tensor:
    """(balls, size) sorted labels, -1 where masked, in slot order."""
    ids = tree.points_of(view)
    return torch.where(ids >= 0, labels(pos)[ids.clamp(min=0)], -1).view(-1, size).sort(dim=1).values


# ---- slots

@rules
@given(cases())
def test_every_point_has_one_slot_in_every_view(case):
    """Order, inverse, permutations and mask agree; a cloud stays in its own range of slots."""
    batch, ball_sizes, _ = case
    tree = BallTree.build(batch, ball_sizes)
    N, S = len(batch.pos), len(tree.slots)
    assert tree.num_views == 2 and tree.mask.sum() == N and tree.mask.shape == (S,)
    assert torch.equal(tree.order[tree.inverse], torch.arange(N)) and tree.mask[tree.inverse].all()
    for view in range(2):
        ids = tree.points_of(view)
        assert torch.equal(ids[tree.mask].sort().values, torch.arange(N)) and (ids[~tree.mask] == -1).all()
        assert torch.equal(batch.batch[ids[tree.mask]], tree.slots.cloud[tree.mask])
        assert torch.equal(tree.perm[view][tree.perm_inverse[view]], torch.arange(S))
        assert torch.equal(tree.perm[view].sort().values, torch.arange(S))
    assert torch.equal(tree.perm[0], torch.arange(S))
    values = torch.randn(N, 2)
    assert torch.equal(tree.to_points(tree.to_slots(values)), values) and (tree.to_slots(values)[~tree.mask] == 0).all()


@rules
@given(cases())
def test_all_balls_but_one_a_cloud_are_full(case):
    batch, ball_sizes, _ = case
    tree = BallTree.build(batch, ball_sizes)
    for size in tree.slots.ball_sizes:
        count = tree.mask.view(-1, size).sum(1)
        owner = tree.slots.cloud.view(-1, size)
        assert (owner == owner[:, :1]).all(), "a ball holds one cloud"
        for c, n in enumerate(batch.sizes):
            own = count[owner[:, 0] == c]
            partial = (own > 0) & (own < size)
            assert own.sum() == n and partial.sum() <= 1 and (own > 0).sum() == -(-n // size) == tree.slots.balls_per_cloud(size)[c]
    spare = len(tree.slots) - len(batch.pos)
    assert spare < len(batch) * max(ball_sizes), "less than one largest ball of padding a cloud"


@rules
@given(cases())
def test_coarse_balls_do_not_change_when_finer_ones_are_asked_for(case):
    """Levels nest: the largest balls of (m, b) are those of (m,), in both views."""
    batch, ball_sizes, _ = case
    m = max(ball_sizes)
    fine, coarse = BallTree.build(batch, ball_sizes), BallTree.build(batch, (m,))
    for view in range(2):
        assert torch.equal(ball_sets(fine, batch.pos, m, view), ball_sets(coarse, batch.pos, m, view))


@rules
@given(cases())
def test_every_cut_is_on_the_widest_axis_between_left_and_right(case):
    """The split rule at every node of both views, so balls inside balls are spatial in the rotated view too."""
    batch, ball_sizes, _ = case
    tree = BallTree.build(batch, ball_sizes)
    plan = full_plan(batch.sizes, tree.slots.ball_sizes)
    for view in range(2):
        R = torch.from_numpy(rotation_matrix(45.0, batch.pos.shape[1])).to(batch.pos)
        seen = batch.pos if view == 0 else (batch.pos[:, :, None] * R).sum(1)
        pos = seen[tree.points_of(view)[tree.mask]].double().numpy()
        for level in plan.levels:
            for a, cut, e in level.T:
                if cut == e: continue
                extent = pos[a:e].max(0) - pos[a:e].min(0)
                x = int(extent.argmax())
                assert pos[a:cut, x].max() <= pos[cut:e, x].min(), (view, a, cut, e)


@rules
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=5), st.sampled_from(BALL_SIZES))
def test_plan_cuts_at_multiples_of_the_ball_size(sizes, ball_sizes):
    """Left parts are whole balls, halves differ by at most one ball, and the final nodes are balls of the smallest size."""
    sizes, ball_sizes = tuple(sizes), tuple(sorted(set(ball_sizes), reverse=True))
    plan = full_plan(sizes, ball_sizes)
    for level in plan.levels:
        for a, cut, e in level.T:
            if cut == e: continue
            step = max(s for s in ball_sizes if (e - a) > s)
            left, right = cut - a, -(-(e - cut) // step)
            assert left % step == 0 and 0 <= left // step - right <= 1
    first, end = plan.final
    assert (end - first <= ball_sizes[-1]).all() and first[0] == 0 and (first[1:] == end[:-1]).all() and end[-1] == sum(sizes)
    assert len(first) == sum(-(-n // ball_sizes[-1]) for n in sizes)


# ---- invariances

@rules
@given(cases())
def test_shuffled_points_give_the_same_balls(case):
    """Ties are broken by the other axes, so not even a lattice depends on the order of its points."""
    batch, ball_sizes, seed = case
    g = torch.Generator().manual_seed(seed)
    order = torch.cat([o + torch.randperm(n, generator=g) for o, n in zip(batch.offsets.tolist(), batch.sizes)])
    tree, shuffled = BallTree.build(batch, ball_sizes), BallTree.build(PointBatch(batch.pos[order], batch.sizes), ball_sizes)
    for view in range(2):
        for size in tree.slots.ball_sizes:
            assert torch.equal(ball_sets(tree, batch.pos, size, view), ball_sets(shuffled, batch.pos[order], size, view))


@pytest.mark.parametrize("D", [2, 3])
@pytest.mark.parametrize("view", [0, 1])
def test_shuffled_points_far_from_the_origin(view, D):
    """Distinct points whose rotated float32 coordinates round to the same number keep their place in the order too."""
    n, eps = 200, 2.0 ** -13                                          # one step of float32 at 1024
    rng = np.random.default_rng(D)
    pos = torch.unique(torch.from_numpy(1024 + eps * rng.integers(0, 12, size=(2 * n, D))).float(), dim=0)
    sets = []
    for seed in range(4):
        order = torch.randperm(len(pos), generator=torch.Generator().manual_seed(seed))
        sets.append(ball_sets(BallTree.build(PointBatch.from_tensors(pos[order]), (8, 2)), pos[order], 2, view))
    assert all(torch.equal(s, sets[0]) for s in sets)


@rules
@given(cases(), st.sampled_from(["full", "erwin"]))
def test_a_cloud_alone_is_the_cloud_in_a_batch(case, layout):
    """Slot by slot, both views: batch mates change nothing."""
    batch, ball_sizes, _ = case
    if layout == "erwin": ball_sizes = (16,)
    tree = BallTree.build(batch, ball_sizes, layout=layout)
    for c, pos in enumerate(batch.split(batch.pos)):
        alone = BallTree.build(PointBatch.from_tensors(pos), ball_sizes, layout=layout)
        a, e = tree.slots.offsets[c], tree.slots.offsets[c + 1]
        keep = alone.mask
        assert torch.equal(tree.mask[a:e], keep)
        assert torch.equal(tree.order[a:e][keep] - batch.offsets[c], alone.order[keep])
        assert torch.equal(tree.perm[:, a:e] - a, alone.perm) and torch.equal(tree.perm_inverse[:, a:e] - a, alone.perm_inverse)
        assert torch.equal(tree.inverse[batch.batch == c] - a, alone.inverse)


@rules
@given(cases(kinds=["normal", "lattice"]), st.integers(-20, 20))
def test_powers_of_two_do_not_change_the_tree(case, power):
    """Scaling by a power of two is exact in floating point, so every comparison comes out the same."""
    batch, ball_sizes, _ = case
    a, b = BallTree.build(batch, ball_sizes), BallTree.build(PointBatch(batch.pos * 2.0 ** power, batch.sizes), ball_sizes)
    assert torch.equal(a.order, b.order) and torch.equal(a.perm, b.perm)


@rules
@given(cases(kinds=["normal", "lattice"]))
def test_float64_copy_of_float32_points_gives_the_same_main_balls(case):
    batch, ball_sizes, _ = case
    pos = batch.pos.float()
    a, b = (BallTree.build(PointBatch(p, batch.sizes), ball_sizes) for p in (pos, pos.double()))
    assert torch.equal(ball_sets(a, pos, min(ball_sizes), 0), ball_sets(b, pos, min(ball_sizes), 0))


def test_many_clouds_take_the_path_of_wide_cloud_numbers():
    """Above 256 clouds their numbers no longer fit in a byte; the sorted lists do not depend on the width of the numbers."""
    from erwin_nsa.geometry.balltree import _sorted_lists
    g = torch.Generator().manual_seed(0)
    coords = torch.randint(0, 5, (2, 3, 500), generator=g).double()
    group = torch.arange(4).repeat_interleave(torch.tensor([100, 50, 300, 50]))
    assert torch.equal(_sorted_lists(coords, group, 4), _sorted_lists(coords, group, 2 ** 60))


# ---- the published layout

@rules
@given(cases(layout="erwin"))
def test_erwin_layout_fills_with_copies(case):
    """Slots of a cloud are the next power of two, every copy sits beside its original, rotated slots are the main slots."""
    batch, ball_sizes, _ = case
    tree = BallTree.build(batch, ball_sizes, layout="erwin")
    for c, n in enumerate(batch.sizes):
        own = (tree.slots.cloud == c) & tree.mask
        assert own.sum() == max(2, 2 ** (n - 1).bit_length())
        pairs = tree.order[own].view(-1, 2)
        assert (pairs[:, 0] == pairs[:, 1]).sum() == own.sum() - n
        assert torch.equal(pairs.unique(), batch.offsets[c] + torch.arange(n))
    assert torch.equal(tree.order[tree.inverse], torch.arange(len(batch.pos)))
    copies = tree.mask.clone().index_fill(0, tree.inverse, False)
    assert (copies.nonzero().flatten() % 2 == 1).all(), "the first slot of a leaf is the point, the second its copy"
    assert torch.equal(tree.mask, tree.mask[tree.perm[1]]) and torch.equal(tree.slots.cloud, tree.slots.cloud[tree.perm[1]])


# ---- balls

@rules
@given(cases(), st.sampled_from(["full", "erwin"]))
def test_balls_hold_their_points_and_levels_refine(case, layout):
    batch, ball_sizes, _ = case
    if layout == "erwin": ball_sizes = (16, 4)
    tree = BallTree.build(batch, ball_sizes, layout=layout)
    occupied = tree.mask.nonzero().flatten()
    for view in range(2):
        p, before = tree.to_slots(batch.pos)[tree.perm[view]].double(), None
        for depth in range(tree_depth(tree) + 1):
            level = balls(tree, batch.pos, depth=depth, view=view)
            ranges = torch.cat([torch.arange(a, e) for a, e in zip(level.start.tolist(), level.end.tolist())])
            assert torch.equal(ranges, occupied), "each occupied slot once"
            assert torch.equal(level.count, level.end - level.start)
            if before is not None:
                parent = before.of_slot[level.start]
                assert torch.equal(parent, before.of_slot[level.end - 1]), "a ball lies in one ball of the level above"
            else: assert len(level.start) == len(batch)
            before = level
        sizes = tree.slots.ball_sizes
        for level in [before] + [balls(tree, batch.pos, size=s, view=view) for s in sizes]:
            far = (p - level.centre[level.of_slot].double()).norm(dim=1)[tree.mask]
            reach = level.radius[level.of_slot].double()[tree.mask]
            slack = 4 * torch.finfo(batch.pos.dtype).eps * p[tree.mask].abs().max()
            assert (far <= reach + slack).all() and level.count.sum() == tree.mask.sum()
            assert torch.isfinite(level.centre).all() and torch.isfinite(level.radius).all()
            assert (level.radius[level.count == 0] == 0).all() and (level.centre[level.count == 0] == 0).all()
    smallest = balls(tree, batch.pos, size=sizes[-1])
    if layout == "full": assert (smallest.count > 0).sum() == len(balls(tree, batch.pos, depth=tree_depth(tree)).start)


def test_eight_points_on_a_line_by_hand():
    tree = BallTree.build(PointBatch.from_tensors(torch.stack([torch.tensor([7., 0, 6, 1, 5, 2, 4, 3]), torch.zeros(8)], 1)), (4, 2))
    pos = torch.stack([torch.tensor([7., 0, 6, 1, 5, 2, 4, 3]), torch.zeros(8)], 1)
    assert tree.points_of(0).view(-1, 2).sort(1).values.tolist() == [[1, 3], [5, 7], [4, 6], [0, 2]]
    level = balls(tree, pos, size=4)
    assert level.centre[:, 0].tolist() == [1.5, 5.5] and level.radius.tolist() == [1.5, 1.5]


@pytest.mark.parametrize("kind", ["equal", "line"])
@pytest.mark.parametrize("layout", ["full", "erwin"])
def test_degenerate_clouds(kind, layout):
    rng = np.random.default_rng(0)
    batch = PointBatch.from_clouds([cloud(kind, n, 3, rng) for n in (1, 2, 3, 64, 100)])
    tree = BallTree.build(batch, (16, 4), layout=layout)
    radius = balls(tree, batch.pos, size=4).radius
    assert torch.equal(tree.order[tree.inverse], torch.arange(len(batch.pos)))
    assert radius.max() <= (1e-7 if kind == "equal" else batch.pos.abs().max())


@pytest.mark.parametrize("layout", ["full", "erwin"])
def test_coordinates_at_the_edge_of_float32(layout):
    """Rotated coordinates of 3e38 leave the range of float32; the tree still gives every point one slot."""
    pos = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)) * 3.4e38
    tree = BallTree.build(PointBatch.from_tensors(pos), (16, 4), layout=layout)
    for view in range(2):
        assert torch.equal(tree.points_of(view)[tree.mask].unique(), torch.arange(100))


# ---- no host round trips

@pytest.mark.parametrize("rotate", [0.0, 45.0])
@pytest.mark.parametrize("layout", ["full", "erwin"])
def test_build_never_reads_a_value_back(layout, rotate):
    """Tensors without data refuse every operation whose result shape or control flow depends on values."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    sizes = (1, 50, 301, 128)     # of no other test: layouts are cached by size
    BallTree.build(PointBatch(torch.rand(sum(sizes), 3), sizes), (32, 8), rotate, layout)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        pos = mode.from_tensor(torch.rand(sum(sizes), 3))
        tree = BallTree.build(PointBatch(pos, sizes), (32, 8), rotate, layout)
    assert len(tree.order) == len(tree.slots)


# ---- what is refused

@pytest.mark.parametrize("ball_sizes, layout, message", [
    ((128, 48), "full", "do not nest"), ((), "full", "at least one size"), ((0,), "full", "each 1 or more"),
    ((-4,), "full", "each 1 or more"), ((12, 4), "erwin", "powers of two"), ((8,), "ball", "needed: 'full'")])
def test_ball_sizes_that_cannot_work(ball_sizes, layout, message):
    with pytest.raises(ValueError, match=message):
        BallTree.build(PointBatch.from_tensors(torch.rand(10, 3)), ball_sizes, layout=layout)


def test_balls_wants_one_level():
    batch = PointBatch.from_tensors(torch.rand(100, 3))
    tree = BallTree.build(batch, (16, 4))
    for kwargs, message in [({}, "exactly one"), (dict(size=4, depth=1), "exactly one"), (dict(depth=99), f"to {tree_depth(tree)}"),
                            (dict(depth=-1), "depth is -1"), (dict(size=48 + 1), "a divisor")]:
        with pytest.raises(ValueError, match=message):
            balls(tree, batch.pos, **kwargs)


def test_balls_do_not_mix_clouds():
    """A size that is no ball size of the tree may not draw balls across clouds."""
    batch = PointBatch.from_clouds([torch.rand(16, 3), torch.rand(16, 3) + 100])
    tree = BallTree.build(batch, (16, 4))
    with pytest.raises(ValueError):
        balls(tree, batch.pos, size=32)


@pytest.mark.parametrize("make, error, message", [
    (lambda: PointBatch.from_tensors(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])), ValueError, r"NaN or infinite.*\[1\]"),
    (lambda: PointBatch.from_tensors(torch.rand(4, 3), torch.tensor([0, 1, 0, 1])), ValueError, "falls from 1 to 0 at point 2"),
    (lambda: PointBatch.from_tensors(torch.rand(4, 3), torch.tensor([0, 0, 2, 2])), ValueError, r"no points for ids \[1\]"),
    (lambda: PointBatch.from_tensors(torch.rand(4, 3), torch.tensor([1, 1, 1, 1])), ValueError, "starts at 1"),
    (lambda: PointBatch.from_tensors(torch.rand(4, 3), torch.zeros(5, dtype=torch.long)), ValueError, r"needed: \(4,\)"),
    (lambda: PointBatch.from_tensors(torch.rand(4, 4)), ValueError, r"\(N, 2\) or \(N, 3\)"),
    (lambda: PointBatch.from_tensors(torch.rand(0, 3)), ValueError, "holds no points"),
    (lambda: PointBatch.from_tensors(torch.rand(4, 3).half()), TypeError, "float32 or float64"),
    (lambda: PointBatch.from_clouds([]), ValueError, "at least one"),
    (lambda: PointBatch.from_clouds([torch.rand(4, 3), torch.rand(4, 2)]), ValueError, "all alike"),
    (lambda: PointBatch.from_clouds([torch.rand(4, 3), torch.rand(0, 3)]), ValueError, r"clouds\[1\] holds no points"),
    (lambda: PointBatch.from_padded(torch.rand(2, 4, 3), torch.zeros(2, 4, dtype=torch.bool)), ValueError, "cloud 0"),
    (lambda: PointBatch(torch.rand(4, 3), (2, 1)), ValueError, "add up to 3 for 4"),
    (lambda: PointBatch(torch.rand(4, 3), ()), ValueError, "add up to 0 for 4"),
    (lambda: PointBatch.from_tensors(torch.rand(4, 3), torch.tensor([-1, 0, 0, 1])), ValueError, "starts at -1"),
])
def test_point_batches_that_cannot_work(make, error, message):
    with pytest.raises(error, match=message):
        make()
