"""A batch padded to round sizes trains like the batch itself, through the kernels (interpreted where there is no GPU)."""
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from erwin_nsa.data.store import BatchOrder, CloudLoader, CloudSample, Geometry, PreparedClouds
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.kernels.env import INTERPRET
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.erwin import ErwinConfig
from erwin_nsa.nn.fields import VelocityModel
from erwin_nsa.nn.tasks import PointwiseMLP, SurfaceBatch, SurfaceModel, surface_batch
from erwin_nsa.train.distributed import Ranks
from erwin_nsa.train.step import Average, Preparing, TrainStep, capturable_adamw, mean_square, points_of, set_learning_rate, shared_shapes, signature, to_device

DEVICE = torch.device("cpu") if INTERPRET else torch.device("cuda")
SMALL = ErwinNSAConfig(c_in=8, c_hidden=16, depth=2, num_heads=2, local_ball_size=16, compressed_ball_size=8, num_selected_balls=2, mp_steps=1, impl="triton")


def made(sizes, config=SMALL, seed=0):
    torch.manual_seed(seed)
    model = SurfaceModel(config)
    for p in model.parameters(): p.data += 0.1 * torch.randn_like(p)
    batch = surface_batch(PointBatch.from_clouds([torch.randn(n, 3) for n in sizes]), config, target=torch.randn(sum(sizes)))
    return model.to(DEVICE), batch


@pytest.mark.parametrize("sizes", [(45,), (33, 1, 20)], ids=str)
@pytest.mark.parametrize("changes", [{}, dict(selection="ball", compressed_stride=4)], ids=["point", "ball, overlap"])
def test_padding_changes_neither_loss_nor_gradient(sizes, changes):
    model, batch = made(sizes, ErwinNSAConfig(**{**SMALL.__dict__, **changes}))
    plain, padded = (to_device(b, DEVICE) for b in (model.prepare(batch), model.prepare_padded(batch)))
    assert len(padded.points.pos) > sum(sizes) and not bool(padded.weight[sum(sizes):].any())
    assert torch.allclose(model(padded)[:sum(sizes)], model(plain), atol=2e-5)
    losses = [mean_square(model, b) for b in (plain, padded)]
    grads = [torch.autograd.grad(l, [p for p in model.parameters() if p.requires_grad]) for l in losses]
    assert torch.allclose(*losses, rtol=1e-5)
    for (name, _), a, b in zip(model.named_parameters(), *grads):
        assert torch.allclose(a, b, atol=1e-5 + 1e-4 * a.abs().max().item()), name


def test_what_fills_a_padded_point_reaches_nothing():
    model, batch = made((45,))
    padded = to_device(model.prepare_padded(batch), DEVICE)
    loss = mean_square(model, padded)
    padded.target[45:] = 1e6
    assert torch.equal(mean_square(model, padded), loss)


def test_few_shapes_for_many_sizes():
    model, _ = made((45,))
    batches = [made((n,))[1] for n in range(129, 145)]
    assert len({signature(b)[1] for b in shared_shapes(model, batches, "graph")}) <= 2
    assert len({signature(b)[1] for b in shared_shapes(model, batches, "eager")}) == 16


def test_erwin_is_not_padded():
    config = ErwinConfig(8, 16, enc_depths=(2, 2), enc_num_heads=(2, 2), dec_depths=(2,), dec_num_heads=(2,), strides=(2,), ball_sizes=(32, 16))
    model, batch = made((45,), config)
    with pytest.raises(ValueError, match="without padding"): model.prepare_padded(batch)


