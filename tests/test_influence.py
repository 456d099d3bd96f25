"""Influence and receptive fields: every task model, both backbones, exact fields against gradients, files and summaries."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from erwin_nsa.explore import influence as inf
from erwin_nsa.geometry.neighbours import knn_graph
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.erwin import ErwinConfig
from erwin_nsa.nn.fields import ChainModel, VelocityModel
from erwin_nsa.nn.tasks import SurfaceModel, surface_batch

NSA = dict(c_in=8, c_hidden=16, depth=2, num_heads=2, local_ball_size=8, compressed_ball_size=4, num_selected_balls=2, mp_steps=1)
ERWIN = dict(c_in=8, c_hidden=16, enc_depths=(1, 2), enc_num_heads=(2, 2), dec_depths=(2,), dec_num_heads=(2,), strides=(2,), ball_sizes=(8, 4), mp_steps=1)
SIZES, QUERIES = (150, 21), [7, 149, 155]


def shaken(model, seed=0):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def clouds(seed=0):
    g = torch.Generator().manual_seed(seed)
    return PointBatch.from_clouds([torch.rand(n, 3, generator=g) for n in SIZES])


def case(config):
    model = shaken(SurfaceModel(config))
    return model, surface_batch(clouds(), config, k=3)


def without(model, *branches):
    "Close the gates of branches: exact zeros, in value and gradient."
    for block in model.backbone.blocks:
        H = block.attention.config.num_heads
        for i, name in enumerate(("compressed", "selected", "local")):
            if name in branches:
                block.attention.gate.bias.data[i * H:(i + 1) * H] = -float("inf")
    return model


@pytest.mark.parametrize("changes", [{}, dict(rotate=0.0), dict(strides=(4,), ball_sizes=(4, 4)), dict(strides=(1,), level_widths=(16, 16)), dict(mp_steps=0),
                                     dict(pool_norm="batch")], ids=str)
def test_field_of_erwin_is_where_influence_is(changes):
    model, batch = case(ErwinConfig(**ERWIN | changes))
    field = inf.receptive_field(model, batch, QUERIES)
    assert torch.equal(inf.model_influence(model, batch, QUERIES) > 0, field)
    assert field[0].sum() < SIZES[0] and not field[0, SIZES[0]:].any() and not field[2, :SIZES[0]].any()


@pytest.mark.parametrize("branches", [("selected", "local"), ("local",), ("selected",), ("compressed",)], ids=str)
@pytest.mark.parametrize("changes", [{}, dict(selection="ball", num_heads=4, num_kv_heads=2), dict(rotate=0.0, mp_steps=0, exclude_own=True)], ids=str)
def test_field_of_branches_is_where_influence_is(branches, changes):
    config = ErwinNSAConfig(**NSA | changes)
    model, batch = case(config)
    without(model, *set(config.branches) - set(branches))
    field = inf.receptive_field(model, batch, QUERIES, branches)
    found = inf.model_influence(model, batch, QUERIES) > 0
    assert torch.equal(found, field)
    assert ("compressed" in branches) == bool(field[0, :SIZES[0]].all())


def test_field_of_a_configuration_without_branches():
    model, batch = case(ErwinNSAConfig(**NSA | dict(branches=("local",))))
    field = inf.receptive_field(model, batch, QUERIES)
    assert torch.equal(inf.model_influence(model, batch, QUERIES) > 0, field) and field[0].sum() < SIZES[0]


def test_the_published_tree_with_copies():
    model, batch = case(ErwinConfig(**ERWIN | dict(layout="erwin")))
    found, field = inf.model_influence(model, batch, QUERIES) > 0, inf.receptive_field(model, batch, QUERIES)
    assert (field | ~found).all() and found.any()


def test_steps_grow_and_end_with_the_field():
    model, batch = case(ErwinNSAConfig(**NSA))
    steps = inf.receptive_steps(model, batch, QUERIES)
    assert list(steps) == ["output", "block 1", "block 0", "message 0"]
    grown = list(steps.values())
    assert all((b | ~a).all() for a, b in zip(grown, grown[1:]))
    assert grown[0].sum(1).tolist() == [1, 1, 1] and torch.equal(grown[-1], inf.receptive_field(model, batch, QUERIES))


@pytest.mark.parametrize("backbone", [ErwinNSAConfig(**NSA), ErwinConfig(**ERWIN)], ids=["nsa", "erwin"])
@pytest.mark.parametrize("kind", [VelocityModel, ChainModel])
def test_every_task_model(kind, backbone):
    from erwin_nsa.data.store import CloudBatch
    points = clouds()
    points = points.with_x(torch.randn(sum(SIZES), 45)) if kind is ChainModel else points
    kinds = torch.arange(sum(SIZES)) % 4 if kind is ChainModel else None
    batch = CloudBatch(points, None, kinds, knn_graph(points.pos, 3, points.batch), None, {}, ("a", "b"))
    model = shaken(kind(backbone))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrts = ("features", "positions") + ("inputs",) * (kind is ChainModel)
    for wrt in wrts:
        every = inf.model_influence(model, batch, QUERIES, wrt)
        parts = sum(inf.model_influence(model, batch, QUERIES, wrt, outputs=[o]) for o in range(3 if kind is VelocityModel else 6))
        assert every.dtype == torch.float64 and torch.allclose(every, parts, rtol=1e-9) and (every[0, 7] > 0).all()
        assert not every[0, SIZES[0]:].any()
    prepared = model.prepare(batch)
    assert torch.allclose(inf.model_influence(model, prepared, QUERIES), inf.model_influence(model, batch, QUERIES), rtol=1e-9)
    assert torch.equal(inf.receptive_field(model, prepared, QUERIES), inf.receptive_field(model, batch, QUERIES))
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters() if p.requires_grad)


def test_inputs_by_finite_differences():
    points = clouds().with_x(torch.randn(sum(SIZES), 45))
    from erwin_nsa.data.store import CloudBatch
    batch = CloudBatch(points, None, torch.zeros(sum(SIZES), dtype=torch.long), knn_graph(points.pos, 3, points.batch), None, {}, ("a", "b"))
    model = shaken(ChainModel(ErwinNSAConfig(**NSA)))
    found = inf.model_influence(model, batch, [7], "inputs", outputs=[1])[0, 9]
    exact, double = inf._copy(model, True), inf._prepared(model, batch, torch.float64)
    slope = 0.
    for c in range(45):
        step = torch.zeros(sum(SIZES), 45, dtype=torch.float64)
        step[9, c] = 1e-6
        up, down = (exact(replace(double, points=double.points.with_x(double.points.x + s)))[7, 1] for s in (step, -step))
        slope += ((up - down) / 2e-6).item() ** 2
    assert found.item() == pytest.approx(slope, rel=1e-5)


def test_float32_and_float64_agree_and_eval_mode_is_used():
    model, batch = case(ErwinConfig(**ERWIN | dict(pool_norm="batch")))
    coarse, fine = inf.model_influence(model.train(), batch, QUERIES, double=False), inf.model_influence(model.eval(), batch, QUERIES)
    assert coarse.dtype == torch.float32
    assert (coarse - fine).abs().max() < 1e-4 * fine.max()


def test_groups_are_means():
    A = torch.rand(5, 5)
    rows = inf.influence(lambda x: (A @ x).squeeze(1), torch.rand(5, 1), [[0, 3, 4], 2])
    assert torch.allclose(rows, torch.stack([A[[0, 3, 4]].mean(0), A[2]]) ** 2)
    assert not inf.influence(lambda x: x.detach() * torch.ones(1, requires_grad=True), torch.rand(5, 1), [2]).any()


def test_errors_say_what_to_do():
    model, batch = case(ErwinNSAConfig(**NSA))
    for call, error, says in [(lambda: inf.model_influence(model, batch, [171]), IndexError, "0 to 170"),
                              (lambda: inf.model_influence(model, batch, [0], "weights"), ValueError, "one of features, inputs, positions"),
                              (lambda: inf.receptive_field(model, batch, [[]]), ValueError, "leave the empty group out"),
                              (lambda: inf.measure_influence({"a": model}, {"two": batch}), ValueError, "split the batch"),
                              (lambda: inf.region(batch.points.pos, 0, 0), ValueError, "1 to 171")]:
        with pytest.raises(error, match=says):
            call()


def test_hops_are_shortest_ways():
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import shortest_path
    edges = knn_graph(torch.rand(60, 3, generator=torch.Generator().manual_seed(3)), 3)
    want = shortest_path(coo_array((np.ones(edges.shape[1]), edges.numpy()), shape=(60, 60)).tocsr(), unweighted=True)   # [source, target]
    got = inf.graph_hops(edges, 60, [0, 31]).numpy()
    np.testing.assert_array_equal(got, np.where(np.isinf(want), -1, want).T[[0, 31]])


@pytest.fixture(scope="module")
def result():
    models = {"Erwin, initial": SurfaceModel(ErwinConfig(**ERWIN)), "Erwin NSA, trained": SurfaceModel(ErwinNSAConfig(**NSA))}
    g = torch.Generator().manual_seed(5)
    bodies = {n: surface_batch(PointBatch.from_clouds([torch.rand(size, 3, generator=g)]), ErwinNSAConfig(**NSA), k=4) for n, size in (("a", 90), ("b", 64))}
    return inf.measure_influence({k: shaken(m) for k, m in models.items()}, bodies, queries=3, seed=4)


def test_measurement_is_consistent_and_repeatable(result, tmp_path):
    start = result["offsets"][:-1]
    np.testing.assert_allclose(np.add.reduceat(result["share"], start, axis=1), 1, rtol=1e-5)
    assert (result["distance"][start + result["queries"]] == 0).all() and (result["hops"][start + result["queries"]] == 0).all()
    counts = inf.threshold_counts(result, (0, 1e-6, 1e-3))
    assert (counts[:, 0] <= result["field"]).all() and (np.diff(counts, axis=1) <= 0).all()
    assert result["bodies"].tolist() == ["a"] * 3 + ["b"] * 3
    inf.write_influence(tmp_path / "deep" / "i.npz", result)
    back = inf.read_influence(tmp_path / "deep" / "i.npz")
    assert all(np.array_equal(back[k], v) for k, v in result.items())
    np.savez(tmp_path / "other.npz", a=1)
    with pytest.raises(ValueError, match="measure again"):
        inf.read_influence(tmp_path / "other.npz")


def test_summaries_on_shared_bins(result):
    for plain in (False, True):
        share = inf.shares(result, plain)
        np.testing.assert_allclose(np.add.reduceat(share, result["offsets"][:-1], axis=1), 1)
        edges, density = inf.log_histograms(share, 20)
        assert density.shape == (2, 20)
        np.testing.assert_allclose((density * np.diff(edges)).sum(1), 1)
        for row, d in zip(share, density):
            np.testing.assert_allclose(d * np.diff(edges) * (row > 0).sum(), np.histogram(np.log10(row[row > 0]), edges)[0], rtol=1e-9)


def test_comparison_figure(result):
    pytest.importorskip("plotly")
    fig = inf.influence_comparison(result, title="t")
    assert [t.name for t in fig.data[:2]] == ["Erwin, initial", "Erwin NSA, trained"]
    assert len(fig.data) == 2 + 2 * (1 + 2)                                # two histograms; a line for the first model, line and band for the second, twice
    assert fig.data[0].x.tolist() == fig.data[1].x.tolist() and fig.layout.yaxis3.matches == "y2"
    for axis in (fig.layout.xaxis, fig.layout.xaxis2, fig.layout.xaxis3, fig.layout.yaxis, fig.layout.yaxis2):
        assert axis.title.text
