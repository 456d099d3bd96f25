"""Two processes take the steps of one: gradients, losses, files and the moment to stop."""
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from erwin_nsa.data.store import BatchOrder, CloudLoader, CloudSample, Geometry, PreparedClouds
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.fields import VelocityModel
from erwin_nsa.nn.tasks import SurfaceModel, surface_batch
from erwin_nsa.train import distributed as module
from erwin_nsa.train.checkpoint import CheckpointPlan, Stopped, _put_stream, checkpoints, load_checkpoint
from erwin_nsa.train.distributed import Ranks
from erwin_nsa.train.fit import FitConfig, fit
from erwin_nsa.train.log import RunLog, Validation, read_log

TINY = ErwinNSAConfig(c_in=8, c_hidden=8, depth=1, num_heads=2, head_dim=4, local_ball_size=16, compressed_ball_size=8, num_selected_balls=2, mp_steps=1, impl="torch")
SIZES = (40, 12, 33, 20)
needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")


def batches(poison=None):
    draw = torch.Generator().manual_seed(5)
    clouds = [PointBatch.from_clouds([torch.randn(n, 3, generator=draw)]) for n in SIZES]
    return [surface_batch(p, TINY, None, p.pos[:, 0] * (float("nan") if i == poison else 1.0)) for i, p in enumerate(clouds)]


def loader(batch_size, rank=0, world=1):
    clouds = [CloudSample(pos := np.random.default_rng(i).normal(size=(n, 3)).astype(np.float32), None, np.sin(pos), f"cloud{i}") for i, n in enumerate(SIZES)]
    return CloudLoader(PreparedClouds(clouds, Geometry(k=4)), BatchOrder(4, batch_size, seed=3, rank=rank, world=world))


