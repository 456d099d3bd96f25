"""Erwin: counts of the published models, invariances, levels that nest, every part against plain loops."""
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from erwin_nsa.geometry.balltree import BallTree, rotation_matrix
from erwin_nsa.geometry.neighbours import knn_graph, radius_graph
from erwin_nsa.geometry.partitions import OF_BONDS, PARTITIONS, partition_tree, shifted_order
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.erwin import (BallAttention, Erwin, ErwinBlock, ErwinConfig, ErwinGeometry, Pool, SlotBatchNorm, Unpool,
                                as_published_erwin, backbone, backbone_tree, build_trees, children, level_frames, pooled_positions)
from erwin_nsa.nn.model import ErwinNSA
from erwin_nsa.nn.oracle import dense_attention, local_visibility

SMALL = dict(c_in=5, c_hidden=8, enc_depths=(2, 2, 2), enc_num_heads=(2, 4, 4), dec_depths=(1, 2), dec_num_heads=(2, 2), strides=(2, 2),
             ball_sizes=(16, 8, 8), mp_steps=2)
VARIANTS = {"default": {}, "no rotation": dict(rotate=0.0, mp_steps=0),
            "one level": dict(enc_depths=(2,), enc_num_heads=(2,), dec_depths=(), dec_num_heads=(), strides=(), ball_sizes=(12,)),
            "stride 1": dict(strides=(1, 1)), "strides 3 and 2": dict(strides=(3, 2), ball_sizes=(12, 4, 8)),
            "flash": dict(sigma_init=None, norm="layer", init="fan_in"),
            "widths": dict(level_widths=(8, 12, 4), pool_norm="rms"), "erwin tree": dict(layout="erwin")}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
SIZES = (90, 1, 2, 33)


def make_model(dtype=torch.float64, seed=0, **options) -> Erwin:
    """A small model with weights large enough that every part matters."""
    torch.manual_seed(seed)
    model = Erwin(ErwinConfig(**{**SMALL, **options})).to(dtype)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2 * torch.randn_like(p))
    return model


def make_data(sizes=SIZES, dtype=torch.float64, seed=1, D=3):
    """x, pos, batch, edge_index."""
    g = torch.Generator().manual_seed(seed)
    x, pos = (torch.randn(sum(sizes), c, generator=g, dtype=torch.float64).to(dtype) for c in (5, D))
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return x, pos, batch, knn_graph(pos, 4, batch, loop=True)


def close(a, b, tol=1e-10):
    return a.shape == b.shape and ((a - b).abs().max() <= tol * max(1.0, b.abs().max().item())).item()


# ---- the published models

@pytest.mark.parametrize("name, total, idle", [("cosmology", 4_752_440, 0), ("molecular_dynamics", 4_762_332, 0),
                                               ("shapenet_car", 1_265_680, (64 + 3) * 64 + 64 + 2 * 64)])
@pytest.mark.parametrize("published", [False, True], ids=["ours", "published"])
def test_parameters_of_the_small_models(name, total, idle, published):
    """As counted in the published code; there, a stride of 1 also makes a pooling layer that is never called."""
    config = getattr(ErwinConfig, name)()
    with torch.device("meta"): model = Erwin(as_published_erwin(config) if published else config)
    assert sum(p.numel() for p in model.parameters()) + idle == total
    assert len(list(m for m in model.modules() if isinstance(m, ErwinBlock))) == dict(cosmology=18, molecular_dynamics=22, shapenet_car=18)[name]


@pytest.mark.parametrize("name, c, millions", [("cosmology", 64, 18.9), ("cosmology", 128, 75.5), ("molecular_dynamics", 32, 19.0),
                                               ("molecular_dynamics", 64, 75.6), ("shapenet_car", 128, 5.0), ("shapenet_car", 256, 19.9)])
def test_parameters_of_the_larger_models(name, c, millions):
    with torch.device("meta"): model = Erwin(getattr(ErwinConfig, name)(c_in=c, c_hidden=c))
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.06


def test_initial_weights():
    """Linear layers: normal of width 0.02 and no bias, message passing too; norms 1; sigma near -1."""
    torch.manual_seed(0)
    model = Erwin(ErwinConfig.shapenet_car())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert abs(module.weight.std() / 0.02 - 1) < 5 / module.weight.numel() ** 0.5 and module.weight.abs().max() < 0.2, name
            assert (module.bias == 0).all(), name
        if isinstance(module, (nn.RMSNorm, nn.LayerNorm)): assert (module.weight == 1).all()
        if isinstance(module, BallAttention): assert (module.sigma + 1).abs().max() < 0.05 and module.sigma.std() > 0
    wide = Erwin(ErwinConfig.shapenet_car(init="fan_in", enc_depths=(1, 1), dec_depths=(1,)))
    assert abs(wide.encoder[0][0].mlp.w3.weight.std() * 16 - 1) < 0.05