def test_learning_rate_of_every_group():
    weights = [torch.nn.Parameter(torch.zeros(2, device=DEVICE)) for _ in range(2)]
    optimizer = capturable_adamw([dict(params=[w]) for w in weights], 0.1, DEVICE)
    set_learning_rate(optimizer, 0.25)
    assert [float(g["lr"]) for g in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.skipif(INTERPRET, reason="recording needs a CUDA device")
@pytest.mark.parametrize("pad", [False, True], ids=["as it is", "padded"])
def test_recorded_steps_follow_eager_ones(pad):
    losses = {}
    for mode in ("eager", "graph"):
        model, batch = made((300, 45))
        batch = to_device((model.prepare_padded if pad else model.prepare)(batch), DEVICE)
        step = TrainStep(model, capturable_adamw(model.parameters(), 1e-3, DEVICE), clip=1.0, mode=mode)
        losses[mode] = torch.stack([step(batch) for _ in range(6)])
    assert torch.allclose(losses["eager"], losses["graph"], rtol=1e-4)


def parts_of(sizes, cut, pad=False, seed=0):
    "A model, the whole batch and the same clouds in two batches."
    config = SMALL if pad or not INTERPRET else replace(SMALL, impl="torch")
    model, whole = made(sizes, config, seed=seed)
    rows = sum(sizes[:cut])
    halves = [surface_batch(PointBatch.from_clouds(whole.points.pos[a:b].split(s)), config, target=whole.target[a:b])
              for a, b, s in ((0, rows, sizes[:cut]), (rows, sum(sizes), sizes[cut:]))]
    ready = [to_device((model.prepare_padded if pad else model.prepare)(b), DEVICE) for b in (whole, *halves)]
    return model, ready[0], ready[1:]


def updated(model, batches, mode="eager", times=1, loss=mean_square):
    step = TrainStep(model, capturable_adamw(model.parameters(), 1e-3, next(model.parameters()).device), loss, clip=1.0, mode=mode)
    losses = [step(*batches).item() for _ in range(times)]
    return torch.tensor(losses), [p.grad for p in model.parameters()], step


@pytest.mark.parametrize("sizes, cut, pad", [((40, 40), 1, False), ((45, 33, 20), 2, False), pytest.param((45, 20), 1, True, marks=pytest.mark.skipif(INTERPRET, reason="padding needs kernels"))],
                         ids=["equal", "unequal", "padded"])
def test_micro_batches_are_one_batch(sizes, cut, pad):
    model, whole, halves = parts_of(sizes, cut, pad)
    one, expected, _ = updated(model, [whole])
    two, grads, step = updated(parts_of(sizes, cut, pad)[0], halves)
    assert torch.allclose(one, two, rtol=1e-5) and len(step.losses) == 2
    for a, b in zip(expected, grads): assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5 + 1e-4 * a.abs().max().item()))
    half = updated(parts_of(sizes, cut, pad)[0], halves[:1])[1]
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(expected, half) if a is not None)


