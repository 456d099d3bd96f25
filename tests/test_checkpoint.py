"""A training that was cut off goes on to the last bit, and no file that is not whole, or of another training, is ever used."""
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.erwin import ErwinConfig
from erwin_nsa.nn.tasks import PointwiseMLP, SurfaceModel, surface_batch
from erwin_nsa.train import checkpoint as module
from erwin_nsa.train.checkpoint import (CheckpointPlan, DamagedCheckpoint, FitState, Stopped, checkpoints, default_suffix, load_checkpoint, load_model,
                                        newest_checkpoint, restore, save_checkpoint)
from erwin_nsa.train.fit import FitConfig, fit
from erwin_nsa.train.step import set_learning_rate

TINY = ErwinNSAConfig(c_in=8, c_hidden=8, depth=1, num_heads=2, head_dim=4, local_ball_size=16, compressed_ball_size=8, num_selected_balls=2, mp_steps=1, impl="torch")
ERWIN = ErwinConfig(8, 8, enc_depths=(1, 1), enc_num_heads=(2, 2), dec_depths=(1,), dec_num_heads=(2,), strides=(2,), ball_sizes=(16, 8), mp_steps=1,
                    pool_norm="batch", impl="torch")
HOW = FitConfig(steps=12, lr=1e-2, warmup=3, clip=1.0)
SUFFIXES = [".pt", pytest.param(".safetensors", marks=pytest.mark.skipif(default_suffix() == ".pt", reason="safetensors is not installed"))]


class Dropping(SurfaceModel):
    "Draws random numbers in every step."
    def forward(self, batch): return nn.functional.dropout(super().forward(batch), 0.2, self.training)


def data(config=TINY):
    draw = torch.Generator().manual_seed(5)
    clouds = [PointBatch.from_clouds([torch.randn(n, 3, generator=draw)]) for n in (40, 24, 33, 20, 48)]
    return [surface_batch(p, config, p.pos / p.pos.norm(dim=1, keepdim=True), p.pos[:, 0] * p.pos[:, 1]) for p in clouds]


def train(folder, resume=False, on_step=None, make=lambda: SurfaceModel(TINY), config=TINY, how=HOW, batches=None, every=3, keep=2, seed=1):
    torch.manual_seed(seed)
    model = make()
    plan = None if folder is None else CheckpointPlan(folder, every, keep)
    return model, fit(model, data(config) if batches is None else batches, how, on_step, progress=False, checkpoint=plan, resume=resume)


def fail_at(at):
    def on_step(step, loss):
        if step == at: raise KeyboardInterrupt
    return on_step


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def names(folder): return [p.stem for p in checkpoints(folder)]


@pytest.mark.parametrize("at", [3, 7])
@pytest.mark.parametrize("make, config", [(lambda: SurfaceModel(TINY), TINY), (lambda: SurfaceModel(ERWIN, use_normals=True), ERWIN), (lambda: Dropping(TINY), TINY)],
                         ids=["Erwin NSA", "Erwin, batch norm", "dropout"])
