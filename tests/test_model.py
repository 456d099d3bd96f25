"""ErwinNSA as its users meet it: shuffled points, batches, cached trees, every option, saved weights, and input that does not fit."""
import itertools
import json

import pytest
import torch

from erwin_nsa.geometry.balltree import BallTree
from erwin_nsa.geometry.neighbours import knn_graph, radius_graph
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.config import ErwinNSAConfig, as_published, config_from_dict, config_to_dict
from erwin_nsa.nn.model import ErwinNSA, count_parameters
from erwin_nsa.nn.tasks import PointwiseMLP, SurfaceBatch, SurfaceModel, surface_batch

SMALL = dict(c_in=5, c_hidden=12, depth=2, num_heads=4, num_kv_heads=2, head_dim=6, local_ball_size=32, compressed_ball_size=8,
             num_selected_balls=2, mp_steps=2)
VARIANTS = {"paper": {}, "shared": dict(selection="ball", phi="attention", memory=False, exclude_own=True),
            "overlap": dict(compressed_stride=4, score="sum_probabilities", phi="mean"), "plain": dict(rotate=0.0, mp_steps=0, memory=False),
            "odd": dict(num_heads=3, num_kv_heads=1, head_dim=5, local_ball_size=12, compressed_ball_size=4, compressed_stride=2),
            "wide": dict(local_ball_size=8, compressed_ball_size=32)}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def make_model(dtype=torch.float64, seed=0, **options) -> ErwinNSA:
    """A small model with weights large enough that every part matters."""
    torch.manual_seed(seed)
    model = ErwinNSA(ErwinNSAConfig(**{**SMALL, **options})).to(dtype)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2 * torch.randn_like(p))
    return model


def make_data(sizes=(90, 1, 40), dtype=torch.float64, seed=1, D=3):
    """x, pos, batch, edge_index."""
    g = torch.Generator().manual_seed(seed)
    x, pos = (torch.randn(sum(sizes), c, generator=g, dtype=torch.float64).to(dtype) for c in (5, D))
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return x, pos, batch, knn_graph(pos, 4, batch, loop=True)


def close(a, b, tol=1e-10):
    return a.shape == b.shape and ((a - b).abs().max() <= tol * max(1.0, b.abs().max().item())).item()


# ---- invariances

@variants
def test_shuffled_points_give_shuffled_features(options):
    """Points are shuffled inside their cloud; edges follow."""
    model, (x, pos, batch, edges) = make_model(**options), make_data()
    g = torch.Generator().manual_seed(2)
    order = torch.cat([o + torch.randperm(n, generator=g) for o, n in ((0, 90), (90, 1), (91, 40))])
    moved = order.argsort()[edges]
    assert close(model(x[order], pos[order], batch, moved), model(x, pos, batch, edges)[order])


def test_shuffled_lattice():
    """Ties between coordinates do not let the input order in."""
    model = make_model()
    pos = torch.cartesian_prod(*[torch.arange(5.0, dtype=torch.float64)] * 3)
    x, edges = torch.randn(125, 5, dtype=torch.float64), radius_graph(pos, 1.0, loop=True)
    order = torch.randperm(125, generator=torch.Generator().manual_seed(0))
    assert close(model(x[order], pos[order], edge_index=order.argsort()[edges]), model(x, pos, edge_index=edges)[order])


@variants
def test_a_cloud_alone_is_the_cloud_in_a_batch(options):
    model, (x, pos, batch, edges) = make_model(**options), make_data()
    together = model(x, pos, batch, edges)
    for c in range(3):
        own = batch == c
        e = edges[:, own[edges[0]]] - int(own.nonzero()[0])
        assert close(together[own], model(x[own], pos[own], edge_index=e), 1e-12)


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_batch_mates_change_no_bit(options, dtype):
    """Given the sizes of all clouds, features and gradients of a cloud do not depend on what its mates hold, not in the last bit.

    NaN in a mate spares the features too. (Its gradients reach every parameter, so a backward pass is lost anyway.)"""
    model, (x, pos, batch, edges) = make_model(dtype, **options), make_data(dtype=dtype)
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


