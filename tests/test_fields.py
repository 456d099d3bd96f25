"""Velocity and chain models on clouds as the loader gives them: batches, padding, either backbone, descriptions."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from erwin_nsa.data.chains import load_windows
from erwin_nsa.data.cosmology import HaloScale
from erwin_nsa.data.density import load_cosmology
from erwin_nsa.data.polymers import chain_nll, gaussian_head, gaussian_nll
from erwin_nsa.data.store import CloudSample, CloudStore, Geometry, PreparedClouds, collate, write_clouds
from erwin_nsa.kernels.env import INTERPRET
from erwin_nsa.nn.config import ErwinNSAConfig, as_published
from erwin_nsa.nn.erwin import ErwinConfig, ErwinTrees
from erwin_nsa.nn.fields import ChainModel, VelocityModel, build_model
from erwin_nsa.nn.model import count_parameters
from erwin_nsa.nn.tasks import CloudModel, PointwiseMLP, SurfaceModel, surface_batch
from erwin_nsa.train.step import mean_square, signature, to_device

DEVICE = torch.device("cpu") if INTERPRET else torch.device("cuda")
NSA = ErwinNSAConfig(c_in=8, c_hidden=16, depth=2, num_heads=2, local_ball_size=16, compressed_ball_size=8, num_selected_balls=2, mp_steps=1)
ERWIN = ErwinConfig(8, 16, enc_depths=(2, 2), enc_num_heads=(2, 2), dec_depths=(2,), dec_num_heads=(2,), strides=(2,), ball_sizes=(16, 8), mp_steps=1)
KERNELS = replace(NSA, impl="triton")
TASKS = dict(cosmology=(VelocityModel, mean_square), chains=(ChainModel, chain_nll))
ABOUT = dict(generator="tests/test_fields.py", parameters={}, seed=0, units={}, licence="Apache-2.0", source="parts of the samples", citation="none")
tasks = pytest.mark.parametrize("task", TASKS)
backbones = pytest.mark.parametrize("config", [NSA, ERWIN], ids=["Erwin NSA", "Erwin"])


def part(cloud, n):
    """The first points of a cloud, and the edges among them."""
    edges = cloud.edge_index
    rows = lambda a: None if a is None else a[:n]
    return CloudSample(cloud.pos[:n], rows(cloud.x), rows(cloud.target), cloud.id, rows(cloud.kind),
                       None if edges is None else edges[:, (edges < n).all(0)], cloud.constants)


@pytest.fixture(scope="module")
def clouds(tmp_path_factory):
    """Two universes and two windows of the committed samples, cut to a few points, in a store."""
    universes, windows, folder = load_cosmology("val"), load_windows("val"), tmp_path_factory.mktemp("clouds")
    scale = HaloScale.fit(universes)
    whole = dict(cosmology=[scale.encode(u) for u in universes[:2]], chains=[windows[0], windows[len(windows) - 1]])
    return {task: CloudStore(write_clouds(folder / f"{task}.h5", [part(c, n) for c, n in zip(both, (45, 70))], attributes=ABOUT, split=["val"] * 2))
            for task, both in whole.items()}


def recipe(task, **changes):
    return Geometry(**{**dict(k=4 if task == "cosmology" else None, ball_sizes=NSA.ball_sizes), **changes})


def collated(clouds, task, chosen=(0, 1), **changes):
    data = PreparedClouds(clouds[task], recipe(task, **changes))
    return collate([data[i] for i in chosen])


def made(task, config=NSA, seed=0):
    """A small model with weights large enough that every part matters."""
    torch.manual_seed(seed)
    model = TASKS[task][0](config)
    for p in model.parameters(): p.data += 0.1 * torch.randn_like(p)
    return model


def double(batch): return batch.map(lambda t: t.double() if t.is_floating_point() else t)


# ---- what goes in and comes out

@tasks
@backbones
def test_shapes_and_gradients(clouds, task, config):
    """Prepared or not, with the loader's tree or without: the same numbers; a gradient for every parameter."""
    model, batch = made(task, config), collated(clouds, task)
    out = model(batch)
    assert out.shape == (115, 3 if task == "cosmology" else 6)
    prepared = model.prepare(batch)
    assert torch.equal(model(prepared), out) and model.prepare(prepared) is prepared
    assert torch.equal(model(replace(batch, tree=None)), out) and torch.equal(model(batch, x=model.input(batch)), out)
    TASKS[task][1](model, prepared).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