def test_resumed_training_is_the_uninterrupted_one(tmp_path, make, config, at):
    whole, losses = train(None, make=make, config=config)
    with pytest.raises(KeyboardInterrupt): train(tmp_path, on_step=fail_at(at), make=make, config=config)
    seen = []
    again, resumed = train(tmp_path, resume=True, on_step=lambda step, loss: seen.append(step), make=make, config=config, seed=99)
    assert resumed == losses and len(set(losses)) == 12
    assert same(whole, again)
    assert seen == list(range(at // 3 * 3, 12))


@pytest.mark.parametrize("options", [dict(ema=0.9, accumulate=2), dict(numbers="fp16", lr=0.1)], ids=["mean of weights, two batches", "half precision"])
def test_what_else_a_training_keeps_is_resumed(tmp_path, options):
    how, large = replace(HOW, **options), [replace(b, target=b.target * 30) for b in data()]          # in half precision the first steps overflow
    whole, losses = train(None, how=how, batches=large)
    with pytest.raises(KeyboardInterrupt): train(tmp_path, on_step=fail_at(7), how=how, batches=large)
    found = load_checkpoint(tmp_path)
    if "ema" in options: assert set(found.average) == {name for name, _ in whole.named_parameters()} and not torch.equal(found.average["head.2.bias"], found.weights["head.2.bias"])
    else: assert found.scaler["scale"] < 65536
    again, resumed = train(tmp_path, resume=True, how=how, batches=large, seed=99)
    assert resumed == losses and same(whole, again)
    assert same(load_model(tmp_path), whole)
    with pytest.raises(ValueError, match="fit.(ema|numbers) is"): train(tmp_path, resume=True, batches=large)


def as_format_1(path):
    "What the first version wrote: no parts of later ones, no options that it did not have."
    tensors, text = module.read_whole(path)
    text = {name: value for name, value in text.items() if name not in ("history", "per_step", "stream")} | dict(format=1)
    text["parts"] = {name: part for name, part in text["parts"].items() if name not in ("average", "scaler", "others")}
    text["fit"] = {name: value for name, value in text["fit"].items() if name not in ("accumulate", "ema", "decay_all")}
    module.write_whole(path, tensors, json.dumps(text))


def test_files_of_the_first_version_are_read(tmp_path):
    with pytest.raises(KeyboardInterrupt): train(tmp_path, on_step=fail_at(4))
    before = load_checkpoint(tmp_path)
    as_format_1(before.path)
    found = load_checkpoint(tmp_path)
    assert (found.step, found.losses, found.history, found.average) == (before.step, before.losses, [], None)
    assert all(torch.equal(found.weights[name], t) for name, t in load_model(tmp_path).state_dict().items())
    with pytest.raises(ValueError, match="did not read the edges") as refusal: train(tmp_path, resume=True)
    assert "fit." not in str(refusal.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_both_formats_resume(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(module, "default_suffix", lambda: suffix)
    whole, losses = train(None)
    with pytest.raises(KeyboardInterrupt): train(tmp_path, on_step=fail_at(7))
    assert [p.name for p in checkpoints(tmp_path)] == [f"step-6{suffix}", f"step-3{suffix}"]
    again, resumed = train(tmp_path, resume=True)
    assert resumed == losses and same(whole, again)


def test_saving_changes_nothing_and_a_finished_training_stays(tmp_path):
    whole, losses = train(None)
    saved, with_plan = train(tmp_path, every=1)
    assert with_plan == losses and same(whole, saved)
    before = [p.stat().st_mtime_ns for p in checkpoints(tmp_path)]
    again, resumed = train(tmp_path, resume=True)
    assert resumed == losses and same(whole, again) and [p.stat().st_mtime_ns for p in checkpoints(tmp_path)] == before


SCRIPT = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import test_checkpoint as t
from erwin_nsa.train import checkpoint
folder, word = sys.argv[1:]
def on_step(step, loss):
    if word == "kill" and step == 7: os.kill(os.getpid(), signal.SIGKILL)
    if word == "wait" and step == 4: print("step 4", flush=True); sys.stdin.readline()
if word == "kill in write": checkpoint.os.replace = lambda a, b: b.name.startswith("step-9") and os.kill(os.getpid(), signal.SIGKILL) or os.rename(a, b)
t.train(folder, on_step=on_step)
print("ended", flush=True)
"""


def start(folder, word):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(p for p in (str(Path(module.__file__).parents[2]), os.environ.get("PYTHONPATH")) if p))
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(folder), word], env=env, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("word, left", [("kill", ["step-6", "step-3"]), ("kill in write", ["step-6", "step-3"])])
def test_killed_process_resumes_to_the_same_curve(tmp_path, word, left):
    process = start(tmp_path, word)
    out, err = process.communicate(timeout=150)
    assert process.returncode == -signal.SIGKILL and "ended" not in out, err
    assert names(tmp_path) == left
    assert bool(list(tmp_path.glob(".*.part"))) == (word == "kill in write")
    again, resumed = train(tmp_path, resume=True)
    whole, losses = train(None)
    assert resumed == losses and same(whole, again)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.name != "posix", reason="needs SIGTERM")
def test_sigterm_ends_the_step_saves_and_says_so(tmp_path):
    process = start(tmp_path, "wait")
    assert process.stdout.readline() == "step 4\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate("\n", timeout=150)
    assert process.returncode == 143 and "ended" not in out, err
    assert "SIGTERM: stopped after step 5 of 12" in err and "resume=True" in err
    assert names(tmp_path) == ["step-5", "step-3"]
    again, resumed = train(tmp_path, resume=True)
    whole, losses = train(None)
    assert resumed == losses and same(whole, again)


def test_signal_handler_is_given_back(tmp_path):
    heard = []
    own = lambda *_: heard.append(1)
    before = signal.signal(signal.SIGTERM, own)
    try:
        with pytest.raises(Stopped): train(tmp_path / "a", on_step=lambda step, loss: signal.raise_signal(signal.SIGTERM) if step == 11 else None)
        assert signal.getsignal(signal.SIGTERM) is own and names(tmp_path / "a")[0] == "step-12"
        with pytest.raises(KeyboardInterrupt): train(tmp_path / "b", on_step=fail_at(1))
        assert signal.getsignal(signal.SIGTERM) is own
        train(None, on_step=lambda step, loss: signal.raise_signal(signal.SIGTERM) if step == 2 else None)       # no plan: the signal is not ours
        assert heard == [1]
    finally: signal.signal(signal.SIGTERM, before)


def test_a_signal_during_the_last_lines_still_stops(tmp_path, monkeypatch):
    save = module.Keeper.save

    def late(self):
        save(self)
        if self.state.step == 12: signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(module.Keeper, "save", late)
    with pytest.raises(Stopped): train(tmp_path)
    assert names(tmp_path) == ["step-12", "step-9"]


def test_other_threads_train_without_a_handler(tmp_path):
    before, done = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: done.append((train(tmp_path)[1], signal.getsignal(signal.SIGTERM))))
    thread.start()
    thread.join()
    assert len(done[0][0]) == 12 and done[0][1] is before and names(tmp_path) == ["step-12", "step-9"]


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "empty": content = b""
    elif how == "cut": content = content[:-1]
    elif how == "half": content = content[:len(content) // 2]
    else:                                                     # in the middle of the largest tensor: a file has gaps where a bit means nothing
        stored = max(load_checkpoint(path).weights.values(), key=lambda t: t.nbytes).numpy().tobytes()
        content[content.index(stored) + len(stored) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", ["empty", "half", "cut", "bit"])
def test_damaged_newest_file_is_passed_over(tmp_path, monkeypatch, capfd, suffix, how):
    monkeypatch.setattr(module, "default_suffix", lambda: suffix)
    with pytest.raises(KeyboardInterrupt): train(tmp_path, on_step=fail_at(7))
    newest = checkpoints(tmp_path)[0]
    damage(newest, how)
    with pytest.raises(DamagedCheckpoint, match=r"given: .*step-6.*; needed: .*; do: "): load_checkpoint(newest)
    assert newest_checkpoint(tmp_path).step == 3
    again, resumed = train(tmp_path, resume=True)
    err = capfd.readouterr().err
    assert "passed over" in err and "step-6" in err and "going on from" in err and "step 3" in err
    whole, losses = train(None)
    assert resumed == losses and same(whole, again)
    assert names(tmp_path) == ["step-12", "step-9"] and load_checkpoint(tmp_path).step == 12


def test_with_no_whole_file_training_starts_at_the_beginning(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt): train(tmp_path, on_step=fail_at(4))
    damage(checkpoints(tmp_path)[0], "half")
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="without a whole checkpoint"): load_checkpoint(tmp_path)
    assert train(tmp_path, resume=True)[1] == train(None)[1]
    assert "starting at step 0" in capfd.readouterr().err


def test_another_training_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt): train(tmp_path, on_step=fail_at(4))
    others = dict(
        width=(dict(make=lambda: SurfaceModel(replace(TINY, num_heads=1))), "num_heads is 2 in the checkpoint and 1 here"),
        backbone=(dict(make=lambda: SurfaceModel(ERWIN), config=ERWIN), "'ErwinNSAConfig' in the checkpoint and 'ErwinConfig' here"),
        kind=(dict(make=lambda: PointwiseMLP(8, 8)), "kind is 'SurfaceModel' in the checkpoint and 'PointwiseMLP' here"),
        rate=(dict(how=replace(HOW, lr=1e-3)), "fit.lr is 0.01 in the checkpoint and 0.001 here"),
        steps=(dict(how=replace(HOW, steps=20)), "fit.steps is 12"),
        order=(dict(batches=data()[::-1]), "the data are others"),
        target=(dict(batches=[replace(b, target=b.target * 1.001) for b in data()]), "the data are others"),
        edges=(dict(batches=[surface_batch(b.points, TINY, b.normal, b.target, k=4) for b in data()]), "the data are others"),
        other_edges=(dict(batches=[replace(b, edge_index=b.edge_index.flip(0)) for b in data()]), "the data are others"),
        decay=(dict(how=replace(HOW, decay_all=True)), "fit.decay_all is False in the checkpoint and True here"),
        accumulate=(dict(how=replace(HOW, accumulate=2)), "a step takes 1 in the checkpoint and 2 here"))
    kept = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for name, (changes, says) in others.items():
        with pytest.raises(ValueError, match="given: .*; needed: .*; do: ") as refusal: train(tmp_path, resume=True, **changes)
        assert says in str(refusal.value), name
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == kept


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt): train(tmp_path, on_step=fail_at(4))
    model = SurfaceModel(TINY)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="the data are others"): fit(model, data()[1:], HOW, progress=False, checkpoint=CheckpointPlan(tmp_path), resume=True)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_model_that_cannot_describe_itself_is_compared_by_its_weights(tmp_path):
    with pytest.raises(KeyboardInterrupt): train(tmp_path, on_step=fail_at(4), make=lambda: Dropping(TINY))
    with pytest.raises(ValueError, match=r"weights.*in the checkpoint"): train(tmp_path, resume=True, make=lambda: Dropping(replace(TINY, mlp_ratio=2)))


def test_checkpoints_are_not_overwritten_by_a_new_training(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match="which holds step-12.*resume=True"): train(tmp_path)
    with pytest.raises(ValueError, match="resume=True without checkpoint"): train(None, resume=True)
    for bad in (dict(every=0), dict(keep=0), dict(every=2.5)):
        with pytest.raises(ValueError, match="an integer of at least 1"): CheckpointPlan(tmp_path, **bad)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch, suffix, broken):
    model = SurfaceModel(TINY)
    optimizer, state = torch.optim.AdamW(model.parameters()), FitState(torch.Generator(), step=1, losses=[1.0])
    path = save_checkpoint(tmp_path / f"last{suffix}", model, optimizer, state, HOW)
    old, state.step = path.read_bytes(), 2

    def no_space(*_): raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(module.os, broken, no_space)
        with pytest.raises(OSError, match="No space"): save_checkpoint(path, model, optimizer, state, HOW)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == [path.name]
    save_checkpoint(path, model, optimizer, state, HOW)
    assert load_checkpoint(path).step == 2 and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("keep, left", [(1, ["step-12"]), (2, ["step-12", "step-9"]), (9, ["step-12", "step-9", "step-6", "step-3"])])
def test_older_checkpoints_are_deleted(tmp_path, keep, left):
    (tmp_path / "step-notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt): train(tmp_path, on_step=fail_at(7), keep=keep)
    train(tmp_path, resume=True, keep=keep)
    assert names(tmp_path) == left and (tmp_path / "step-notes.txt").read_text() == "mine"


def test_nonfinite_loss_saves_its_state_and_is_never_resumed_from(tmp_path):
    batches = data()
    batches[2] = replace(batches[2], target=batches[2].target / 0)
    with pytest.raises(FloatingPointError, match=r"batch 2 .*The state is saved in .*nonfinite-") as error: train(tmp_path, batches=batches, every=1)
    path, = tmp_path.glob("nonfinite-*")
    found = load_checkpoint(path)
    assert found.note["batch"] == 2 and found.note["nonfinite"] and path.stem == f"nonfinite-{found.note['step']}" and f"at step {found.step}," in str(error.value)
    model = load_model(path)
    assert not model(batches[2]).sub(batches[2].target).square().mean().isfinite() and model(batches[2]).isfinite().all()
    if found.step: assert load_checkpoint(tmp_path).step == found.step and not load_checkpoint(tmp_path).note
    with pytest.raises(FloatingPointError, match="batch 2"): train(None, batches=batches)


@pytest.mark.parametrize("make, config", [(lambda: SurfaceModel(TINY, use_normals=True), TINY), (lambda: SurfaceModel(ERWIN), ERWIN),
                                          (lambda: PointwiseMLP(8, 12, use_normals=True), TINY)], ids=["Erwin NSA", "Erwin", "pointwise"])
def test_load_model_builds_what_was_trained(tmp_path, make, config):
    model, _ = train(tmp_path, make=make, config=config, how=replace(HOW, steps=3))
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) and same(model, loaded) and not loaded.training
    batch = data(config)[0]
    assert torch.equal(loaded(batch), model.eval()(batch))
    if hasattr(model, "backbone"): assert loaded.backbone.config == config


def test_state_moves_to_an_optimizer_with_other_options(tmp_path):
    "As from a CPU to a GPU: fused, its learning rate a tensor, which stays one."
    def made(fused):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        return model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), fused=True) if fused else torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer, times):
        for i in range(times):
            set_learning_rate(optimizer, 0.1 / (i + 1))
            optimizer.zero_grad()
            model(torch.arange(12.0).view(4, 3)).square().mean().backward()
            optimizer.step()
    for before, after in ((False, True), (True, False)):
        model, optimizer = made(before)
        step(model, optimizer, 3)
        found = load_checkpoint(save_checkpoint(tmp_path / "last", model, optimizer, FitState(torch.Generator()), HOW))
        step(model, optimizer, 3)
        other, moved = made(after)
        restore(found, other, moved, FitState(torch.Generator()))
        assert isinstance(moved.param_groups[0]["lr"], torch.Tensor) == after
        step(other, moved, 3)
        assert torch.allclose(other.weight, model.weight, atol=1e-5)
        restore(found, other, moved, FitState(torch.Generator()))      # a checkpoint is not used up
        step(other, moved, 3)
        assert torch.allclose(other.weight, model.weight, atol=1e-5)


def test_tied_weights_and_other_optimizers_survive(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    found = load_checkpoint(save_checkpoint(tmp_path / "own", model, optimizer, FitState(torch.Generator()), HOW))
    assert torch.equal(found.weights["1.weight"], model[0].weight)
    other = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    other.load_state_dict(found.optimizer)
    assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in zip(other.state.values(), optimizer.state.values()))
    with pytest.raises(ValueError, match="build the model"): load_model(found.path)