def test_a_far_cloud_in_the_same_batch_changes_nothing():
    model, (x, pos, batch, edges) = make_model(), make_data((60,))
    far = torch.cat([pos, pos[:20] + 1e6])
    e = torch.cat([edges, knn_graph(far[60:], 4, loop=True) + 60], 1)
    b = torch.cat([batch, torch.ones(20, dtype=torch.long)])
    assert close(model(torch.cat([x, x[:20]]), far, b, e)[:60], model(x, pos, batch, edges), 1e-12)


# ---- repeated calls

@variants
def test_a_cached_tree_gives_the_same_bits(options):
    model, (x, pos, batch, edges) = make_model(torch.float32, **options), make_data(dtype=torch.float32)
    tree = model.build_tree(PointBatch.from_tensors(pos, batch))
    first = model(x, pos, batch, edges)
    for _ in range(2):
        assert torch.equal(model(x, pos, batch, edges, tree=tree), first)
        assert torch.equal(model(x, pos, edge_index=edges, tree=tree), first), "the tree knows the clouds"


@pytest.mark.parametrize("options", [{}, dict(selection="ball"), dict(mp_steps=0)], ids=["point", "ball", "no graph"])
def test_recompute_changes_no_bit(options):
    x, pos, batch, edges = make_data(dtype=torch.float32)
    results = []
    for recompute in (False, True):
        model = make_model(torch.float32, recompute=recompute, **options)
        out = model(x, pos, batch, edges)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_records_do_not_disturb():
    """One dict a block, main and rotated view in turn."""
    model, (x, pos, batch, edges) = make_model(), make_data()
    records = []
    assert torch.equal(model(x, pos, batch, edges, records=records), model(x, pos, batch, edges))
    assert [r["frame"].perm is None for r in records] == [True, False]
    assert {"q", "k", "v", "kc", "vc", "indices", "gates", "compressed", "selected", "local", "frame", "windows"} <= set(records[0])
    S = len(records[0]["frame"].slots)
    assert records[0]["gates"].shape == (S, 3, 4) and records[0]["indices"].shape == (2, S, 2)


def test_training_after_inference_mode():
    """Evaluate, then train, with sizes seen first during evaluation."""
    model, (x, pos, batch, edges) = make_model(), make_data((83, 21))
    with torch.inference_mode():
        expected = model(x, pos, batch, edges).clone()
    out = model(x, pos, batch, edges)
    out.sum().backward()
    assert torch.equal(out.detach(), expected)


# ---- every parameter learns

CHOICES = dict(phi=["mlp", "attention", "mean"], selection=["point", "ball"], score=["mean_logits", "sum_probabilities"],
               memory=[True, False], compressed_stride=[None, 4], exclude_own=[False, True])


@pytest.mark.parametrize("values", list(itertools.product(*CHOICES.values())), ids=lambda v: "-".join(map(str, v)))
def test_every_parameter_gets_a_gradient(values):
    """All 96 combinations, from the initial weights."""
    torch.manual_seed(0)
    model = ErwinNSA(ErwinNSAConfig(**SMALL, **dict(zip(CHOICES, values)))).double()
    x, pos, batch, edges = make_data((70, 40))
    model(x, pos, batch, edges).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad and p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


def test_one_step_reduces_the_loss():
    model, (x, pos, batch, edges) = make_model(), make_data()
    target = torch.randn(131, 12, dtype=torch.float64)
    loss = lambda: (model(x, pos, batch, edges) - target).square().mean()
    before = loss()
    before.backward()
    with torch.no_grad():
        for p in model.parameters(): p -= 1e-4 * p.grad
    assert loss() < before