def test_a_tree_of_the_loader_is_used_where_it_fits(clouds, monkeypatch):
    model, batch = made("cosmology"), collated(clouds, "cosmology")
    monkeypatch.setattr(model.backbone, "build_tree", lambda points: pytest.fail("built a tree that was there"))
    assert torch.equal(model.prepare(batch).geometry.order, batch.tree.order)
    for changes in (dict(ball_sizes=(32, 8)), dict(rotate=30.0), dict(layout="erwin")):
        other, built = collated(clouds, "cosmology", **changes), made("cosmology")
        assert torch.equal(built.prepare(other).geometry.order, batch.tree.order) and torch.equal(built(other), built(batch)), changes
    erwin = made("cosmology", ERWIN)
    trees = erwin.backbone.build_tree(batch.points)
    assert isinstance(trees, ErwinTrees) and erwin._tree(replace(batch, tree=trees)) is trees and erwin._tree(batch) is None


@tasks
@backbones
def test_clouds_in_a_batch_are_clouds_alone(clouds, task, config):
    model, both = made(task, config).double(), double(collated(clouds, task))
    out = model(model.prepare(both)).split(both.points.sizes)
    for i in range(2):
        alone = double(collated(clouds, task, (i,)))
        assert torch.allclose(model(model.prepare(alone)), out[i], rtol=0, atol=1e-12)
    assert not torch.allclose(out[0].mean(0), out[1].mean(0), atol=1e-6)


@tasks
def test_everything_that_is_known_is_read(clouds, task):
    model, batch = made(task), collated(clouds, task)
    pos = batch.points.pos.clone()
    pos[7] += 0.05
    changed = dict(pos=replace(batch, points=replace(batch.points, pos=pos), tree=None))
    if task == "chains": changed |= dict(kind=replace(batch, kind=(batch.kind + 1) % 4), x=replace(batch, points=batch.points.with_x(batch.points.x.flip(1))))
    for name, other in changed.items():
        assert (model(other) - model(batch)).abs().max() > 1e-4, name


def test_a_plane_has_two_velocities():
    flat = [CloudSample(np.random.default_rng(i).normal(size=(30, 2)), None, np.zeros((30, 2)), f"plane {i}") for i in range(2)]
    batch = collate([PreparedClouds(flat, Geometry(k=3))[i] for i in range(2)])
    assert VelocityModel(replace(NSA, dimensionality=2))(batch).shape == (60, 2)
    with pytest.raises(ValueError, match="given: dimensionality=2; needed: 3; do: "): ChainModel(replace(NSA, dimensionality=2))


def test_velocity_reads_positions_alone(clouds):
    """The kind and features of a point are not its concern."""
    model, batch = made("cosmology"), collated(clouds, "cosmology")
    more = replace(batch, kind=torch.ones(115, dtype=torch.long), points=batch.points.with_x(torch.ones(115, 2)))
    assert torch.equal(model(more), model(batch))


@pytest.mark.parametrize("config", [NSA, as_published(ErwinNSAConfig.cosmology()), ErwinConfig.cosmology()], ids=["small", "published", "Erwin"])
def test_the_published_wrappers(config):
    """Parameters outside the backbone: input 3 -> c_in or 45 -> c_in and four types, head c -> c -> 3 or 6."""
    c, i = config.c_hidden, config.c_in
    for make, into, outputs in ((VelocityModel, 3 * i + i, 3), (ChainModel, 45 * i + i + 4 * i, 6)):
        with torch.device("meta"): model = make(config)
        parts = count_parameters(model)
        assert (parts["input"], parts["head"]) == (into, c * c + c + c * outputs + outputs)
        assert parts["total"] == sum(p.numel() for p in model.parameters()) == parts["input"] + parts["head"] + count_parameters(model.backbone)["total"]
        assert isinstance(model.head[1], torch.nn.GELU)


def test_parts_of_erwin_and_of_anything_else():
    erwin = VelocityModel(ERWIN)
    parts = count_parameters(erwin)
    assert parts["pooling"] == sum(p.numel() for m in (*erwin.backbone.pools, *erwin.backbone.unpools) for p in m.parameters())
    assert parts["norms"] == 2 * (2 * 16 + 2 * 32 + 2 * 16)            # two a block; widths of the levels 16, 32, and 16 on the way down
    assert parts["compression phi"] == 0 and "other" not in parts
    mlp = count_parameters(PointwiseMLP(8, 8))
    assert mlp["other"] == sum(p.numel() for p in PointwiseMLP(8, 8).layers.parameters()) and mlp["total"] == mlp["other"] + mlp["input"]


# ---- padding

def few(clouds, task): # (29 + 17 points), for kernels that are interpreted
    return collate([PreparedClouds([part(clouds[task][i], n) for i, n in enumerate((29, 17))], recipe(task))[i] for i in range(2)])


