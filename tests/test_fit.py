"""The loop trains on any data with any loss, tells what it did, and goes on in the middle of an epoch as if nothing had happened."""
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from erwin_nsa.data.store import BatchOrder, CloudLoader, CloudSample, Geometry, CloudStore, PreparedClouds, write_clouds
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.fields import VelocityModel
from erwin_nsa.nn.tasks import PointwiseMLP, SurfaceModel, surface_batch
from erwin_nsa.train import fit as module
from erwin_nsa.train.checkpoint import CheckpointPlan, Stopped, best_checkpoints, checkpoints, fingerprint, load_checkpoint, load_model
from erwin_nsa.train.fit import FitConfig, fit, make_optimizer
from erwin_nsa.train.log import RunLog, Validation, read_log
from erwin_nsa.train.step import mean_square

TINY = ErwinNSAConfig(c_in=8, c_hidden=8, depth=1, num_heads=2, head_dim=4, local_ball_size=16, compressed_ball_size=8, num_selected_balls=2, mp_steps=1, impl="torch")
HOW = FitConfig(steps=12, lr=1e-2, warmup=3, ema=0.9)
SIZES = (20, 33, 17, 24, 40, 28, 19)


def sample(i, n):
    pos = np.random.default_rng(i).normal(size=(n, 3)).astype(np.float32)
    return CloudSample(pos, None, np.sin(pos), f"cloud{i}", constants=dict(age=i))


def loader(batch_size=2, clouds=None, geometry=Geometry(k=4), **kw):
    clouds = [sample(i, n) for i, n in enumerate(SIZES)] if clouds is None else clouds
    return CloudLoader(PreparedClouds(clouds, geometry), BatchOrder(len(clouds), batch_size, seed=3, **kw))


OTHER, = loader(2, [sample(i, 30) for i in (50, 51)], shuffle=False)


def measure(model): return dict(mse=mean_square(model, OTHER), worst=(model(OTHER) - OTHER.target).abs().max())


def train(folder=None, resume=False, on_step=None, how=HOW, batches=None, every=3, seed=1, logged=True, **kw):
    torch.manual_seed(seed)
    model = VelocityModel(TINY)
    if folder is not None: kw |= dict(checkpoint=CheckpointPlan(folder, every), log=RunLog(folder) if logged else None)
    return model, fit(model, loader() if batches is None else batches, how, on_step, progress=False, resume=resume, validation=Validation(5, measure, "mse"), **kw)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def curve(folder): # rows without the time
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_log(folder / "log.csv")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(folder)


def test_old_calls_are_the_loop_that_you_would_write():
    draw = torch.Generator().manual_seed(5)
    batches = [surface_batch(p, TINY, None, p.pos[:, 0]) for p in [PointBatch.from_clouds([torch.randn(n, 3, generator=draw)]) for n in (40, 24, 33)]]
    torch.manual_seed(0)
    model = SurfaceModel(TINY)
    losses = fit(model, batches, FitConfig(8, lr=1e-2), progress=False)
    torch.manual_seed(0)
    other, how, order, queue, expected = SurfaceModel(TINY), FitConfig(8, lr=1e-2), torch.Generator().manual_seed(0), [], []
    optimizer, ready = make_optimizer(other, how), [other.prepare(b) for b in batches]
    for step in range(8):
        queue = queue or torch.randperm(3, generator=order).tolist()
        for group in optimizer.param_groups: group["lr"] = how.learning_rate(step)
        batch = ready[queue.pop()]
        optimizer.zero_grad()
        loss = (other(batch) - batch.target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses == expected and same(model, other)


def test_a_loader_gives_its_batches_in_its_order_epoch_after_epoch(whole):
    batches, stream, seen = [], loader(), []
    while len(batches) < 12: batches += stream
    def loss(model, batch):
        seen.append(batch.target)
        return mean_square(model, batch)
    torch.manual_seed(1)
    assert fit(VelocityModel(TINY), loader(), HOW, progress=False, loss=loss) == whole[2]
    assert len(seen) == 12 and all(torch.equal(a, b.target) for a, b in zip(seen, batches))


SCRIPT = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
import test_fit as t
def on_step(step, loss):
    if step == 10: os.kill(os.getpid(), signal.SIGKILL)
t.train(Path(sys.argv[1]), on_step=on_step)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_in_the_middle_of_an_epoch_it_goes_on_to_the_last_bit(tmp_path, whole):
    folder, model, losses = whole
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(p for p in (str(Path(module.__file__).parents[2]), os.environ.get("PYTHONPATH")) if p))
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(tmp_path)], env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.stem for p in checkpoints(tmp_path)] == ["step-9", "step-6"] and [row["step"] for row in curve(tmp_path)] == list(range(1, 11))
    assert (load_checkpoint(tmp_path).stream["epoch"], load_checkpoint(tmp_path).stream["position"]) == (2, 2)          # four batches an epoch
    again, resumed = train(tmp_path, resume=True, seed=99)
    assert resumed == losses and same(again, model) and curve(tmp_path) == curve(folder)
    assert load_checkpoint(tmp_path).history == load_checkpoint(folder).history
    assert load_checkpoint(best_checkpoints(tmp_path)[0]).note == load_checkpoint(best_checkpoints(folder)[0]).note