def test_features_and_positions_have_the_right_gradient():
    """Central differences of the whole model in float64: selections are piecewise constant, so a small step does not cross."""
    model, (x, pos, batch, edges) = make_model(), make_data((40, 9))
    tree = model.build_tree(PointBatch.from_tensors(pos, batch))
    loss = lambda x, pos: model(x, pos, batch, edges, tree=tree).square().sum()
    direction = torch.randn(49, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x.requires_grad_()
    slope = (torch.autograd.grad(loss(x, pos), x)[0] * direction).sum()
    with torch.no_grad():
        step = 1e-6
        differences = (loss(x + step * direction, pos) - loss(x - step * direction, pos)) / (2 * step)
    assert abs(slope - differences) <= 1e-5 * abs(differences)


def test_second_derivatives_are_refused():
    """Attention keeps no graph of its gradient: a gradient penalty stops with an error instead of training on half of it."""
    model, (x, pos, batch, edges) = make_model(), make_data((40,))
    grad, = torch.autograd.grad(model(x.requires_grad_(), pos, batch, edges).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"): grad.square().sum().backward()


def test_autocast_trains():
    model, (x, pos, batch, edges) = make_model(torch.float32), make_data(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16): out = model(x, pos, batch, edges)
    assert (out.float() - model(x, pos, batch, edges)).abs().mean() < 0.5
    out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ---- the published mode

def test_reference_mode_runs_and_differs():
    """Frozen sigma, gates at 1/2, copies as tokens, the wrong rows: other numbers from the same weights."""
    native = ErwinNSAConfig(**{**SMALL, "num_selected_balls": 3})
    published = as_published(native)
    assert published.stride == 4 and published.layout == "erwin" and published.exclude_own and not published.train_sigma
    x, pos, batch, edges = make_data((90, 2, 40))
    models = [make_model(**config_to_dict(c)) for c in (native, published)]
    result = models[1].load_state_dict(models[0].state_dict(), strict=False)
    assert not result.unexpected_keys and all(".norm." in k for k in result.missing_keys), "only the second norm is extra"
    a, b = (m(x, pos, batch, edges) for m in models)
    assert torch.isfinite(b).all() and (a - b).abs().max() > 1e-3
    b.sum().backward()
    for name, p in models[1].named_parameters():
        assert (p.grad is not None) == p.requires_grad == ("sigma" not in name), name
    gate = ErwinNSA(published).blocks[0].attention.gate
    assert (gate.weight == 0).all() and (gate.bias == 0).all()


def test_reference_mode_isolates_clouds_and_repeats():
    model, (x, pos, batch, edges) = make_model(**config_to_dict(as_published(ErwinNSAConfig(**SMALL)))), make_data((90, 2, 40))
    together = model(x, pos, batch, edges)
    own = batch == 2
    assert torch.equal(model(x, pos, batch, edges), together)
    assert close(model(x[own], pos[own], edge_index=edges[:, own[edges[0]]] - 92), together[own], 1e-12)


# ---- forms of input

def test_radius_builds_the_graph():
    model, (x, pos, batch, _) = make_model(), make_data()
    expected = model(x, pos, batch, radius_graph(pos, 0.7, batch, loop=True))
    assert torch.equal(model(x, pos, batch, radius=0.7), expected)
    assert not close(model(x, pos, batch, radius=1.5), expected)


@pytest.mark.parametrize("sizes", [(1,), (2,), (1, 1, 1), (31, 33), (507,)], ids=str)
def test_any_size(sizes):
    x, pos, batch, edges = make_data(sizes)
    out = make_model()(x, pos, batch, edges)
    assert out.shape == (sum(sizes), 12) and torch.isfinite(out).all()


def test_two_dimensions():
    x, pos, batch, edges = make_data(D=2)
    model = make_model(dimensionality=2)
    assert torch.isfinite(model(x, pos, batch, edges)).all()
    with pytest.raises(ValueError, match=r"needed: \(131, 2\)"): model(x, make_data()[1], batch, edges)


def test_equal_points_and_single_balls():
    """All points at one place, and a model whose ball is larger than the cloud."""
    x, _, batch, edges = make_data((90,))
    out = make_model()(x, torch.full((90, 3), 0.3, dtype=torch.float64), batch, edges)
    assert torch.isfinite(out).all()
    assert torch.isfinite(make_model(local_ball_size=512, compressed_ball_size=256)(x, make_data((90,))[1], batch, edges)).all()


def test_default_configuration_from_keywords():
    """The three keywords of the documentation give the paper's heads: 16 query heads of width 16, one key head."""
    model = ErwinNSA(c_in=64, c_hidden=64, depth=1)
    assert model.blocks[0].attention.qkv.weight.shape == ((16 + 2) * 16, 64)


# ---- saving

def test_state_dict_round_trip(tmp_path):
    model, data = make_model(), make_data()
    torch.save(dict(config=config_to_dict(model.config), weights=model.state_dict()), tmp_path / "m.pt")
    saved = torch.load(tmp_path / "m.pt", weights_only=True)
    again = ErwinNSA(config_from_dict(saved["config"])).double()
    again.load_state_dict(saved["weights"])
    assert again.config == model.config and torch.equal(again(*data), model(*data))


def test_config_survives_json():
    cfg = ErwinNSAConfig.shapenet_car(gate_init=(0.0, 1.0, 2.0), compressed_stride=16)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(cfg)))) == cfg
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"): config_from_dict({"colour": 1})


