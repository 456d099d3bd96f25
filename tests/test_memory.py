"""The memory ledger: prediction against what autograd keeps, against the profiler, and the careless gather."""
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import nn

from erwin_nsa.geometry.neighbours import knn_graph
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn import memory as mem
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.erwin import Erwin, ErwinConfig
from erwin_nsa.nn.model import ErwinNSA
from erwin_nsa.nn.mpnn import edge_lists
from erwin_nsa.nn.runtime import implementations
from erwin_nsa.nn.selected import selected_attention

BASE = dict(c_in=16, c_hidden=32, depth=2, num_heads=4, num_kv_heads=2, head_dim=8, local_ball_size=32, compressed_ball_size=16, num_selected_balls=4, impl="torch")


def case(kind, config, sizes, impl="torch", k=4):
    torch.manual_seed(0)
    model = kind(config)
    model.mpnn.impl = impl
    points = PointBatch.from_clouds([torch.rand(n, 3) for n in sizes])
    edges = knn_graph(points.pos, k, points.batch, loop=True)
    geometry = model.geometry(points, model.build_tree(points), edge_lists(edges, sum(sizes)))
    x = torch.rand(sum(sizes), config.c_in)
    return model, lambda: model.run(x, geometry), [x, geometry], edges.shape[1]


def ledgers(config, sizes, impl="torch"):
    model, run, given, E = case(ErwinNSA, replace(config, impl=impl), sizes, impl)
    kept = mem.saved_tensors(model, run, given)
    return mem.by_part(kept), mem.by_part(t for t in mem.predict_kept(config, sizes, E, impl) if t.seen), kept


def assert_close(measured, predicted, slots, depth):
    for part in (set(measured) | set(predicted)) - {"embedding and head"}:
        assert abs(measured.get(part, 0) - predicted.get(part, 0)) <= 0.02 * measured.get(part, 0) + 16 * slots * depth, part


@pytest.mark.parametrize("changes, sizes", [({}, (500,)), (dict(selection="ball"), (100, 3, 70)), (dict(phi="attention", num_kv_heads=4), (130,)), (dict(phi="mean", memory=False), (96,)),
                                            (dict(branches=("compressed", "local")), (64,)), (dict(branches=("selected",), mp_steps=0), (64,)), (dict(head_dim=None, mlp_ratio=2), (200,))], ids=str)
def test_prediction_equals_measurement(changes, sizes):
    config = ErwinNSAConfig(**BASE | changes)
    measured, predicted, _ = ledgers(config, sizes)
    assert_close(measured, predicted, sum(-(-n // 32) * 32 for n in sizes), config.depth)


@pytest.mark.skipif(implementations(torch.zeros(1, 1, 8))["triton"] is not None, reason="kernels do not run on CPU tensors here")
@pytest.mark.parametrize("changes", [dict(depth=1, mp_steps=1), dict(depth=1, mp_steps=0, selection="ball", phi="mean", branches=("selected", "local"))], ids=str)
def test_prediction_equals_measurement_with_kernels(changes):
    config = ErwinNSAConfig(**BASE | changes)
    measured, predicted, _ = ledgers(config, (33,), "triton")
    assert_close(measured, predicted, 64, 1)


def test_hooks_miss_only_what_is_said_to_be_on_the_side():
    config = ErwinNSAConfig(**BASE | dict(num_kv_heads=4, num_selected_balls=8))
    model, run, given, E = case(ErwinNSA, config, (400,))
    kept = sum(t.bytes for t in mem.saved_tensors(model, run, given))
    run()                                                                  # what is made once and cached is made
    left, most = mem.profile_memory(run)
    side = sum(t.bytes for t in mem.predict_kept(config, 400, E) if not t.seen)
    assert side > 0 and abs(left - kept - side) < 0.02 * kept and most >= left


def test_recompute_keeps_less():
    left = {}
    for recompute in (False, True):
        _, run, _, _ = case(ErwinNSA, ErwinNSAConfig(**BASE | dict(recompute=recompute)), (400,))
        run()
        left[recompute] = mem.profile_memory(run)[0]
    assert left[True] < 0.6 * left[False]


def test_erwin_can_be_measured():
    config = ErwinConfig(16, 32, enc_depths=(2, 2), enc_num_heads=(4, 4), dec_depths=(2,), dec_num_heads=(4,), strides=(2,), ball_sizes=(32, 32), impl="torch")
    model, run, given, _ = case(Erwin, config, (200,))
    found = mem.by_part(mem.saved_tensors(model, run, given))
    assert {"message passing", "norms", "SwiGLU", "local", "projections and gate"} <= set(found) and "selected" not in found


def test_everything_is_linear_in_the_cloud():
    config = ErwinNSAConfig.shapenet_car()
    for impl, cuda in (("torch", False), ("triton", True)):
        a, b = (sum(t.bytes for t in mem.predict_kept(config, n, 8 * n, impl, cuda)) for n in (2 ** 18, 2 ** 19))
        assert b / a == pytest.approx(2, rel=0.01)
    assert sum(mem.predict_gathered(2 ** 13, 16, 16, 32, 16).values()) > 3 * sum(mem.predict_gathered(2 ** 12, 16, 16, 32, 16).values())


def test_parameters_and_data_are_not_counted_twice():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.GELU()), torch.rand(6, 3)
    assert [t.bytes for t in mem.saved_tensors(model, lambda: model(x), [dict(a=(x,))])] == [96]
    assert sorted(t.bytes for t in mem.saved_tensors(model, lambda: model(x))) == [72, 96]
    assert mem.saved_tensors(model, lambda: [model(x), None][1], [x]) == []
    with torch.no_grad():
        assert mem.saved_tensors(model, lambda: model(x)) == []
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    assert mem.state_bytes(model) == {"parameters": 64, "gradients": 64, "AdamW": 128}


def test_backward_still_works_under_the_hooks():
    model, x, found = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.rand(6, 3), []
    want = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    mem.saved_tensors(model, lambda: found.extend(torch.autograd.grad(model(x).sum(), list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(found, want))


def test_gathered_selection_is_right_and_costs_what_it_says():
    torch.manual_seed(0)
    S, H, d, b, picks = 768, 2, 4, 16, 3
    q, k, v = (torch.randn(S, H, d, requires_grad=True) for _ in "qkv")
    indices, mask = torch.rand(H, S, S // b).argsort(-1)[..., :picks], torch.ones(S, dtype=torch.bool)
    ours = lambda: selected_attention(q, k, v, indices, mask, b, impl="torch")
    naive = lambda: mem.gathered_selection(q, k, v, indices, b)
    for x, y in zip(torch.autograd.grad(ours().square().sum(), (q, k, v)), torch.autograd.grad(naive().square().sum(), (q, k, v))):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-5)
    say = mem.predict_gathered(S, H, d, b, picks)
    kept = mem.saved_tensors(nn.Identity(), naive, [q, k, v, indices])
    assert sum(t.bytes for t in kept if prod(t.shape) >= S * H * picks * b) == say["gathered keys and values"] + say["attention weights"]
    _, most = mem.profile_memory(lambda: naive().sum().backward())
    assert max(say.values()) < most < 1.5 * sum(say.values())


def test_refusals():
    config = ErwinNSAConfig.shapenet_car()
    for changes in (dict(recompute=True), dict(layout="erwin"), dict(compressed_stride=16)):
        with pytest.raises(ValueError, match="saved_tensors"):
            mem.predict_kept(replace(config, **changes), 100, 800)
    with pytest.raises(ValueError, match="'torch' or 'triton'"):
        mem.predict_kept(config, 100, 800, "cuda")