@pytest.mark.parametrize("task, changes", [("cosmology", dict(selection="ball", compressed_stride=4)), ("chains", {})], ids=["cosmology, ball, overlap", "chains"])
def test_padding_changes_neither_loss_nor_gradient(clouds, task, changes):
    """As in test_step, through the kernels."""
    model, batch, loss = made(task, replace(KERNELS, **changes)).to(DEVICE), few(clouds, task), TASKS[task][1]
    plain, padded = (b.to(DEVICE) for b in (model.prepare(batch), model.prepare_padded(batch)))
    assert len(padded.points.pos) > 46 and padded.weight.sum() == 46 and not bool(padded.weight[46:].any())
    losses = [loss(model, b) for b in (plain, padded)]
    grads = [torch.autograd.grad(l, [p for p in model.parameters() if p.requires_grad]) for l in losses]
    assert torch.allclose(*losses, rtol=1e-5)
    for (name, _), a, b in zip(model.named_parameters(), *grads):
        assert torch.allclose(a, b, atol=1e-5 + 1e-4 * a.abs().max().item()), name


def test_what_fills_a_padded_point_reaches_nothing(clouds):
    model = made("chains", KERNELS).to(DEVICE)
    padded = model.prepare_padded(few(clouds, "chains")).to(DEVICE)

    def results():
        loss = chain_nll(model, padded)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    before = results()
    for t in (padded.target, padded.points.x, padded.points.pos): t[46:] = 1e4
    padded.kind[46:] = 3
    assert all(torch.equal(a, b) for a, b in zip(before, results()))


def test_shapes_are_shared_and_names_stay_behind(clouds):
    """Padded batches of nearly equal clouds have one signature, as one recorded step needs."""
    model, data = made("chains"), clouds["chains"]
    batches = [collate([PreparedClouds([part(data[1], n)], recipe("chains"))[0]]) for n in (68, 69, 70)]
    assert len({signature(model.prepare_padded(b))[1] for b in batches}) == 1
    one, other = (model.prepare(collate([PreparedClouds([replace(data[0], id=name)], recipe("chains"))[0]])) for name in "ab")
    assert signature(one)[1] == signature(other)[1] and one.ids == () and one.tree is None
    padded = model.prepare_padded(batches[0])
    assert model.prepare_padded(padded) is padded and model.prepare(padded) is padded
    with pytest.raises(ValueError, match="given: a batch that is prepared already; needed: .*; do: "): model.prepare_padded(one)
    with pytest.raises(ValueError, match="without padding"): made("chains", ERWIN).prepare_padded(batches[0])


@backbones
def test_prepared_batches_move(clouds, config):
    """`map`, `to` and the mover of the training step take geometry and weights along; nothing is computed anew."""
    model, batch = made("chains", config), collated(clouds, "chains")
    prepared = model.prepare(batch)
    out = model(prepared)
    for moved in (prepared.map(torch.clone), prepared.to("cpu"), to_device(prepared, torch.device("cpu"))):
        assert torch.equal(model(moved), out)
    copied = prepared.map(torch.clone)
    assert not {t.data_ptr() for t in signature(prepared)[0] if t.numel()} & {t.data_ptr() for t in signature(copied)[0] if t.numel()}
    meta = replace(prepared, weight=torch.ones(115)).to("meta")
    assert all(t.device.type == "meta" for t in signature(meta)[0]) and meta.weight.shape == (115,) and len(meta) == 2


# ---- learning

@tasks
@backbones
def test_a_few_steps_reduce_the_loss(clouds, task, config):
    torch.manual_seed(0)
    model, loss = TASKS[task][0](config), TASKS[task][1]
    batch, optimizer = model.prepare(collated(clouds, task)), torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.2, losses


def test_chain_nll_is_the_mean_over_real_beads(clouds):
    model, batch = made("chains"), collated(clouds, "chains")
    raw = model(batch)
    assert torch.equal(chain_nll(model, batch), gaussian_nll(*gaussian_head(raw), batch.target))
    weight = (torch.arange(115) < 100).float()
    weighted = chain_nll(model, replace(batch, weight=weight))
    assert torch.allclose(weighted, gaussian_nll(*gaussian_head(raw[:100]), batch.target[:100]), rtol=1e-6) and not torch.allclose(weighted, chain_nll(model, batch))


# ---- surfaces from the loader