def test_presets_are_table_3():
    expected = dict(cosmology=(128, 32, 16, 4, 64), molecular_dynamics=(32, 32, 16, 2, 128), shapenet_car=(128, 32, 16, 6, 64))
    for name, row in expected.items():
        c = getattr(ErwinNSAConfig, name)()
        assert (c.local_ball_size, c.compressed_ball_size, c.num_selected_balls, c.depth, c.c_hidden) == row
        assert (c.num_heads, c.num_kv_heads, c.width, c.rotate) == (16, 1, 16, 45.0)


@pytest.mark.parametrize("name, published, phi", [("cosmology", 2_576_704, 2_166_912), ("molecular_dynamics", 1_836_832, 1_083_456),
                                                  ("shapenet_car", 3_840_608, 3_250_368)])
def test_parameter_counts(name, published, phi):
    """The Table 3 models as the published code counts them, less what it never reads: positions inside a block and a second sigma."""
    cfg = getattr(ErwinNSAConfig, name)()
    counts, native = (count_parameters(ErwinNSA(c)) for c in (as_published(cfg), cfg))
    unread = 2 * cfg.compressed_ball_size * cfg.width + cfg.num_heads
    assert counts["total"] + cfg.depth * unread == published and counts["compression phi"] == phi
    assert counts["total"] - native["total"] == cfg.depth * cfg.c_hidden, "the second norm of each layer"
    assert sum(counts.values()) == 2 * counts["total"], "parts add up"


@pytest.mark.parametrize("init,width", [("fan_in", 32 ** -0.5), ("published", 0.02)])
def test_initial_weights(init, width):
    """Linear weights as wide as asked, biases zero, gates start local: 0.12, 0.12, 0.88."""
    torch.manual_seed(0)
    model = ErwinNSA(c_in=32, c_hidden=64, depth=2, init=init)
    assert 0.9 * width < model.embed.weight.std() < 1.1 * width and (model.embed.bias == 0).all()
    for block in model.blocks:
        gates = block.attention.gate.bias.sigmoid().view(3, 16)
        assert torch.allclose(gates, torch.tensor([[0.1192], [0.1192], [0.8808]]).expand(3, 16), atol=1e-4)
        assert (block.attention.sigma + 1).abs().max() < 0.06


# ---- what is refused

def raises(message, call, error=ValueError):
    with pytest.raises(error, match=message): call()