def test_points_that_pad_do_not_count():
    torch.manual_seed(0)
    pos, target, none = torch.randn(30, 3), torch.randn(30), torch.zeros(2, 0, dtype=torch.long)
    made_of = lambda rows, spare: SurfaceBatch(PointBatch.from_clouds([torch.cat([pos[rows], 9 * torch.ones(spare, 3)])]), None, torch.cat([target[rows], torch.ones(spare)]), none, None,
                                               weight=torch.cat([torch.ones(len(pos[rows])), torch.zeros(spare)]) if spare else None)
    batches = [made_of(slice(0, 30), 0), made_of(slice(0, 10), 7), made_of(slice(10, 30), 2)]
    assert [float(points_of(b)) for b in batches] == [30, 10, 20] and points_of(torch.zeros(3)) == 1
    model, grads = PointwiseMLP(8, 8), []
    for given in (batches[:1], batches[1:]):
        grads.append(updated(copy.deepcopy(model), given)[1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def plain_model():
    torch.manual_seed(0)
    return torch.nn.Linear(2, 1)


def test_an_overflow_in_half_precision_is_no_error_and_no_step():
    model, batch = plain_model(), torch.ones(4, 2)
    step = TrainStep(model, torch.optim.AdamW(model.parameters(), lr=0.1), lambda m, b: m(b).square().mean() * 30, clip=1.0, numbers="fp16", mode="eager")
    before = [p.detach().clone() for p in model.parameters()]
    assert step(batch).isfinite() and step.scaler.get_scale() == 32768 and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    while step.scaler.get_scale() > 1 and all(torch.equal(a, b) for a, b in zip(before, model.parameters())): step(batch)
    assert all(p.isfinite().all() for p in model.parameters()) and not torch.equal(before[0], model.weight)
    after = [p.detach().clone() for p in model.parameters()]
    assert not step(batch * float("nan")).isfinite() and all(torch.equal(a, b) for a, b in zip(after, model.parameters()))
    assert step(batch).isfinite()


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler")
def test_modes_that_cannot_record_are_refused_with_what_to_do(monkeypatch):
    model = plain_model()
    monkeypatch.setattr(TrainStep, "device", property(lambda self: torch.device("cuda"), lambda self, value: None), raising=False)
    optimizer, two = torch.optim.SGD(model.parameters(), 0.1), Ranks(SimpleNamespace(process_index=0, num_processes=2, mixed_precision="no", gradient_accumulation_steps=1))
    with pytest.raises(ValueError, match="mode='graph' with fp16.*use mode='compile'"): TrainStep(model, optimizer, mode="graph", numbers="fp16")
    with pytest.raises(ValueError, match="mode='graph' with several processes.*use mode='compile'"): TrainStep(model, optimizer, mode="graph", ranks=two)
    assert TrainStep(model, optimizer, ranks=two).mode == "compile" and TrainStep(model, optimizer, numbers="fp16").mode == "compile"
    assert TrainStep(model, optimizer).mode == "graph"


def test_names_and_order_of_clouds_do_not_keep_recordings_apart():
    samples = [CloudSample(torch.randn(24, 3).numpy(), None, torch.randn(24, 3).numpy(), f"c{i}", constants=dict(t=i)) for i in range(4)]
    torch.manual_seed(0)
    prepare, batches = Preparing(VelocityModel(SMALL).to(DEVICE), "graph"), list(CloudLoader(PreparedClouds(samples, Geometry(k=4)), BatchOrder(4, 2)))
    assert len({signature(prepare(b))[1] for b in batches}) == 1 and not prepare.pad
    padded = Preparing(prepare.model, "graph", pad=True)(batches[0])
    assert padded.weight.sum() == 48 and len(padded.target) > 48


def test_mean_of_the_weights_is_shown_in_place_and_taken_away_again():
    model = plain_model()
    mean, where = Average(model, 0.99), [p.data_ptr() for p in model.parameters()]
    first = model.weight.detach().clone()
    model.weight.data.add_(1)
    mean.update(0)
    own = model.weight.detach().clone()
    with pytest.raises(KeyError), mean.shown():
        assert torch.allclose(model.weight, first + 0.9) and torch.equal(mean.named()["weight"], model.weight)
        raise KeyError
    assert torch.equal(model.weight, own) and where == [p.data_ptr() for p in model.parameters()]
    mean.update(10**6)
    assert torch.allclose(mean.weights[0], first + 0.9 + 0.01 * 0.1)


def test_the_work_that_is_recorded_for_micro_batches_is_the_eager_step():
    "Without a graph: what would be captured is run each time."
    results = []
    for recorded in (False, True):
        model, _, halves = parts_of((45, 33, 20), 2)
        step = TrainStep(model, torch.optim.AdamW(model.parameters(), lr=1e-3), clip=1.0, mode="eager")
        if recorded:
            step.mode, step._replay, step._record_update = "graph", lambda batch, work, *given: work(batch, *given), step._update_parts
        results.append(([step(*halves).item() for _ in range(4)], [p.detach() for p in model.parameters()], [l.item() for l in step.losses]))
    (a, weights, parts), (b, others, again) = results
    assert torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-5) and torch.allclose(torch.tensor(parts), torch.tensor(again), rtol=1e-5)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(weights, others))


@pytest.mark.skipif(INTERPRET, reason="recording needs a CUDA device")
@pytest.mark.parametrize("pad", [False, True], ids=["as they are", "padded"])
def test_recorded_micro_batches_follow_eager_ones(pad):
    losses = {}
    for mode in ("eager", "graph"):
        model, _, halves = parts_of((300, 45, 200), 2, pad)
        losses[mode], _, step = updated(model, halves, mode, times=6)
    assert torch.allclose(losses["eager"], losses["graph"], rtol=1e-4) and set(step.recordings) > {"update"}
    with pytest.raises(ValueError, match="always one or always several"): step(halves[0])


@pytest.mark.skipif(INTERPRET, reason="recording needs a CUDA device")
def test_recorded_micro_batches_with_a_loss_that_is_not_finite_change_nothing():
    model, _, halves = parts_of((300, 45), 1)
    step = updated(model, halves, "graph", times=3)[2]
    before = [p.detach().clone() for p in model.parameters()]
    nan = replace(halves[1], target=halves[1].target * float("nan"))
    assert not step(halves[0], nan).isfinite() and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert step(*halves).isfinite()