def train(folder=None, world=1, accelerator=None, data=None, make=SurfaceModel, resume=False, on_step=None, **kw):
    "12 steps of two batches each, however many processes share them."
    torch.manual_seed(1 if accelerator is None else accelerator.process_index + 1)        # rank 0 decides
    model = make(TINY)
    if folder is not None: kw |= dict(checkpoint=CheckpointPlan(folder, 3), log=RunLog(folder), validation=Validation(6, lambda model: dict(size=sum(p.abs().sum() for p in model.parameters())), "size"))
    how = FitConfig(**{**dict(steps=12, lr=1e-2, ema=0.9, accumulate=2 // world), **kw.pop("how", {})})
    return model, fit(model, batches() if data is None else data, how, on_step, progress=False, resume=resume, accelerator=accelerator, **kw)


def step_gradient(accelerator=None, world=1):
    "Of one step on the first two batches."
    model, _ = train(None, world, accelerator, data=batches()[:2], how=dict(steps=1, ema=None, clip=None))
    return [p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None]


def caught(kind, work):
    try: work()
    except kind as error: return [type(error).__name__, str(error)]


def in_each_process(folder):
    "What each of two processes does; what it saw goes into a file."
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    rank, said = accelerator.process_index, {}
    raise_on_1 = lambda step, loss: signal.raise_signal(signal.SIGTERM) if rank == 1 and step == 4 else None
    said["gradient"] = step_gradient(accelerator, 2)
    said["whole"] = train(folder / "whole", 2, accelerator)[1]
    said["stream"] = train(folder / "stream", 2, accelerator, data=loader(1, rank, 2), make=VelocityModel, how=dict(accumulate=1))[1]
    said["stopped"] = caught(Stopped, lambda: train(folder / "stopped", 2, accelerator, on_step=raise_on_1))
    said["resumed"] = train(folder / "one", 2, accelerator, resume=True)[1]
    said["nan"] = caught(FloatingPointError, lambda: train(folder / "nan", 2, accelerator, data=batches(poison=2)))
    said["overflow"] = train(None, 2, accelerator, how=dict(numbers="fp16", steps=3))[1]
    said["pieces"] = caught(ValueError, lambda: train(folder / "one", 2, accelerator, resume=True, how=dict(accumulate=2)))
    (folder / f"rank{rank}.json").write_text(json.dumps(said))
    accelerator.end_training()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.raises(KeyboardInterrupt): train(folder / "one", on_step=interrupt(7))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    paths = os.pathsep.join(p for p in (str(Path(__file__).parent), str(Path(module.__file__).parents[2]), os.environ.get("PYTHONPATH")) if p)
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=paths, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    program = f"import pathlib, test_distributed as t; t.in_each_process(pathlib.Path({str(folder)!r}))"
    runs = [subprocess.Popen([sys.executable, "-c", program], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    try: said = [run.communicate(timeout=240) for run in runs]
    finally:
        for run in runs: run.kill()
    assert [run.returncode for run in runs] == [0, 0], said
    return folder, [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)], said


def interrupt(at):
    def on_step(step, loss):
        if step == at: raise KeyboardInterrupt
    return on_step


def close(a, b): return np.allclose(a, b, rtol=2e-4, atol=1e-6)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(folder)[1]


@needs_accelerate
def test_two_ranks_give_the_gradient_of_one(two):
    expected = step_gradient()
    for said in two[1]:
        assert len(said["gradient"]) == len(expected) and all(np.allclose(a, b, atol=1e-6 + 1e-5 * np.abs(a).max()) for a, b in zip(expected, said["gradient"]))


@needs_accelerate
def test_two_ranks_take_the_steps_of_one(two, one):
    folder, (first, second), _ = two
    assert first["whole"] == second["whole"] and close(first["whole"], one[1])
    assert np.allclose([r["loss"] for r in read_log(folder / "whole" / "log.csv")], one[1], rtol=2e-4)
    a, b = load_checkpoint(folder / "whole"), load_checkpoint(one[0])
    assert a.fit["accumulate"] == 1 and b.fit["accumulate"] == 2 and a.per_step == b.per_step == 2 and len(a.others) == 1 and not b.others
    for name in b.average: assert torch.allclose(a.average[name], b.average[name], rtol=1e-3, atol=1e-4), name
    assert sorted(p.stem for p in (folder / "whole").iterdir()) == ["best", "log", "step-12", "step-9"]


@needs_accelerate
def test_ranks_with_loaders_of_their_shares_take_the_steps_of_one(two):
    alone = train(data=loader(2), make=VelocityModel, how=dict(accumulate=1))[1]
    assert two[1][0]["stream"] == two[1][1]["stream"] and close(two[1][0]["stream"], alone)


@needs_accelerate
def test_a_signal_to_one_stops_all_and_one_process_goes_on(two, one):
    folder, said, (out, _) = two
    assert [s["stopped"] for s in said] == [["Stopped", "143"]] * 2 and load_checkpoint(folder / "stopped").step in (5, 6)
    assert out[1].count("SIGTERM: stopped after step") == 1                      # rank 0 speaks, though rank 1 was asked
    again = train(folder / "stopped", resume=True)[1]
    assert close(again, one[1]) and [row["step"] for row in read_log(folder / "stopped" / "log.csv")] == list(range(1, 13))


@needs_accelerate
def test_two_processes_go_on_where_one_was(two, one):
    folder, said, _ = two
    assert said[0]["resumed"] == said[1]["resumed"] and said[0]["resumed"][:6] == one[1][:6] and close(said[0]["resumed"], one[1])
    assert all(s["pieces"][0] == "ValueError" and "a step takes 2 in the checkpoint and 4 here" in s["pieces"][1] for s in said)


@needs_accelerate
def test_a_loss_that_is_not_finite_stops_all_and_names_the_batch_of_whoever_had_it(two):
    folder, said, _ = two
    first, second = [s["nan"][1].split(" The state")[0] for s in said]
    assert first == second
    assert "batch 2 (PointBatch" in said[0]["nan"][1] and "batch 1" not in said[0]["nan"][1]
    path, = (folder / "nan").glob("nonfinite-*")
    assert load_checkpoint(path).note["batch"] == 2


@needs_accelerate
def test_half_precision_is_the_same_on_all(two):
    assert two[1][0]["overflow"] == two[1][1]["overflow"] and np.isfinite(two[1][0]["overflow"]).all()


@pytest.mark.parametrize("saved, batch_size, world, expected", [((0, 1, 2), 2, 1, (0, 2)), ((0, 2, 1), 1, 2, (0, 1)), ((1, 1, 2), 2, 1, (1, 2)), ((0, 3, 1), 1, 2, (0, 1)), ((2, 1, 2), 1, 2, (2, 1))])
def test_the_position_of_a_loader_moves_between_numbers_of_processes(saved, batch_size, world, expected, capfd):
    epoch, position, before = saved
    stream = loader(batch_size, 0, world)
    _put_stream(stream, {**loader(1, 0, before).state_dict(), "epoch": epoch, "position": position})
    assert (stream.order.epoch, stream.order.position) == expected
    assert ("visited again" in capfd.readouterr().err) == (position * before % world > 0)


def test_the_end_of_an_epoch_for_fewer_is_its_end_for_more():
    clouds = [CloudSample(np.ones((4, 3), np.float32), None, None, f"c{i}") for i in range(5)]
    stream = CloudLoader(PreparedClouds(clouds), BatchOrder(5, world=2))
    _put_stream(stream, dict(epoch=1, position=4, count=5, seed=0, shuffle=True, world=1))       # the fifth cloud sits out
    assert (stream.order.epoch, stream.order.position) == (2, 0)


def test_an_accelerator_with_settings_of_its_own_is_refused():
    given = lambda **kw: SimpleNamespace(**{**dict(process_index=0, num_processes=1, mixed_precision="no", gradient_accumulation_steps=1), **kw})
    assert Ranks(given(mixed_precision="bf16"), "bf16").main
    with pytest.raises(ValueError, match="mixed_precision='fp16' for numbers='bf16'.*do: "): Ranks(given(mixed_precision="fp16"), "bf16")
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2.*set FitConfig.accumulate"): Ranks(given(gradient_accumulation_steps=2))


def test_alone_nobody_is_asked():
    ranks = Ranks()
    ranks.wait()
    assert ranks.gather([1]) == [[1]] and ranks.main and not checkpoints("nowhere")