def test_input_that_does_not_fit():
    model, (x, pos, batch, edges) = make_model(), make_data()
    nan = pos.clone()
    nan[7, 1] = float("nan")
    raises(r"x has shape \(131, 4\); needed: \(N, 5\)", lambda: model(x[:, :4], pos, batch, edges))
    raises(r"x has shape \(131,\)", lambda: model(x[:, 0], pos, batch, edges))
    raises(r"pos has shape \(130, 3\) for 131 rows", lambda: model(x, pos[:-1], batch, edges))
    raises(r"pos has shape \(131, 2\)", lambda: model(x, pos[:, :2], batch, edges))
    raises(r"NaN or infinite coordinates in 1 of 131 points \(first: \[7\]\)", lambda: model(x, nan, batch, edges))
    raises("sorted ids", lambda: model(x, pos, batch.flip(0), edges))
    raises(r"needed: \(131,\)", lambda: model(x, pos, batch[:-1], edges))
    raises("float32 or float64", lambda: model(x, pos.half(), batch, edges), TypeError)
    raises("mp_steps is 2 but there is no graph", lambda: model(x, pos, batch))
    raises("indices from 0 to 130", lambda: model(x, pos, batch, edges + 1))
    raises("int64", lambda: model(x, pos, batch, edges.float()))
    assert model.config.mp_steps == 2 and torch.isfinite(make_model(mp_steps=0)(x, pos, batch)).all()


