"""Probes against the dense oracle in float64, for every branch, layout and option; snapshots, formats, Erwin, and what is refused."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from erwin_nsa.data.store import CloudBatch
from erwin_nsa.explore.probe import Probe, query_rows, ranked_balls
from erwin_nsa.geometry.neighbours import knn_graph
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.config import BRANCHES, ErwinNSAConfig, as_published
from erwin_nsa.nn.erwin import ErwinConfig
from erwin_nsa.nn.fields import ChainModel, VelocityModel
from erwin_nsa.nn.model import ErwinNSA
from erwin_nsa.nn.oracle import compressed_visibility, dense_attention, local_visibility, selected_visibility
from erwin_nsa.nn.tasks import PointwiseMLP, SurfaceModel, surface_batch
from erwin_nsa.train.step import Average

SIZES = (70, 3, 41)
NSA = dict(c_in=8, c_hidden=16, depth=2, num_heads=4, num_kv_heads=2, local_ball_size=32, compressed_ball_size=8, num_selected_balls=3, mp_steps=0)
ERWIN = dict(c_in=8, c_hidden=16, enc_depths=(2, 2), enc_num_heads=(2, 4), dec_depths=(2,), dec_num_heads=(2,), strides=(4,), ball_sizes=(16, 8), mp_steps=1)
POINTS = (0, 69, 70, 72, 73, 113)


def shaken(model, seed=0):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def cloud(dtype=torch.float64, seed=0, x=8):
    g = torch.Generator().manual_seed(seed)
    return PointBatch.from_tensors(torch.rand(sum(SIZES), 3, generator=g).to(dtype), torch.arange(3).repeat_interleave(torch.tensor(SIZES)),
                                   torch.randn(sum(SIZES), x, generator=g).to(dtype))


def on_points(weights, geometry, frame):
    "Weights on slots of a view (H, S) -> on points (H, N), copies of a point added up."
    main = torch.arange(len(frame.mask)) if frame.perm is None else frame.perm
    keep = frame.mask
    return torch.zeros(len(weights), len(geometry.inverse), dtype=weights.dtype).index_add_(1, geometry.order[main[keep]], weights[:, keep])


def oracle(attention, record):
    "Dense weights of the three branches: compressed (H, S, W + memory), selected and local (H, S, S); None where a branch is missing."
    cfg, f, slots, out = attention.config, record["frame"], record["frame"].slots, {}
    if "local" in cfg.branches:
        bias = attention.sigma[:, None, None] * torch.cdist(f.pos, f.pos, compute_mode="donot_use_mm_for_euclid_dist")
        out["local"] = dense_attention(record["q_local"], record["k_local"], record["v_local"], local_visibility(slots, cfg.local_ball_size), bias=bias)
    if "selected" in cfg.branches:
        visible, times = selected_visibility(slots, record["indices"], cfg.compressed_ball_size, causal=cfg.mode == "reference")
        out["selected"] = dense_attention(record["q"], record["k"], record["v"], visible, times=times)
    if "compressed" in cfg.branches:
        see, k, v = compressed_visibility(slots, record["windows"].table), record["kc"], record["vc"]
        if record["memory"] is not None:
            see = torch.cat([see, slots.mask[:, None]], 1)
            k, v = (torch.cat([t, m[None]]) for t, m in zip((k, v), record["memory"]))
        out["compressed"] = dense_attention(record["q"], k, v, see)
    return out


CASES = {
    "point": {}, "ball": dict(selection="ball"), "one key head": dict(num_kv_heads=1), "as many key heads": dict(num_kv_heads=4),
    "overlap": dict(compressed_stride=4), "overlap, ball": dict(compressed_stride=2, selection="ball", exclude_own=True),
    "one view": dict(rotate=0.0), "no memory": dict(memory=False), "probabilities": dict(score="sum_probabilities"),
    "probabilities, ball": dict(score="sum_probabilities", selection="ball", memory=False), "large compressed": dict(local_ball_size=8, compressed_ball_size=16),
    "more than there are": dict(num_selected_balls=20, exclude_own=True), "mean phi": dict(phi="mean"),
    "local alone": dict(branches=("local",)), "no local": dict(branches=("selected", "compressed")), "selected alone": dict(branches=("selected",)),
    "compressed alone": dict(branches=("compressed",)), "copies": dict(layout="erwin"), "published": None,
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_oracle(case):
    config = as_published(ErwinNSAConfig(**NSA)) if CASES[case] is None else ErwinNSAConfig(**NSA | CASES[case])
    net, points, records = shaken(ErwinNSA(config)).double(), cloud(), []
    geometry = net.geometry(points, net.build_tree(points), None)
    net.run(points.x, geometry, records)
    probe, N = Probe(net, points), sum(SIZES)
    for layer, (block, record) in enumerate(zip(net.blocks, records)):
        want, f = oracle(block.attention, record), record["frame"]
        for point in POINTS:
            rows = probe.rows(point, layer)
            slot = geometry.inverse[point] if f.perm_inverse is None else f.perm_inverse[geometry.inverse[point]]
            parts = {}
            for branch in ("selected", "local"):
                parts[branch] = on_points(want[branch][1][:, slot], geometry, f) if branch in want else torch.zeros(4, N)
            if "compressed" in want:
                weights, table = want["compressed"][1][:, slot], record["windows"].table
                share = torch.zeros(4, len(f.mask), dtype=torch.float64)
                for w, row in enumerate(table):
                    if len(row := row[row >= 0]): share[:, row] += weights[:, w, None] / len(row)
                parts["compressed"] = on_points(share, geometry, f)
                memory = weights[:, -1] if config.memory else torch.zeros(4)
                torch.testing.assert_close(rows.memory, memory.double(), rtol=0, atol=1e-12)
            else: parts["compressed"] = torch.zeros(4, N)
            gates = torch.stack([record["gates"][slot][i] * (b in config.branches) for i, b in enumerate(BRANCHES)])
            torch.testing.assert_close(rows.gates, gates, rtol=0, atol=1e-12)
            for branch, weights in parts.items():
                torch.testing.assert_close(getattr(rows, branch), weights.double(), rtol=0, atol=1e-12)
            gated = sum(g[:, None] * parts[b].double() for g, b in zip(gates, BRANCHES))
            torch.testing.assert_close(rows.on_points("gated"), gated, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_rows_add_up_and_the_selection_is_ranked_by_score(case):
    config = as_published(ErwinNSAConfig(**NSA)) if CASES[case] is None else ErwinNSAConfig(**NSA | CASES[case])
    points, H = cloud(), 4
    probe = Probe(shaken(ErwinNSA(config)).double(), points)
    one, b = torch.ones(H).double(), config.compressed_ball_size
    for point in range(0, sum(SIZES), 9):
        for rows in probe.query(point).values():
            for branch in BRANCHES:
                if branch not in config.branches:
                    assert branch not in rows.branches and not getattr(rows, branch).any() and not rows.gates[BRANCHES.index(branch)].any()
            if "local" in config.branches: torch.testing.assert_close(rows.local.sum(1), one)
            if "compressed" in config.branches: torch.testing.assert_close(rows.compressed.sum(1) + rows.memory, one)
            something = (rows.selected_points >= 0).flatten(1).any(1).repeat_interleave(H // len(rows.selected_points))
            torch.testing.assert_close(rows.selected.sum(1), something.double())
            if "selected" not in config.branches: assert not ranked_balls(rows) and not something.any(); continue
            for head in range(H):
                found = ranked_balls(rows, head)
                assert [r.rank for r in found] == list(range(1, len(found) + 1)) and all(r.picked_by == 1 for r in found)
                assert sum(r.weight for r in found) == pytest.approx(float(something[head]))
                if config.mode == "reference": continue
                scores = [r.score for r in found]
                assert scores == sorted(scores, reverse=True) and len(found) == min(config.num_selected_balls, rows.scores.shape[1] - config.exclude_own)
                unread = np.delete(rows.scores[head * config.num_kv_heads // H].numpy(), [r.ball - rows.first_ball for r in found])
                if not config.exclude_own and len(unread): assert unread.max() <= scores[-1]


def test_heads_means_and_pooled_ranks():
    probe = Probe(shaken(ErwinNSA(ErwinNSAConfig(**NSA))).double(), cloud())
    rows = probe.rows(12)
    for branch in (*BRANCHES, "gated"):
        full = rows.on_points(branch)
        assert full.shape == (4, sum(SIZES))
        torch.testing.assert_close(rows.on_points(branch, "mean"), full.mean(0))
        for head in range(4): torch.testing.assert_close(rows.on_points(branch, head), full[head])
    pooled = ranked_balls(rows)
    by_head = [{r.ball for r in ranked_balls(rows, h)} for h in (0, 2)]                   # two query heads share a key head
    assert {r.ball for r in pooled} == by_head[0] | by_head[1]
    assert [(-r.picked_by, -r.score) for r in pooled] == sorted((-r.picked_by, -r.score) for r in pooled)
    assert all(r.picked_by == sum(r.ball in balls for balls in by_head) for r in pooled)
    for r in pooled: assert r.weight == pytest.approx(float(rows.selected[:, r.points].sum(1).mean()))


def test_points_of_one_cloud_never_read_another():
    probe = Probe(shaken(ErwinNSA(ErwinNSAConfig(**NSA))), cloud(torch.float32))
    cloud_of = torch.arange(3).repeat_interleave(torch.tensor(SIZES))
    for answer in probe.query(list(POINTS)):
        for rows in answer.values():
            assert not rows.on_points("gated")[:, cloud_of != cloud_of[rows.point]].any()


# ---------------------------------------------------------------- models and batches
def chain_batch(kind=ChainModel):
    points = cloud(torch.float32, x=45)
    return CloudBatch(points, None, torch.arange(sum(SIZES)) % 4, knn_graph(points.pos, 3, points.batch), None, {}, ("a", "b", "c"))


@pytest.mark.parametrize("kind", [VelocityModel, ChainModel])
@pytest.mark.parametrize("config", [ErwinNSAConfig(**NSA | dict(mp_steps=1)), ErwinConfig(**ERWIN)], ids=["nsa", "erwin"])
def test_task_models_raw_and_prepared_batches(kind, config):
    model, batch = shaken(kind(config)), chain_batch()
    model.input.eval()                                                                     # a mixture of modes must come back as it was
    modes = [m.training for m in model.modules()]
    raw, ready = Probe(model, batch), Probe(model, model.prepare(batch))
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())
    with torch.no_grad(): torch.testing.assert_close(raw.output, model.eval()(batch))
    for point in POINTS:
        for a, b in zip(raw.query(point).values(), ready.query(point).values(), strict=True):
            assert torch.equal(a.on_points(), b.on_points()) and torch.equal(a.gates, b.gates)


def test_query_rows_of_a_record_equal_the_probe():
    net, points, records = shaken(ErwinNSA(ErwinNSAConfig(**NSA))), cloud(torch.float32), []
    tree = net.build_tree(points)
    net(points.x, points.pos, tree=tree, records=records)
    probe = Probe(net, replace(surface_batch(points, net.config), tree=tree))
    for layer, (block, record) in enumerate(zip(net.blocks, records)):
        for point in POINTS:
            assert torch.equal(query_rows(block.attention, record, tree, point).on_points(), probe.rows(point, layer).on_points())


def test_a_probe_is_a_photograph_and_an_average_is_another():
    config = ErwinNSAConfig(**NSA | dict(mp_steps=1))
    model, points = shaken(SurfaceModel(config)), cloud(torch.float32)
    batch, average = surface_batch(points, config), Average(model, 0.5)
    first = Probe(model, batch)
    before = first.rows(7).on_points().clone()
    shaken(model, 1)
    average.update(0)
    assert torch.equal(first.rows(7).on_points(), before)
    own = Probe(model, batch).rows(7).on_points()
    with average.shown(): mean = Probe(model, batch)
    assert not torch.equal(own, before) and not torch.equal(mean.rows(7).on_points(), own)
    assert torch.equal(Probe(model, batch).rows(7).on_points(), own)


@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_some_layers_and_half_precision(dtype, eps):
    net, points = ErwinNSA(ErwinNSAConfig(**NSA | dict(depth=3))), cloud(torch.float32)
    full, part = Probe(net, points), Probe(net, points, layers=[-1, 0], dtype=dtype)
    assert part.layers == [0, 2] and list(part.query(3)) == [0, 2] and full.untrained
    for point in POINTS:
        for layer, rows in part.query(point).items():
            exact = full.rows(point, layer)
            assert torch.equal(rows.selected_balls, exact.selected_balls)
            torch.testing.assert_close(rows.on_points(), exact.on_points(), rtol=0, atol=eps)
    assert part.kept[0].nbytes < 0.5 * full.kept[0].nbytes
    kept = sum(t.numel() * t.element_size() for t in part.kept[0].tensors.values() if t is not None)
    assert part.kept[0].nbytes == pytest.approx(kept, rel=0.05)                             # nothing hangs on behind


def test_queries_make_nothing_of_the_size_of_all_pairs():
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **kwargs or {})
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor): largest = max(largest, t.numel())
            return out

    g = torch.Generator().manual_seed(0)
    points = PointBatch.from_tensors(torch.rand(3000, 3, generator=g), x=torch.randn(3000, 8, generator=g))
    probe = Probe(shaken(ErwinNSA(ErwinNSAConfig(**NSA))), points)
    with Watch():
        for rows in probe.query(5).values(): rows.on_points(); ranked_balls(rows)
    assert 3000 < largest < 5 * 3072, largest                                              # H numbers a slot, or the compressed keys


def test_autocast_is_followed():
    net, points = shaken(ErwinNSA(ErwinNSAConfig(**NSA))), cloud(torch.float32)
    exact = Probe(net, points)
    with torch.autocast("cpu", torch.bfloat16): coarse = Probe(net, points)
    rows = coarse.rows(8, 0)
    assert rows.local.dtype == torch.float32
    torch.testing.assert_close(rows.local.sum(1), torch.ones(4))
    torch.testing.assert_close(rows.local, exact.rows(8, 0).local, rtol=0, atol=0.1)


# ---------------------------------------------------------------- Erwin
def test_rows_of_erwin_are_those_of_the_oracle():
    config = ErwinConfig(**ERWIN)
    model, points = shaken(SurfaceModel(config)).double(), cloud()
    batch, records = surface_batch(points, config), []
    model.eval()(batch, records=records)
    probe, geometry = Probe(model, batch), model.backbone.geometry(batch.points, batch.tree, None)
    assert probe.blocks == ["encoder 0.0", "encoder 0.1", "encoder 1.0", "encoder 1.1", "decoder 0.0", "decoder 0.1"]
    attentions = [b.attention for part in (*model.backbone.encoder, *reversed(model.backbone.decoder)) for b in part]
    for layer, (attention, record) in enumerate(zip(attentions, records)):
        f, span = record["frame"], probe.spans[layer]
        bias = attention.sigma[:, None, None] * torch.cdist(f.pos, f.pos, compute_mode="donot_use_mm_for_euclid_dist")
        _, weights = dense_attention(record["q_local"], record["k_local"], record["v_local"], local_visibility(f.slots, attention.ball_size), bias=bias)
        for point in POINTS:
            rows, node = probe.rows(point, layer), geometry.inverse // span
            home = node if f.perm_inverse is None else f.perm_inverse[node]                # slot of the node of each point
            mine = weights[:, home[point]]                                                 # (H, S_l)
            there = torch.bincount(home, minlength=len(f.mask))
            torch.testing.assert_close(rows.local, mine[:, home] / there[home], rtol=0, atol=1e-12)
            torch.testing.assert_close(rows.on_points("gated"), rows.local)
            torch.testing.assert_close(rows.local.sum(1), torch.ones(attention.num_heads).double())


# ---------------------------------------------------------------- errors
def bad(name, points=None):
    config = ErwinNSAConfig(**NSA | dict(mp_steps=1))
    model, points = SurfaceModel(config), points or cloud(torch.float32)
    batch = surface_batch(points, config)
    probe = Probe(model, batch)
    nan = points.pos.clone(); nan[[4, 9]] = float("nan")
    other = ErwinNSAConfig(**NSA | dict(local_ball_size=64, mp_steps=1))
    spoilt = SurfaceModel(config); spoilt.head[0].weight.data[:] = float("nan")
    huge = SurfaceModel(config); huge.backbone.blocks[0].attention.qkv.weight.data *= 1e6
    return {
        "unknown point": lambda: probe.rows(114), "negative point": lambda: probe.query(-1), "half a point": lambda: probe.rows(1.5), "a word": lambda: probe.rows("7"),
        "yes": lambda: probe.rows(True), "in a list": lambda: probe.rows([0, 114]), "unknown layer": lambda: probe.rows(0, 2), "layer by name": lambda: probe.rows(0, "last"),
        "layer not kept": lambda: Probe(model, batch, layers=[0]).rows(0), "layers": lambda: Probe(model, batch, layers=[2]), "no layers": lambda: Probe(model, batch, layers=[]),
        "dtype": lambda: Probe(model, batch, dtype=torch.int8), "range": lambda: Probe(huge, batch, dtype=torch.float16),
        "nan positions": lambda: Probe(model, replace(batch, points=PointBatch(nan, SIZES))), "nan weights": lambda: Probe(spoilt, batch),
        "nan features": lambda: Probe(ErwinNSA(ErwinNSAConfig(**NSA)), points.with_x(points.x / 0)),
        "other tree": lambda: Probe(model, surface_batch(points, other)), "other clouds": lambda: Probe(model, replace(batch, points=PointBatch(points.pos, (114,)))),
        "erwin tree": lambda: Probe(model, surface_batch(points, ErwinConfig(**ERWIN))),
        "prepared for another": lambda: Probe(model, SurfaceModel(other).prepare(surface_batch(points, other))),
        "padded": lambda: Probe(model, model.prepare_padded(batch)), "format": lambda: Probe(model.double(), batch),
        "plane": lambda: Probe(model, replace(batch, points=PointBatch(points.pos[:, :2], SIZES))), "pointwise": lambda: Probe(PointwiseMLP(), batch),
        "linear": lambda: Probe(torch.nn.Linear(2, 2), batch), "no batch": lambda: Probe(model, points), "text": lambda: Probe(model, "car.npz"),
        "bare without x": lambda: Probe(ErwinNSA(ErwinNSAConfig(**NSA)), PointBatch(points.pos, SIZES)),
        "branch": lambda: probe.rows(0).on_points("global"), "head": lambda: probe.rows(0).on_points("local", 4), "head of ranks": lambda: ranked_balls(probe.rows(0), -1),
    }[name]


ERRORS = {"unknown point": "0 to 113", "negative point": "point -1", "half a point": "1.5", "a word": "'7'", "yes": "True", "in a list": "114", "unknown layer": r"\[0, 1\]",
          "layer by name": "'last'", "layer not kept": r"\[0\], of 2 blocks", "layers": r"unknown: \[2\]", "no layers": r"layers \[\]", "dtype": "bfloat16", "range": "bfloat16",
          "nan positions": "2 of 114 points, first at point 4", "nan weights": "earlier checkpoint", "nan features": "features x", "other tree": "another model", "other clouds": "other clouds",
          "erwin tree": "ErwinTrees", "prepared for another": "model.prepare", "padded": "before it was padded", "format": "float64", "plane": "2 dimensions", "pointwise": "a PointwiseMLP",
          "linear": "a Linear", "no batch": "surface_batch", "text": "a str", "bare without x": "with_x", "branch": "gated", "head": "0 to 3", "head of ranks": "0 to 3"}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_given_needed_and_what_to_do(case):
    with pytest.raises(ValueError, match=r"given: .*; needed: .*; do: ") as raised:
        bad(case)()
    assert raised.match(ERRORS[case])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", [{}, dict(memory=False), dict(selection="ball"), dict(branches=("selected",))], ids=str)
def test_rows_on_a_gpu(changes):
    net, points = shaken(ErwinNSA(ErwinNSAConfig(**NSA | changes))), cloud(torch.float32)
    here = Probe(net, points)
    there = Probe(net.cuda(), points.to("cuda"))
    for point in POINTS:
        for a, b in zip(here.query(point).values(), there.query(point).values()):
            assert b.memory.is_cuda and b.on_points().is_cuda
            torch.testing.assert_close(a.local, b.local.cpu(), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(a.compressed, b.compressed.cpu(), rtol=1e-3, atol=1e-3)
