"""A batch padded to round sizes trains like the batch itself, through the kernels (interpreted where there is no GPU)."""
import pytest
import torch

from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.kernels.env import INTERPRET
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.erwin import ErwinConfig
from erwin_nsa.nn.tasks import SurfaceModel, surface_batch
from erwin_nsa.train.step import TrainStep, capturable_adamw, mean_square, set_learning_rate, shared_shapes, signature, to_device

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