@pytest.mark.parametrize("use_normals", [False, True])
def test_surface_models_read_both_batches(use_normals):
    """The same numbers in the shape of the target, so that the loss is the same."""
    torch.manual_seed(0)
    model, mlp, rng = SurfaceModel(NSA, use_normals), PointwiseMLP(8, 8, use_normals), np.random.default_rng(0)
    surfaces = [CloudSample(*rng.normal(size=(2, n, 3)), rng.normal(size=n), f"surface {n}") for n in (40, 25)]
    loaded = collate([PreparedClouds(surfaces, Geometry(k=8, loop=True, ball_sizes=NSA.ball_sizes))[i] for i in range(2)])
    own = surface_batch(loaded.points, NSA, loaded.points.x, loaded.target[:, 0])
    for net in (model, mlp):
        assert net(loaded).shape == (65, 1) and torch.equal(net(loaded)[:, 0], net(own)) and torch.allclose(mean_square(net, loaded), mean_square(net, own))
    padded = model.prepare_padded(loaded)
    assert torch.equal(padded.points.x[:65], loaded.points.x) and not padded.points.x[65:].any() and not padded.target[65:].any()


# ---- input that does not fit

def test_refusals_say_given_needed_and_do(clouds):
    says = lambda *words: pytest.raises(ValueError, match="given: .*" + ".*; ".join(words))
    universe, beads = collated(clouds, "cosmology"), collated(clouds, "chains")
    for config in (NSA, ERWIN):
        for call in ("forward", "prepare"):
            with says("without edges for a model with mp_steps=1", "needed: edge_index", "do: .*Geometry"):
                getattr(made("cosmology", config), call)(replace(universe, edge_index=None))
    with says("without edges", "needed: edge_index", "do: "): made("cosmology").prepare_padded(replace(universe, edge_index=None))
    chain = made("chains")
    with says("x none and kind none", r"needed: x \(N, 45\)", "do: "): chain(universe)
    with says(r"x \(115, 42\)", "needed: ", "do: "): chain(replace(beads, points=beads.points.with_x(beads.points.x[:, :42])))
    with says("kind none", "needed: ", "do: "): chain(replace(beads, kind=None))
    with says("kind from -1 to ", "needed: types 0 to 3", "do: "): chain(replace(beads, kind=beads.kind - 1 - beads.kind.min()))
    with pytest.raises(TypeError, match="needed: an ErwinNSAConfig or an ErwinConfig"): CloudModel(torch.nn.Identity(), 3, 1)


@backbones
def test_without_message_passing_no_edges_are_needed(clouds, config):
    model = made("cosmology", replace(config, mp_steps=0))
    batch = replace(collated(clouds, "cosmology"), edge_index=None)
    assert torch.equal(model(model.prepare(batch)), model(batch))
    if config is NSA: assert model.prepare_padded(batch).geometry.edges is None


# ---- descriptions

@backbones
@pytest.mark.parametrize("make", [VelocityModel, ChainModel, SurfaceModel, lambda c: SurfaceModel(c, use_normals=True)],
                         ids=["velocity", "chain", "surface", "surface with normals"])
def test_a_described_model_is_built_again(make, config):
    model = make(replace(config, rotate=30.0, mlp_ratio=2))
    text = json.dumps(model.describe())
    again = build_model(json.loads(text))
    assert model.describe() == json.loads(text) == again.describe()
    assert type(again) is type(model) and again.backbone.config == model.backbone.config
    again.load_state_dict(model.state_dict())


def test_the_baseline_is_built_again():
    model = PointwiseMLP(8, 12, use_normals=True)
    again = build_model(model.describe())
    again.load_state_dict(model.state_dict())
    assert type(again) is PointwiseMLP and again.describe() == model.describe() == dict(kind="PointwiseMLP", use_normals=True, width=8, hidden=12)


def test_descriptions_that_fit_nothing_are_refused():
    good = VelocityModel(NSA).describe()
    for bad, says in ((dict(kind="Oracle"), "'Oracle'; needed: one of SurfaceModel"), ({}, "a description of None"), (dict(good, use_normals=True), "use_normals"),
                      ({k: v for k, v in good.items() if k != "config"}, "config"), (dict(good, backbone="UNet"), "backbone 'UNet'"),
                      (dict(good, config=dict(good["config"], colour=1)), "colour")):
        with pytest.raises(ValueError, match=says): build_model(bad)


def test_names_of_the_surface_model_are_the_old_ones():
    """Checkpoints written before the base class existed still load."""
    names = {n for n in SurfaceModel(NSA, use_normals=True).state_dict() if not n.startswith("backbone.")}
    assert names == {"input.position.project.weight", "input.normal.weight", "input.normal.bias", "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