def test_three_kinds_of_sigma():
    """Trained, frozen, absent: the three published versions."""
    for options, trained, stored in ((dict(), True, True), (dict(train_sigma=False), False, True), (dict(sigma_init=None), False, False)):
        attention = Erwin(ErwinConfig(**{**SMALL, **options})).encoder[0][0].attention
        assert attention.sigma.requires_grad == trained and ("sigma" in attention.state_dict()) == stored
    assert (attention.sigma == 0).all()
    assert abs(Erwin(ErwinConfig(**SMALL, sigma_init=-3.0)).encoder[0][0].attention.sigma.mean() + 3) < 0.05


# ---- invariances

@variants
def test_shuffled_points_give_shuffled_features(options):
    """Points are shuffled inside their cloud; edges follow."""
    model, (x, pos, batch, edges) = make_model(**options), make_data()
    g, starts = torch.Generator().manual_seed(2), (0, 90, 91, 93)
    order = torch.cat([o + torch.randperm(n, generator=g) for o, n in zip(starts, SIZES)])
    assert close(model(x[order], pos[order], batch, order.argsort()[edges]), model(x, pos, batch, edges)[order])


def test_shuffled_lattice():
    """Ties between coordinates, of points and of nodes, do not let the input order in."""
    model = make_model()
    pos = torch.cartesian_prod(*[torch.arange(5.0, dtype=torch.float64)] * 3)
    x, edges = torch.randn(125, 5, dtype=torch.float64), radius_graph(pos, 1.0, loop=True)
    order = torch.randperm(125, generator=torch.Generator().manual_seed(0))
    assert close(model(x[order], pos[order], edge_index=order.argsort()[edges]), model(x, pos, edge_index=edges)[order])