def test_log_and_history_say_what_was_measured(whole):
    folder, model, losses = whole
    rows = curve(folder)
    assert [row["loss"] for row in rows] == losses and [row["lr"] for row in rows] == [HOW.learning_rate(s) for s in range(12)]
    measured = [dict(step=row["step"], mse=row["mse"], worst=row["worst"]) for row in rows if "mse" in row]
    assert measured == load_checkpoint(folder).history and [m["step"] for m in measured] == [5, 10, 12]
    path, = best_checkpoints(folder)
    best = min(measured, key=lambda m: m["mse"])
    assert load_checkpoint(path).note["measured"] == {"mse": best["mse"], "worst": best["worst"]} and load_checkpoint(path).note["step"] == best["step"]
    with torch.no_grad(): assert float(measure(load_model(path))["mse"]) == best["mse"]
    assert load_checkpoint(folder).step == 12                                     # the best is never the newest


def test_sigterm_puts_a_validation_off_until_it_goes_on(tmp_path, whole):
    folder, model, losses = whole
    with pytest.raises(Stopped): train(tmp_path, on_step=lambda step, loss: signal.raise_signal(signal.SIGTERM) if step == 4 else None)
    assert load_checkpoint(tmp_path).step == 5 and load_checkpoint(tmp_path).history == []
    again, resumed = train(tmp_path, resume=True)
    assert resumed == losses and same(again, model) and curve(tmp_path) == curve(folder)


def test_validation_changes_no_bit_of_the_training(whole):
    torch.manual_seed(1)
    model = VelocityModel(TINY)
    assert fit(model, loader(), HOW, progress=False) == whole[2] and same(model, whole[1])


def test_a_best_file_of_another_training_is_not_taken(tmp_path):
    train(tmp_path)
    for path in checkpoints(tmp_path): path.unlink()
    with pytest.raises(ValueError, match="which holds best"): train(tmp_path, logged=False)
    with pytest.raises(ValueError, match="fit.lr is 0.01"): train(tmp_path, resume=True, how=replace(HOW, lr=1e-3))
    assert len(best_checkpoints(tmp_path)) == 1


def test_nan_is_never_the_best(tmp_path):
    values = iter([math.nan, 2.0, 3.0])
    torch.manual_seed(0)
    fit(PointwiseMLP(8, 8), loader(clouds=[replace(sample(i, 20), target=sample(i, 20).target[:, :1]) for i in range(3)]), FitConfig(3), progress=False,
        checkpoint=CheckpointPlan(tmp_path), validation=Validation(1, lambda model: dict(mse=next(values)), "mse"))
    assert load_checkpoint(best_checkpoints(tmp_path)[0]).note["value"] == 2.0


def test_a_loss_that_is_not_finite_names_its_clouds(tmp_path):
    bad = [sample(i, n) for i, n in enumerate(SIZES)]
    object.__setattr__(bad[3], "target", bad[3].target * np.nan)
    with pytest.raises(FloatingPointError, match=r"at step \d+, clouds cloud\d, cloud\d; needed: .*The state is saved in") as error: train(tmp_path, batches=loader(clouds=bad))
    path, = tmp_path.glob("nonfinite-*")
    assert "cloud3" in load_checkpoint(path).note["batch"] and "cloud3" in str(error.value)
    with pytest.raises(FloatingPointError, match="clouds cloud3; needed"): train(batches=loader(1, bad), how=replace(HOW, accumulate=7))
    with pytest.raises(FloatingPointError, match=r"batch 1 \(PointBatch.*clouds cloud\d"): train(batches=sorted(loader(clouds=bad), key=lambda b: "cloud3" in b.ids)[-2:])