def test_trees_that_do_not_fit():
    model, (x, pos, batch, edges) = make_model(), make_data()
    points = PointBatch.from_tensors(pos, batch)
    for tree in (model.build_tree(PointBatch.from_tensors(pos[:-1])), BallTree.build(points, (64, 8)),
                 BallTree.build(points, (32, 8), rotate=30.0), BallTree.build(points, (32, 8), rotate=0),
                 BallTree.build(points, (32, 8), layout="erwin")):
        raises("Build it with model.build_tree", lambda: model(x, pos, batch, edges, tree=tree))
    raises("on cpu; needed: 131 points.*on meta", lambda: model(x, pos.to("meta"), batch, edges, tree=model.build_tree(points)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to hold the other tensors")
def test_tensors_on_two_devices():
    model, (x, pos, batch, edges) = make_model().cuda(), make_data()
    with pytest.raises((ValueError, RuntimeError), match="device|cuda"): model(x.cuda(), pos, batch, edges)


def test_a_tree_of_other_clouds_is_refused():
    model, (x, pos, batch, edges) = make_model(), make_data()
    with pytest.raises(ValueError):
        model(x, pos, batch, edges, tree=model.build_tree(PointBatch.from_tensors(pos)))


def test_constructor_wants_one_description():
    raises("given: neither", lambda: ErwinNSA())
    raises(r"a config and \['depth'\]", lambda: ErwinNSA(ErwinNSAConfig(**SMALL), depth=3))


@pytest.mark.parametrize("change, message", [
    (dict(depth=0), "depth is 0; needed: an integer of at least 1"), (dict(c_hidden=1.5), "c_hidden is 1.5"),
    (dict(num_heads=True), "num_heads is True"), (dict(num_kv_heads=3), "no multiple of num_kv_heads 3"),
    (dict(local_ball_size=20), "20 and 8 do not nest"), (dict(compressed_stride=3), "compressed_stride 3 does not divide"),
    (dict(compressed_stride=16), "compressed_stride 16"), (dict(dimensionality=4), "dimensionality is 4"),
    (dict(mp_steps=-1), "mp_steps is -1"), (dict(gate_init=(0.0, 1.0)), "three numbers"),
    (dict(local_ball_size=24, layout="erwin"), "powers of two"), (dict(mode="reference", selection="ball"), "selects by point"),
    (dict(phi="max"), "phi is 'max'; needed: one of mlp, attention, mean"), (dict(score="best"), "score is 'best'"),
    (dict(layout="ball"), "layout is 'ball'"), (dict(selection="all"), "selection is 'all'"), (dict(mode="fast"), "mode is 'fast'"),
    (dict(impl="magic"), "impl is 'magic'"),
    (dict(head_dim=0), "head_dim"), (dict(head_dim=-4), "head_dim"), (dict(rotate=float("nan")), "rotate"),
])
def test_configurations_that_cannot_work(change, message, request):
    raises(message, lambda: ErwinNSAConfig(**{**SMALL, **change}))


def test_all_problems_are_listed_at_once():
    with pytest.raises(ValueError) as caught:
        ErwinNSAConfig(**{**SMALL, "num_kv_heads": 3, "phi": "max", "dimensionality": 5})
    assert all(word in str(caught.value) for word in ("num_kv_heads 3", "phi is 'max'", "dimensionality is 5"))


def test_config_is_frozen():
    with pytest.raises(AttributeError): ErwinNSAConfig(**SMALL).depth = 3


# ---- surfaces

SURFACE = ErwinNSAConfig(**{**SMALL, "c_in": 8})


def surfaces(sizes=(60, 25), **kw) -> SurfaceBatch:
    g = torch.Generator().manual_seed(0)
    normal = torch.nn.functional.normalize(torch.randn(sum(sizes), 3, generator=g), dim=1)
    return surface_batch(PointBatch(torch.randn(sum(sizes), 3, generator=g), sizes), SURFACE, normal=normal, k=4, **kw)


@pytest.mark.parametrize("use_normals", [False, True])
def test_surface_model(use_normals):
    """One number a point, a gradient for every parameter, own features instead of the built ones, repeated calls alike."""
    torch.manual_seed(0)
    model, batch = SurfaceModel(SURFACE, use_normals), surfaces()
    out = model(batch)
    assert out.shape == (85,) and torch.equal(model(batch), out)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert torch.equal(model(batch, x=model.input(batch)), out) and not torch.equal(model(batch, x=torch.zeros(85, 8)), out)
    records = []
    model(batch, records=records)
    assert len(records) == 2
    no_normals = SurfaceBatch(batch.points, None, None, batch.edge_index, batch.tree)
    if use_normals: raises("the batch has none", lambda: model(no_normals))
    else: assert torch.equal(model(no_normals), out)


def test_surfaces_in_a_batch_are_surfaces_alone():
    torch.manual_seed(0)
    model, batch = SurfaceModel(SURFACE, True).double(), surfaces()
    pos, normal = batch.points.pos.double(), batch.normal.double()
    both = model(surface_batch(PointBatch(pos, (60, 25)), SURFACE, normal=normal, k=4))
    for part in (slice(0, 60), slice(60, 85)):
        alone = surface_batch(PointBatch.from_tensors(pos[part]), SURFACE, normal=normal[part], k=4)
        assert close(model(alone), both[part], 1e-12)


def test_surface_batch_without_a_tree():
    torch.manual_seed(0)
    model, batch = SurfaceModel(SURFACE), surfaces()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2 * torch.randn_like(p))
    assert torch.allclose(model(SurfaceBatch(batch.points, None, None, batch.edge_index, None)), model(batch), atol=1e-5)


def test_fourier_features_need_an_even_width():
    raises("width is 5; needed: an even number", lambda: SurfaceModel(ErwinNSAConfig(**SMALL)))


@pytest.mark.parametrize("use_normals", [False, True])
def test_pointwise_mlp_sees_one_point_at_a_time(use_normals):
    torch.manual_seed(0)
    model, batch = PointwiseMLP(8, 16, use_normals), surfaces()
    out = model(batch)
    out.sum().backward()
    assert out.shape == (85,) and all(p.grad.abs().max() > 0 for p in model.parameters())
    pos = batch.points.pos.clone().requires_grad_()
    moved = model(SurfaceBatch(PointBatch(pos, (60, 25)), batch.normal, None, batch.edge_index, None))
    pull = torch.autograd.grad(moved[7], pos)[0]
    assert (pull.abs().sum(1) > 0).nonzero().flatten().tolist() == [7]