@variants
def test_a_cloud_alone_is_the_cloud_in_a_batch(options):
    """Clouds of 90, 1, 2 and 33 points."""
    model, (x, pos, batch, edges) = make_model(**options), make_data()
    together = model(x, pos, batch, edges)
    assert torch.isfinite(together).all()
    for c in range(len(SIZES)):
        own = batch == c
        e = edges[:, own[edges[0]]] - int(own.nonzero()[0])
        assert close(together[own], model(x[own], pos[own], edge_index=e), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_batch_mates_change_no_bit(dtype):
    """Given the sizes of all clouds, features and gradients of a cloud do not depend on what its mates hold; NaN in a mate spares the features."""
    model, (x, pos, batch, edges) = make_model(dtype), make_data(dtype=dtype)
    own = batch == 0
    _, other_pos, _, _ = make_data(dtype=dtype, seed=7)

    def features(mates_x, mates_pos):
        xs = torch.where(own[:, None], x, mates_x).requires_grad_()
        out = model(xs, torch.where(own[:, None], pos, mates_pos), batch, edges)[own]
        return out, torch.autograd.grad(out.square().sum(), xs)[0][own]
    out, grad = features(x, pos)
    again, grad_again = features(x * 3, other_pos)
    assert torch.equal(again, out) and torch.equal(grad_again, grad)
    assert torch.equal(features(torch.full_like(x, float("nan")), pos)[0], out)


def test_batch_norm_is_the_published_one():
    """It makes clouds depend on each other while training, not in evaluation."""
    model, (x, pos, batch, edges) = make_model(pool_norm="batch", mp_steps=0), make_data((90, 33))
    other = torch.where(batch[:, None] == 0, x, x * 3)
    assert not close(model(x, pos, batch)[:90], model(other, pos, batch)[:90], 1e-3)
    model.eval()
    assert close(model(x, pos, batch)[:90], model(x[:90], pos[:90]), 1e-12)
    model.train()
    for sizes in ((2,), (1,)): assert torch.isfinite(model(*make_data(sizes)[:2])).all()     # one node at a level: nothing to normalise with


def test_slot_batch_norm_is_batch_norm_of_the_real_rows():
    """Outputs, gradients and running statistics over three batches, then in evaluation; masked rows hold NaN."""
    torch.manual_seed(0)
    mine, theirs = SlotBatchNorm(5).double(), nn.BatchNorm1d(5).double()
    mine.load_state_dict(theirs.state_dict())
    for mode in (True, True, True, False):
        mine.train(mode), theirs.train(mode)
        mask = torch.rand(40) < 0.6
        x = (3 + 2 * torch.randn(40, 5).double()).where(mask[:, None], float("nan")).requires_grad_()
        got, want = mine(x, mask)[mask], theirs(x[mask])
        push = torch.randn_like(want)
        assert close(got, want, 1e-12)
        for a, b in zip(gradients(got, [x, *mine.parameters()][:None if mode else 1], push), gradients(want, [x, *theirs.parameters()], push)):
            assert close(a, b, 1e-10)
        for a, b in zip(mine.state_dict().values(), theirs.state_dict().values()): assert close(a.double(), b.double(), 1e-12)


# ---- repeated calls

@variants
def test_cached_trees_give_the_same_bits(options):
    model, (x, pos, batch, edges) = make_model(torch.float32, **options), make_data(dtype=torch.float32)
    trees = model.build_tree(PointBatch.from_tensors(pos, batch))
    first = model(x, pos, batch, edges)
    for _ in range(2):
        assert torch.equal(model(x, pos, batch, edges, tree=trees), first)
        assert torch.equal(model(x, pos, edge_index=edges, tree=trees), first), "the trees know the clouds"


def test_geometry_made_once_gives_the_same_bits():
    """`forward` is `run` on the geometry; a batch keeps it, and it survives the loss of its slot layouts."""
    model, (x, pos, batch, edges) = make_model(torch.float32), make_data(dtype=torch.float32)
    points = PointBatch.from_tensors(pos, batch)
    geometry = model.geometry(points, model.build_tree(points), edges)
    assert isinstance(geometry, ErwinGeometry) and [len(f) for f in geometry.levels] == [2, 2, 2]
    bare = replace(geometry, frames=tuple(replace(f, slots=None) for f in geometry.frames),
                   coarser=tuple(tuple(replace(f, slots=None) for f in level) for level in geometry.coarser))
    for g in (geometry, geometry, bare): assert torch.equal(model.run(x, g), model(x, pos, batch, edges))


def test_recompute_changes_no_bit():
    x, pos, batch, edges = make_data(dtype=torch.float32)
    results = []
    for recompute in (False, True):
        model = make_model(torch.float32, recompute=recompute)
        out = model(x, pos, batch, edges)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_records_do_not_disturb():
    """One dict a block, from the finest level up and back, main and rotated view in turn."""
    model, (x, pos, batch, edges) = make_model(), make_data()
    records = []
    assert torch.equal(model(x, pos, batch, edges, records=records), model(x, pos, batch, edges))
    assert [r["frame"].perm is None for r in records] == [True, False] * 3 + [True, False] + [True]
    slots = [len(r["frame"].slots) for r in records]
    assert slots == [slots[0]] * 2 + [slots[0] // 2] * 2 + [slots[0] // 4] * 2 + [slots[0] // 2] * 2 + [slots[0]]


def test_training_after_inference_mode():
    """Evaluate, then train, with sizes seen first during evaluation."""
    model, (x, pos, batch, edges) = make_model(), make_data((83, 21))
    with torch.inference_mode(): expected = model(x, pos, batch, edges).clone()
    out = model(x, pos, batch, edges)
    out.sum().backward()
    assert torch.equal(out.detach(), expected)


def test_autocast_trains():
    model, (x, pos, batch, edges) = make_model(torch.float32), make_data(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16): out = model(x, pos, batch, edges)
    out.float().square().mean().backward()
    assert close(out.float(), model(x, pos, batch, edges), 0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ---- every parameter learns

@pytest.mark.parametrize("options", [*VARIANTS.values(), dict(pool_norm="batch"), as_published_erwin],
                         ids=[*VARIANTS, "batch norm", "published"])
def test_every_parameter_gets_a_gradient(options):
    """From the initial weights; sigma alone may be frozen."""
    torch.manual_seed(0)
    config = options(ErwinConfig(**SMALL)) if callable(options) else ErwinConfig(**{**SMALL, **options})
    model = Erwin(config).double()
    x, pos, batch, edges = make_data((70, 40))
    model(x, pos, batch, edges).pow(3).sum().backward()
    for name, p in model.named_parameters():
        if not p.requires_grad: assert name.endswith("sigma") and not config.train_sigma
        else: assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


def test_features_and_positions_have_the_right_gradient():
    """Central differences of the whole model in float64, with the trees kept."""
    model, (x, pos, batch, edges) = make_model(mp_steps=0), make_data((40, 9))
    trees = model.build_tree(PointBatch.from_tensors(pos, batch))
    loss = lambda x, pos: model(x, pos, tree=trees).square().sum()
    g = torch.Generator().manual_seed(3)
    steps = [torch.randn(t.shape, dtype=torch.float64, generator=g) * 1e-6 for t in (x, pos)]
    x.requires_grad_(), pos.requires_grad_()
    slope = sum((d * s).sum() for d, s in zip(torch.autograd.grad(loss(x, pos), (x, pos)), steps))
    with torch.no_grad(): differences = (loss(x + steps[0], pos + steps[1]) - loss(x - steps[0], pos - steps[1])) / 2
    assert abs(slope - differences) <= 1e-5 * abs(differences)


# ---- levels

def ball_sets(tree, ball_size, view):
    """The balls of a view as sets of items."""
    return {frozenset(b[b >= 0].tolist()) for b in tree.points_of(view).view(-1, ball_size)} - {frozenset()}


@pytest.mark.parametrize("options", [VARIANTS["default"], VARIANTS["strides 3 and 2"]], ids=["2 and 2", "3 and 2"])
def test_balls_of_a_level_are_balls_of_the_tree_of_points(options):
    """A ball of m nodes holds the points of one ball of m times the span, and every ball but one a cloud is full."""
    config, (_, pos, batch, _) = ErwinConfig(**{**SMALL, **options}), make_data((90, 1, 33, 200))
    trees = build_trees(PointBatch.from_tensors(pos, batch), config)
    members = [{i} for i in range(len(pos))]
    for level, (tree, m, span) in enumerate(zip(trees.levels, config.ball_sizes, config.spans)):
        if level:
            finer, q = trees.levels[level - 1], config.strides[level - 1]
            runs = finer.points_of().view(-1, q)[tree.mask]
            members = [set().union(*(members[i] for i in run if i >= 0)) for run in runs.tolist()]
        got = {frozenset(set().union(*(members[i] for i in ball))) for ball in ball_sets(tree, m, 0)}
        assert got == ball_sets(trees.points, m * span, 0)
        assert tree.slots.occupied == tuple(math.ceil(n / span) for n in (90, 1, 33, 200))
        full = [len(b) == m for b in ball_sets(tree, m, 0)]
        assert full.count(False) <= 4


def test_pooled_points_are_neighbours():
    """Points of a long thin cloud pool with the next ones along it, down to pairs, not in the order that the balls happen to have."""
    y = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    x = torch.rand(64, generator=torch.Generator().manual_seed(1))
    trees = build_trees(PointBatch.from_tensors(torch.stack([x, y.float()], 1)), ErwinConfig(**{**SMALL, "dimensionality": 2}))
    for span in (2, 4):
        got = {frozenset(y[list(ball)].tolist()) for ball in ball_sets(trees.points, span, 0)}
        assert got == {frozenset(range(i, i + span)) for i in range(0, 64, span)}


def test_rotated_views_are_trees_over_the_nodes():
    """At every level the rotated balls are those of a tree built from the rotated nodes."""
    config, (_, pos, batch, _) = ErwinConfig(**SMALL), make_data((90, 33, 5))
    trees, nodes = build_trees(PointBatch.from_tensors(pos, batch), config), pos
    R = torch.from_numpy(rotation_matrix(45.0, 3))
    for level, (tree, m) in enumerate(zip(trees.levels, config.ball_sizes)):
        fresh = BallTree.build(PointBatch(nodes @ R, tree.slots.occupied), (m,), rotate=0)
        assert ball_sets(tree, m, 1) == ball_sets(fresh, m, 0) != ball_sets(tree, m, 0)
        assert torch.equal(tree.perm[1][tree.perm_inverse[1]], torch.arange(len(tree.slots)))
        assert torch.equal(tree.mask[tree.perm[1]], tree.mask)
        if level < 2: nodes = pooled_positions(tree.to_slots(nodes), tree.mask, config.strides[level])[trees.levels[level + 1].mask]


def test_the_published_layout_pools_copies():
    """Slots are a power of two a cloud, all real, and every node has all its children."""
    config, (_, pos, batch, _) = ErwinConfig(**{**SMALL, "layout": "erwin", "ball_sizes": (16, 8, 4)}), make_data((90, 33))
    trees = build_trees(PointBatch.from_tensors(pos, batch), config)
    assert [t.slots.occupied for t in trees.levels] == [(128, 64), (64, 32), (32, 16)]
    assert all(t.mask.all() for t in trees.levels)
    assert len(ball_sets(trees.points, 2, 0)) == 96 and max(map(len, ball_sets(trees.points, 2, 0))) == 2
    for tree, m in zip(trees.levels, config.ball_sizes): assert ball_sets(tree, m, 1) != ball_sets(tree, m, 0)


def chains(sizes=(90, 1, 33)):
    """Points, and bonds along each cloud."""
    _, pos, batch, _ = make_data(sizes)
    rows = torch.arange(len(pos) - 1)
    rows = rows[batch[:-1] == batch[1:]]
    return PointBatch.from_tensors(pos, batch), torch.stack([rows, rows + 1])


def main_view(points, bonds, config, partition):
    return partition_tree(points, partition, config.tree_ball_sizes, 0, **dict(edge_index=bonds) if partition in OF_BONDS else {})


@pytest.mark.parametrize("partition", PARTITIONS)
def test_trees_start_from_any_partition(partition):
    """Level 0 is the partition; runs of it become the next level, whose balls nest; second views are made as the first is."""
    config, (points, bonds) = ErwinConfig(**SMALL), chains()
    main = main_view(points, bonds, config, partition)
    trees = build_trees(points, config, main, partition)
    assert torch.equal(trees.points.points_of(), main.points_of())
    if partition not in OF_BONDS:
        for a, b in zip(trees.levels, build_trees(points, config, partition=partition).levels): assert torch.equal(a.perm, b.perm)
    nodes, R = points.pos, torch.from_numpy(rotation_matrix(45.0, 3))
    for level, (tree, m) in enumerate(zip(trees.levels, config.ball_sizes)):
        fresh = PointBatch(nodes @ R, tree.slots.occupied)
        second = tree.points_of(1)[tree.mask]
        if partition in OF_BONDS: assert torch.equal(second, shifted_order(tree.points_of(0)[tree.mask], tree.slots.occupied, (m,)))
        else: assert ball_sets(tree, m, 1) == ball_sets(partition_tree(fresh, partition, (m,), 0), m, 0)
        assert torch.equal(tree.perm[1][tree.perm_inverse[1]], torch.arange(len(tree.slots))) and torch.equal(tree.mask[tree.perm[1]], tree.mask)
        if level < 2: nodes = pooled_positions(tree.to_slots(nodes), tree.mask, config.strides[level])[trees.levels[level + 1].mask]


def test_the_default_trees_are_the_ball_tree():
    config, (points, bonds) = ErwinConfig(**SMALL), chains()
    default = build_trees(points, config)
    for trees in (build_trees(points, config, partition="ball_tree"), build_trees(points, config, main_view(points, bonds, config, "ball_tree"))):
        for a, b in zip(trees.levels, default.levels):
            for key in ("order", "inverse", "perm", "perm_inverse"): assert torch.equal(getattr(a, key), getattr(b, key))


@pytest.mark.parametrize("partition", PARTITIONS)
def test_the_model_runs_on_every_partition(partition):
    """A cloud alone has the features it has in a batch, and every parameter has a gradient."""
    model, (points, bonds), (x, _, batch, edges) = make_model(), chains(), make_data((90, 1, 33))
    trees = build_trees(points, model.config, main_view(points, bonds, model.config, partition), partition)
    y = model(x, points.pos, batch, edges, tree=trees)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    alone, own = PointBatch.from_tensors(points.pos[91:]), bonds[:, bonds[0] >= 91] - 91
    trees = build_trees(alone, model.config, main_view(alone, own, model.config, partition), partition)
    assert close(model(x[91:], alone.pos, None, edges[:, edges[1] >= 91] - 91, tree=trees), y[91:])
    assert torch.equal(y, model(x, points.pos, batch, edges)) == (partition == "ball_tree")


@pytest.mark.parametrize("change, says", [(dict(partition="hilberd"), "one of ball_tree, hilbert"), (dict(partition="segments"), "a tree that knows the bonds"),
                                          (dict(main=(16, 0)), "config.tree_ball_sizes"), (dict(main=(None, 45)), "rotate=0"), (dict(layout="erwin", partition="morton"), "layout='full'")])
def test_partitions_that_do_not_fit_are_refused(change, says):
    change, (points, _) = dict(change), chains()
    config = ErwinConfig(**{**SMALL, "layout": change.pop("layout", "full")})
    if "main" in change:
        sizes, rotate = change["main"]
        change["main"] = partition_tree(points, "hilbert", config.tree_ball_sizes if sizes is None else (sizes,), rotate)
    with pytest.raises(ValueError, match=says): build_trees(points, config, **change)


def test_positions_of_nodes():
    """The mean of the real children; zero where there are none, whatever they held."""
    pos = torch.tensor([[0., 2.], [4., 0.], [5., 1.], [float("nan")] * 2, [float("nan")] * 2, [float("nan")] * 2])
    mask = torch.tensor([True] * 3 + [False] * 3)
    assert pooled_positions(pos, mask, 2).tolist() == [[2, 1], [5, 1], [0, 0]]
    assert children(pos, mask, 3)[1].tolist() == [[0, 0]] * 3


# ---- parts against plain loops

def frames_of(config, sizes=(41, 5, 1), seed=0):
    torch.manual_seed(seed)
    points = PointBatch.from_clouds([torch.rand(n, config.dimensionality, dtype=torch.float64) for n in sizes])
    trees = build_trees(points, config)
    return trees, level_frames(trees, points.pos)


def gradients(y, inputs, push):
    return torch.autograd.grad(y, inputs, push)


@pytest.mark.parametrize("options", [{}, dict(sigma_init=None), dict(layout="erwin"), dict(dimensionality=2)], ids=["full", "no bias", "erwin", "plane"])
def test_ball_attention_is_dense_attention_with_a_mask(options):
    """Every level and view; masked slots hold NaN, and reach neither outputs nor gradients."""
    config = ErwinConfig(**{**SMALL, **options})
    trees, frames = frames_of(config)
    for level, m in enumerate(config.ball_sizes):
        for frame in frames[level]:
            mask, layer = frame.mask, BallAttention(12, 3, m, config).double()
            x = torch.randn(len(mask), 12, dtype=torch.float64).where(mask[:, None], float("nan")).requires_grad_()
            clean = x.masked_fill(~mask[:, None], 0)
            mean = torch.stack([frame.pos[b * m:(b + 1) * m][mask[b * m:(b + 1) * m]].mean(0) for b in range(len(mask) // m)]).nan_to_num()
            relative = (frame.pos - mean.repeat_interleave(m, 0)).masked_fill(~mask[:, None], 0)
            assert close(frame.relative, relative, 1e-12)
            q, k, v = layer.qkv(clean + layer.position(relative)).view(-1, 3, 3, 4).unbind(1)
            apart = (frame.pos[:, None] - frame.pos[None]).norm(dim=-1)
            want = layer.out(dense_attention(q, k, v, local_visibility(frame.slots, m), bias=layer.sigma[:, None, None] * apart)[0].flatten(1))
            got, inputs, push = layer(x, frame), [x, *layer.parameters()], torch.randn_like(want)
            assert close(got, want, 1e-12)
            for a, b in zip(gradients(got, inputs, push), gradients(want, inputs, push)): assert close(a, b, 1e-11)


@pytest.mark.parametrize("q", [2, 3])
@pytest.mark.parametrize("pool_norm", ["layer", "rms"])
def test_pooling_is_a_plain_loop(q, pool_norm):
    """One node at a time, absent children left as zeros; NaN in masked slots reaches neither outputs nor gradients."""
    config = ErwinConfig(**{**SMALL, "strides": (q, 2), "ball_sizes": (8 * q, 8, 4), "pool_norm": pool_norm})
    trees, frames = frames_of(config)
    fine, coarse = frames[0][0], frames[1][0]
    mask, up, pool = fine.mask, coarse.mask, Pool(4, 6, q, config).double()
    nn.init.normal_(pool.project.bias)
    x = torch.randn(len(mask), 4, dtype=torch.float64).where(mask[:, None], float("nan")).requires_grad_()
    rows = []
    for node in range(len(up)):
        kids = [s for s in range(node * q, node * q + q) if mask[s]]
        if not kids:
            rows.append(None)
            continue
        centre = sum(fine.pos[s] for s in kids) / len(kids)
        row = torch.cat([x[s] if s in kids else torch.zeros(4).double() for s in range(node * q, node * q + q)]
                        + [fine.pos[s] - centre if s in kids else torch.zeros(3).double() for s in range(node * q, node * q + q)])
        rows.append(pool.norm(pool.project(row)))
        assert close(coarse.pos[node], centre, 1e-14)
    assert [r is not None for r in rows] == up.tolist()
    got, want = pool(x, fine, coarse)[up], torch.stack([r for r in rows if r is not None])
    inputs, push = [x, *pool.parameters()], torch.randn_like(want)
    assert close(got, want, 1e-12)
    for a, b in zip(gradients(got, inputs, push), gradients(want, inputs, push)): assert close(a, b, 1e-12)


@pytest.mark.parametrize("q", [1, 2, 3])
def test_unpooling_is_a_plain_loop(q):
    """One child at a time; NaN in masked parents and children reaches neither outputs nor gradients."""
    config = ErwinConfig(**{**SMALL, "strides": (q, 2), "ball_sizes": (8 * q, 8, 4)})
    trees, frames = frames_of(config)
    fine, coarse = frames[0][0], frames[1][0]
    mask, up, unpool = fine.mask, coarse.mask, Unpool(6, 4, q, config).double()
    nn.init.normal_(unpool.project.bias)
    parents = torch.randn(len(up), 6, dtype=torch.float64).where(up[:, None], float("nan")).requires_grad_()
    skip = torch.randn(len(mask), 4, dtype=torch.float64).where(mask[:, None], float("nan")).requires_grad_()
    want = []
    for s in mask.nonzero().flatten().tolist():
        node, turn = divmod(s, q)
        apart = torch.cat([fine.pos[t] - coarse.pos[node] if mask[t] else torch.zeros(3).double() for t in range(node * q, node * q + q)])
        change = unpool.project(torch.cat([parents[node], apart]))[turn * 4:(turn + 1) * 4]
        want.append(unpool.norm(skip[s] + change))
    got, want = unpool(parents, skip, fine, coarse)[mask], torch.stack(want)
    inputs, push = [parents, skip, *unpool.project.parameters()], torch.randn_like(want)
    assert close(got, want, 1e-12)
    for a, b in zip(gradients(got, inputs, push), gradients(want, inputs, push)): assert close(a, b, 1e-12)


def loop_block(block, h, pos, balls):
    """A block written for lists of nodes: h and pos by node, balls as lists of nodes."""
    a, out = block.attention, [None] * len(h)
    H = a.num_heads
    for ball in balls:
        p = torch.stack([pos[i] for i in ball])
        u = torch.stack([block.norm1(h[i]) for i in ball]) + a.position(p - p.mean(0))
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(0, 1) for t in a.qkv(u).chunk(3, -1))
        logits = q @ k.mT / q.shape[-1] ** 0.5 + a.sigma[:, None, None] * (p[:, None] - p).norm(dim=-1)
        for i, o in zip(ball, a.out((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))): out[i] = h[i] + o
    return [o + block.mlp(block.norm2(o)) for o in out]


@pytest.mark.parametrize("layout", ["full", "erwin"])
def test_the_whole_model_is_a_plain_loop(layout):
    """Nodes in lists, no masks, no slots: only which node is in which ball is taken from the trees. Copies are nodes in the published layout."""
    model, (x, pos, batch, _) = make_model(mp_steps=0, layout=layout), make_data((41, 1, 9))
    config, trees = model.config, model.build_tree(PointBatch.from_tensors(pos, batch))
    node_of = [t.mask.cumsum(0) - 1 for t in trees.levels]                               # node of each main slot
    balls = [[[b[t.mask[t.perm[view]].view(-1, m)[i]].tolist() for i, b in enumerate(n[t.perm[view]].view(-1, m))] for view in (0, 1)]
             for t, n, m in zip(trees.levels, node_of, config.ball_sizes)]
    run = lambda blocks, h, level, p: [h := loop_block(b, h, p, [ball for ball in balls[level][i % 2] if ball]) for i, b in enumerate(blocks)][-1]
    order = trees.points.order[trees.points.mask]
    h, at, kids, skips = list(model.embed(x[order])), [list(pos[order])], [], []
    for level, blocks in enumerate(model.encoder):
        if level:
            q, pool, fine = config.strides[level - 1], model.pools[level - 1], trees.levels[level - 1]
            kids.append([[int(node_of[level - 1][s]) for s in range(n * q, n * q + q) if fine.mask[s]]
                         for n in range(len(fine.slots) // q) if fine.mask[n * q]])
            at.append([torch.stack([at[-1][i] for i in own]).mean(0) for own in kids[-1]])
            skips.append(h)
            pad = lambda rows: torch.cat(rows + [torch.zeros_like(rows[0])] * (q - len(rows)))
            h = [pool.norm(pool.project(torch.cat([pad([h[i] for i in own]), pad([at[-2][i] - p for i in own])]))) for own, p in zip(kids[-1], at[-1])]
        h = run(blocks, h, level, at[level])
    for level in reversed(range(len(skips))):
        unpool, below = model.unpools[level], [None] * len(skips[level])
        for parent, own, p in zip(h, kids[level], at[level + 1]):
            apart = [at[level][i] - p for i in own] + [torch.zeros(3).double()] * (config.strides[level] - len(own))
            for i, change in zip(own, unpool.project(torch.cat([parent, *apart])).view(config.strides[level], -1)):
                below[i] = unpool.norm(skips[level][i] + change)
        h = run(model.decoder[level], below, level, at[level])
    want = torch.stack(h)[node_of[0][trees.points.inverse]]
    assert close(model(x, pos, batch, tree=trees), want, 1e-11)


# ---- refusals and neighbours in the house

@pytest.mark.parametrize("options, says", [
    (dict(enc_num_heads=(3, 4, 4)), r"enc_num_heads\[0\] is 3 for width 8"), (dict(dec_num_heads=(2, 3)), r"dec_num_heads\[1\] is 3"),
    (dict(strides=(2,)), "strides has 1 entries; needed: 2"), (dict(strides=(3, 2)), "do not nest"), (dict(ball_sizes=16), "ball_sizes is 16"),
    (dict(ball_sizes=(16, 8, 0)), "integers of at least 1"), (dict(level_widths=(8, 16, 16), strides=(2, 1), ball_sizes=(16, 8, 8)), None),
    (dict(strides=(2, 1), level_widths=(8, 16, 32)), "a stride of 1 changes nothing"), (dict(level_widths=(16, 16, 16)), "c_hidden is 8"),
    (dict(layout="erwin", ball_sizes=(12, 4, 4), strides=(3, 2)), "powers of two"), (dict(pool_norm="group"), "pool_norm is 'group'"),
    (dict(norm="batch"), "norm is 'batch'"), (dict(dimensionality=4), "dimensionality is 4"), (dict(rotate=-1.0), "rotate is -1"),
    (dict(c_in=0), "c_in is 0"), (dict(mp_steps=-1), "mp_steps is -1"), (dict(enc_depths=()), "enc_depths is empty"), (dict(impl="cuda"), "impl is 'cuda'")])
def test_configurations_are_refused_with_reasons(options, says):
    if says is None: assert ErwinConfig(**{**SMALL, **options}).widths == (8, 16, 16)
    else:
        with pytest.raises(ValueError, match=says): ErwinConfig(**{**SMALL, **options})


def test_all_reasons_come_at_once():
    with pytest.raises(ValueError, match=r"enc_num_heads\[0\].*\n.*do not nest.*\n.*rotate"):
        ErwinConfig(**{**SMALL, "enc_num_heads": (3, 4, 4), "strides": (3, 2), "rotate": 400.0, "level_widths": (8, 16, 16)})


def test_a_configuration_survives_json():
    config = ErwinConfig.molecular_dynamics(level_widths=(16, 32, 64, 128, 192), sigma_init=None)
    assert ErwinConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert hash(config) is not None and replace(config, rotate=0.0).rotate == 0


def test_input_is_refused_with_reasons():
    """The checks of ErwinNSA, and those of the trees."""
    model, (x, pos, batch, edges) = make_model(), make_data()
    trees = model.build_tree(PointBatch.from_tensors(pos, batch))
    for call, error, says in (
        (lambda: model(x, pos, batch), ValueError, "no graph"), (lambda: model(x[:, :4], pos, batch, edges), ValueError, r"needed: \(N, 5\)"),
        (lambda: model(x.float(), pos, batch, edges), TypeError, "dtype"), (lambda: model(x, pos[:, :2], batch, edges), ValueError, "dimensionality"),
        (lambda: model(x, pos, batch.flip(0), edges), ValueError, "sorted"), (lambda: model(x * 1, pos / 0, batch, edges), ValueError, "NaN or infinite"),
        (lambda: model(x, pos, batch, edges, tree=trees.points), TypeError, "needed: ErwinTrees"),
        (lambda: model(x, pos, batch, edges, tree=make_model(ball_sizes=(16, 8, 4)).build_tree(PointBatch.from_tensors(pos, batch))), ValueError, "has balls of"),
        (lambda: model(x, pos, batch, edges, tree=make_model(rotate=30.0).build_tree(PointBatch.from_tensors(pos, batch))), ValueError, "30.0"),
        (lambda: model(x, pos, batch, edges, tree=make_model(layout="erwin").build_tree(PointBatch.from_tensors(pos, batch))), ValueError, "erwin"),
        (lambda: model(x[:-1], pos[:-1], None, tree=trees, edge_index=edges[:, :0]), ValueError, "126 points"),
        (lambda: model(x, pos, torch.zeros_like(batch), edges, tree=trees), ValueError, "Leave batch out"),
        (lambda: Erwin(model.config, c_in=3), ValueError, "a config and"), (lambda: Erwin(), ValueError, "neither")):
        with pytest.raises(error, match=says): call()


def test_a_radius_does_for_a_graph():
    model, (x, pos, batch, _) = make_model(), make_data()
    assert torch.equal(model(x, pos, batch, radius=0.8), model(x, pos, batch, radius_graph(pos, 0.8, batch, loop=True)))


def test_either_configuration_builds_its_backbone():
    """Same seed, same weights; the tree is the one the model would build."""
    x, pos, batch, edges = make_data(dtype=torch.float32)
    points = PointBatch.from_tensors(pos, batch)
    nsa = ErwinNSAConfig(c_in=5, c_hidden=8, depth=2, num_heads=2, local_ball_size=16, compressed_ball_size=4, num_selected_balls=2)
    for config, kind in ((nsa, ErwinNSA), (ErwinConfig(**SMALL), Erwin)):
        torch.manual_seed(0)
        model = backbone(config)
        assert type(model) is kind and model.config is config
        out = model(x, pos, edge_index=edges, tree=backbone_tree(points, config))
        assert out.shape == (126, config.c_hidden) and torch.equal(out, model(x, pos, batch, edges))
    for build in (backbone, lambda c: backbone_tree(points, c)):
        with pytest.raises(TypeError, match="needed: an ErwinNSAConfig or an ErwinConfig"): build(SMALL)