@pytest.mark.parametrize("many", [False, True], ids=["list", "loader"])
def test_accumulated_batches_are_one(many):
    clouds = [sample(i, 24) for i in range(6)]
    def losses(batch_size, accumulate):
        stream = loader(batch_size, clouds)
        return train(batches=stream if many else [next(iter(loader(batch_size, clouds, shuffle=False)))] * 3, how=replace(HOW, accumulate=accumulate))[1]
    if many: assert np.allclose(losses(2, 1), losses(1, 2), rtol=1e-4)
    else: assert np.allclose(losses(2, 1), losses(2, 3), rtol=1e-4)
    assert not np.allclose(losses(2, 1), losses(1, 1), rtol=1e-2)


def test_decay_of_everything():
    torch.manual_seed(0)
    model = nn.LayerNorm(4)
    with torch.no_grad(): model.weight.add_(torch.randn(4))
    moved = {}
    for everything in (False, True):
        layer = nn.LayerNorm(4)
        layer.load_state_dict(model.state_dict())
        optimizer = make_optimizer(layer, FitConfig(1, lr=0.1, weight_decay=0.5, decay_all=everything))
        layer.weight.grad, layer.bias.grad = torch.zeros(4), torch.zeros(4)
        optimizer.step()
        moved[everything] = layer.weight.detach()
    assert torch.equal(moved[False], model.weight) and torch.allclose(moved[True], model.weight * 0.95)


def test_config_refuses_what_does_not_fit():
    for bad, says in ((dict(accumulate=0), "accumulate=0"), (dict(ema=1.0), "ema=1.0"), (dict(accumulate=1.5, ema=-1), "accumulate=1.5 and ema=-1")):
        with pytest.raises(ValueError, match=f"given: {says}; needed: .*; do: "): FitConfig(1, **bad)
    with pytest.raises(ValueError, match="rank=accelerator.process_index"): train(batches=loader(rank=1, world=2))


def test_a_log_is_not_overwritten_and_any_batch_will_do(tmp_path):
    once = lambda: fit(nn.Linear(3, 1), [torch.ones(2, 3)], FitConfig(1), progress=False, loss=lambda model, batch: model(batch).mean(), log=RunLog(tmp_path))
    once()
    with pytest.raises(ValueError, match="pass resume=True to fit"): once()
    assert len(curve(tmp_path)) == 1


def test_fingerprint_of_a_loader_reads_what_decides(tmp_path):
    clouds = [sample(i, n) for i, n in enumerate(SIZES)]
    path = write_clouds(tmp_path / "c.h5", clouds, attributes=dict(generator="test", parameters="none", seed=0, units="none", licence="none"))
    store = CloudStore(path)
    assert fingerprint(loader(clouds=store)) == fingerprint(loader(1, CloudStore(path)))
    changed = [loader(clouds=[*clouds[:-1], replace(clouds[-1], **{name: value})])
               for name, value in dict(kind=np.zeros(19, np.int64), x=clouds[-1].pos, edge_index=np.zeros((2, 1), np.int64), constants=dict(age=7)).items()]
    prints = [fingerprint(l) for l in (loader(), loader(clouds=store), loader(clouds=clouds[::-1]), loader(geometry=Geometry(k=5)), loader(shuffle=False), *changed)]
    assert len(set(prints)) == len(prints)
    batch = next(iter(loader()))
    others = [replace(batch, kind=torch.zeros(len(batch.target), dtype=torch.long)), replace(batch, constants=dict(age=batch.constants["age"] + 1)), replace(batch, ids=("a", "b")),
              replace(batch, points=batch.points.with_x(batch.target)), replace(batch, edge_index=batch.edge_index.flip(0))]
    assert len({fingerprint([b]) for b in (batch, *others)}) == 6


def test_trackers_are_refused_where_their_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="needed: the package accelerate; do: pip install"): RunLog(tmp_path, ("tensorboard",)).open(0, False, {})
    RunLog(tmp_path / "b").open(0, False, {}).close()
