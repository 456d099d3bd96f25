"""A training in the background: what is known of it, how it pauses, stops, fails and goes on, and what is drawn of it."""
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from erwin_nsa.data.bodies import load_bodies
from erwin_nsa.data.surfaces import Normalizer
from erwin_nsa.explore import monitor as module
from erwin_nsa.explore.monitor import (HELD_OUT, HeldOut, MonitorConfig, MonitorState, MonitorView, TrainingMonitor, body_figure, body_limits, curves_figure,
                                       drawn_points, explain, gates_figure, look, memory_now, pace_figure, rate, repaint, status)
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.config import BRANCHES, ErwinNSAConfig
from erwin_nsa.nn.tasks import PointwiseMLP, SurfaceModel, surface_batch
from erwin_nsa.train import log
from erwin_nsa.train.checkpoint import CheckpointPlan, checkpoints, load_checkpoint, newest_checkpoint
from erwin_nsa.train.fit import FitConfig, fit
from erwin_nsa.train.log import Validation, read_log
from erwin_nsa.train.step import mean_square

TINY = ErwinNSAConfig(c_in=8, c_hidden=8, depth=2, num_heads=2, head_dim=4, local_ball_size=16, compressed_ball_size=8, num_selected_balls=2, mp_steps=1, impl="torch")
BODIES = load_bodies()[:4]
NORMALIZER = Normalizer.fit(BODIES[:3])
HOW = FitConfig(steps=20, lr=1e-2, warmup=3)
LOOK = MonitorConfig(every=5, save=6, points=100, refresh=0.05)


def batch(body, config=TINY, every=28):
    pos = torch.from_numpy(NORMALIZER.encode_pos(body.pos[::every])).float()
    return surface_batch(PointBatch.from_clouds([pos]), config, None, torch.from_numpy(NORMALIZER.encode_pressure(body.pressure[::every])).float())


TRAIN = [batch(b) for b in BODIES[:3]]
HELD = HeldOut(batch(BODIES[3]), BODIES[3].name, BODIES[3].unit, NORMALIZER.decode_pressure)


def new(seed=0, config=TINY):
    torch.manual_seed(seed)
    return SurfaceModel(config)


def watched(folder, seed=0, how=HOW, held_out=HELD, config=LOOK, model=None, batches=TRAIN, **options):
    return TrainingMonitor(new(seed) if model is None else model, batches, how, folder, held_out, config, **options)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def ours():
    return [t.name for t in threading.enumerate() if t.name.startswith("erwin_nsa")]


@pytest.fixture(scope="module")
def whole():
    "An ordinary training, without a monitor."
    model = new()
    return model, fit(model, TRAIN, HOW, progress=False)


@pytest.fixture(autouse=True)
def nobody_left():
    yield
    assert ours() == []


# ---------------------------------------------------------------- what is known
def test_watched_training_is_the_ordinary_one_and_its_state_holds_every_step(tmp_path, whole):
    seen = []
    monitor = watched(tmp_path, on_step=lambda step, loss: seen.append((step, loss))).start()
    assert monitor.result() == whole[1] and same(monitor.model, whole[0])
    state = monitor.snapshot()
    assert seen == list(enumerate(whole[1]))
    assert (state.phase, state.step, state.checkpoint) == ("done", 20, "step-20")
    assert [s for s, _ in state.clock] == [s for s, _ in state.memory] == list(range(1, 21))
    assert all(b > a for (_, a), (_, b) in zip(state.clock, state.clock[1:])) and 0.01 < state.memory[0][1] < 1000
    assert [row["step"] for row in state.validations] == [s for s, _ in state.gates][1:] == [5, 10, 15, 20]
    assert [{k: v for k, v in row.items() if k in ("step", HELD_OUT)} for row in read_log(tmp_path / "log.csv") if HELD_OUT in row] == state.validations
    assert rate(state.clock) == pytest.approx(19 / (state.clock[-1][1] - state.clock[0][1]))


def test_predictions_gates_and_error_are_those_of_the_model_at_that_step(tmp_path):
    monitor = watched(tmp_path, config=MonitorConfig(every=5, save=5, keep=9)).start()
    monitor.wait()
    state, seen = monitor.snapshot(), new()
    for row in state.validations:
        seen.load_state_dict(load_checkpoint(next(p for p in checkpoints(tmp_path) if p.stem == f"step-{row['step']}")).weights)
        records = []
        with torch.no_grad(): predicted = seen.eval()(HELD.batch, records=records)
        by_hand = [[float(np.mean([r["gates"][s, i, h] for s in r["frame"].mask.nonzero()[:, 0] for h in range(2)])) for i in range(3)] for r in records]
        np.testing.assert_allclose(dict(state.gates)[row["step"]], by_hand, rtol=1e-6)
        assert row[HELD_OUT] == float((predicted - HELD.batch.target).square().mean())
    assert state.predicted_at == 20 and np.array_equal(state.prediction, NORMALIZER.decode_pressure(predicted.numpy()))
    np.testing.assert_allclose(HELD.truth, BODIES[3].pressure[::28], rtol=1e-5, atol=1e-5)


def test_gates_leave_padding_out_and_say_which_branch_is_missing(tmp_path):
    config = ErwinNSAConfig(**{**vars(TINY), "branches": ("selected", "local")})
    odd = batch(BODIES[0], config, 37)                                            # 97 points, so that the last ball is padded
    model, records = new(0, config).eval(), []
    for block in model.backbone.blocks: torch.nn.init.normal_(block.attention.gate.weight)
    with torch.no_grad(): model(odd, records=records)
    assert not records[0]["frame"].mask.all()
    _, gates = look(model, odd)
    assert np.isnan(gates[:, 0]).all() and np.isfinite(gates[:, 1:]).all()
    for record, row in zip(records, gates):
        real, every = record["gates"][record["frame"].mask].mean((0, 2)), record["gates"].mean((0, 2))
        np.testing.assert_allclose(row[1:], real[1:], rtol=1e-5)
        assert not np.allclose(row[1:], every[1:], rtol=1e-5)
    titles = [a.text for a in gates_figure(MonitorState(1, gates=[(0, gates)])).layout.annotations]
    assert "not in this model" in titles[0] and not any("not in" in t for t in titles[1:])


def test_a_model_without_gates_and_a_training_without_a_cloud_are_watched_too(tmp_path):
    torch.manual_seed(0)
    monitor = watched(tmp_path / "a", model=PointwiseMLP(8, 8)).start()
    monitor.wait()
    assert monitor.snapshot().gates == [] and monitor.snapshot().predicted_at == 20 and {*monitor.figures()} == {"loss", "speed", "cloud"}
    bare = watched(tmp_path / "b", held_out=None).start()
    bare.wait()
    assert bare.snapshot().validations == [] and {*bare.figures()} == {"loss", "speed"}


def test_own_validation_and_loss_are_used_and_the_cloud_is_looked_at_beside_them(tmp_path):
    measure = lambda model: dict(worst=(model(TRAIN[0]) - TRAIN[0].target).abs().max())
    loss = lambda model, batch: (model(batch) - batch.target).abs().mean()
    monitor = watched(tmp_path, validation=Validation(8, measure, "worst"), loss=loss).start()
    losses = monitor.result()
    other = new()
    assert fit(other, TRAIN, HOW, progress=False, loss=loss) == losses and same(other, monitor.model)
    state = monitor.snapshot()
    assert [row["step"] for row in state.validations] == [s for s, _ in state.gates][1:] == [8, 16, 20]
    with torch.no_grad(): assert state.validations[-1]["worst"] == float(measure(other.eval())["worst"])


# ---------------------------------------------------------------- pause, stop, go on
def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.01)


def test_pause_holds_the_next_step_and_the_clock(tmp_path, whole, monkeypatch):
    now = [0.0]
    def tick():
        now[0] += 0.01
        return now[0]
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=tick))
    monitor = watched(tmp_path, on_step=lambda step, loss: monitor.pause() if step == 7 else None).start()
    until(lambda: monitor.snapshot().phase == "paused")
    now[0] += 1000
    assert monitor.wait(timeout=0.2) is False
    assert monitor.snapshot().step == 8 and "paused at step 8 of 20" in repr(monitor)
    monitor.go_on()
    assert monitor.result() == whole[1] and same(monitor.model, whole[0])
    assert now[0] > 1000 and monitor.snapshot().clock[-1][1] < 10


@pytest.mark.parametrize("at", [0, 5, 12])
def test_stopped_it_goes_on_in_a_new_model_to_the_last_bit(tmp_path, whole, at):
    monitor = watched(tmp_path, on_step=lambda step, loss: monitor.stop() if step == at else None).start()
    assert monitor.wait() is True and monitor.result() == whole[1][:at + 1]
    state = monitor.snapshot()
    assert (state.phase, state.step, state.checkpoint) == ("stopped", at + 1, f"step-{at + 1}")
    assert same(monitor.model, new_from(newest_checkpoint(tmp_path)))
    again = watched(tmp_path, seed=99).start(resume=True)
    assert again.result() == whole[1] and same(again.model, whole[0])
    rows = again.snapshot().validations
    assert [row["step"] for row in rows] == [5, 10, 15, 20] and [row["step"] for row in read_log(tmp_path / "log.csv")] == list(range(1, 21))
    plain = new(99)
    assert fit(plain, TRAIN, HOW, progress=False, checkpoint=CheckpointPlan(tmp_path), resume=True) == whole[1] and same(plain, whole[0])


def new_from(checkpoint):
    model = new(5)
    model.load_state_dict(checkpoint.weights)
    return model


def test_stop_while_paused_and_continue_on_the_same_monitor(tmp_path, whole):
    monitor = watched(tmp_path, on_step=lambda step, loss: monitor.pause() if step == 3 else None).start()
    until(lambda: monitor.snapshot().phase == "paused")
    monitor.stop()
    monitor.wait()
    assert repr(monitor) == "stopped at step 4 of 20, checkpoint step-4; Continue goes on from there"
    monitor.go_on()
    assert monitor.result() == whole[1] and same(monitor.model, whole[0])
    assert [s for s, _ in monitor.snapshot().clock] == list(range(1, 21))
    with pytest.raises(ValueError, match="given: a training that is done"): monitor.go_on()


def test_mean_of_the_weights_survives_a_stop(tmp_path):
    how = FitConfig(steps=12, lr=1e-2, ema=0.9)
    plain = new()
    losses = fit(plain, TRAIN, how, progress=False)
    monitor = watched(tmp_path, how=how, on_step=lambda step, loss: monitor.stop() if step in (4, 11) else None).start()
    monitor.wait()
    monitor.go_on()
    assert monitor.result() == losses and same(monitor.model, plain) and monitor.snapshot().phase == "done"       # asked to stop in the very last step


def test_a_borrowed_model_stands_still_and_is_given_back_as_it_was(tmp_path, whole):
    monitor = watched(tmp_path).start()
    with monitor.borrow() as model:
        step = monitor.snapshot().step
        before = {name: t.clone() for name, t in model.state_dict().items()}
        assert not model.training and len(monitor.snapshot().losses) == step
        time.sleep(0.1)
        monitor.go_on()                                                          # somebody presses Continue: the loan counts more
        time.sleep(0.1)
        assert monitor.snapshot().step == step and all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert monitor.result() == whole[1] and same(monitor.model, whole[0])
    with monitor.borrow() as model: assert model is monitor.model                 # nobody trains: nothing to wait for


def test_a_kernel_that_ends_leaves_a_checkpoint_of_the_last_step(tmp_path, whole):
    program = ("import sys; sys.path[:0] = [sys.argv[1]]\nimport test_monitor as t, time\n"
               "m = t.watched(sys.argv[2], on_step=lambda step, loss: time.sleep(0.05)).start()\n"
               "t.until(lambda: m.snapshot().step >= 2)\n")
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(p for p in (str(Path(module.__file__).parents[2]), os.environ.get("PYTHONPATH")) if p))
    done = subprocess.run([sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = newest_checkpoint(tmp_path)
    assert 2 <= found.step < 20 and found.losses == whole[1][:found.step]
    again = watched(tmp_path, seed=7).start(resume=True)
    assert again.result() == whole[1] and same(again.model, whole[0])


# ---------------------------------------------------------------- failures
def test_a_loss_that_is_not_finite_is_told_in_words_and_raised(tmp_path):
    bad = batch(BODIES[1])
    bad.target[3] = math.nan
    monitor = watched(tmp_path, batches=[TRAIN[0], bad]).start()
    for ask in (monitor.wait, monitor.result):
        with pytest.raises(FloatingPointError, match="loss is nan"): ask()
    state = monitor.snapshot()
    assert state.phase == "failed" and state.message["needed"] == "a finite loss" and "loss is nan at step" in state.message["given"] and state.message["do"].startswith("Lower lr")


def test_a_full_disk_is_told_and_the_training_goes_on_once_there_is_room(tmp_path, whole):
    full = [True]
    def on_step(step, loss):
        if step == 14 and full[0]: raise OSError(28, "No space left on device")
    monitor = watched(tmp_path, on_step=on_step).start()
    with pytest.raises(OSError, match="No space left"): monitor.wait()
    state = monitor.snapshot()
    assert state.checkpoint == "step-12" and str(tmp_path) in state.message["needed"] and "continue from step-12" in state.message["do"]
    assert status(state) == "failed at step 15 of 20, checkpoint step-12"
    full[0] = False
    monitor.go_on()
    assert monitor.result() == whole[1] and same(monitor.model, whole[0]) and monitor.snapshot().message is None
    assert [s for s, _ in monitor.snapshot().clock] == list(range(1, 21)) and [row["step"] for row in monitor.snapshot().validations] == [5, 10, 15, 20]


def test_failures_of_measuring_of_used_folders_and_of_misuse(tmp_path):
    def measure(model): raise KeyError("pressure")
    broken = watched(tmp_path / "a", validation=Validation(2, measure, "x")).start()
    with pytest.raises(KeyError, match="pressure"): broken.wait()
    assert broken.snapshot().message["given"] == "KeyError: 'pressure'" and not broken.snapshot().active
    with pytest.raises(ValueError, match="without a checkpoint"): broken.go_on()
    used = watched(tmp_path / "b").start()
    with pytest.raises(ValueError, match="given: a training that runs"): used.start()
    used.wait()
    other = watched(tmp_path / "b").start()
    with pytest.raises(ValueError, match="a folder without checkpoints"): other.wait()
    assert "resume=True" in other.snapshot().message["do"]
    with pytest.raises(ValueError, match="call start"): watched(tmp_path / "c").wait()
    with pytest.raises(ValueError, match="options \\['accelerator'\\]"): watched(tmp_path / "c", accelerator=1)
    with pytest.raises(ValueError, match="every=0 and save=2.5"): MonitorConfig(every=0, save=2.5)
    two = surface_batch(PointBatch.from_clouds([torch.rand(20, 3), torch.rand(30, 3)]), TINY)
    with pytest.raises(ValueError, match="2 clouds and a batch without target"): HeldOut(two)


@pytest.mark.parametrize("error, part", [(MemoryError(), "smaller batches"), (RuntimeError("odd"), "result()"), (ValueError("given: a; needed: b; do: c"), "c")])
def test_every_error_gets_all_three_parts(error, part):
    told = explain(error, "there", "step-4")
    assert list(told) == ["given", "needed", "do"] and part in told["do"] and all(told.values())


# ---------------------------------------------------------------- pictures
@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    monitor = watched(tmp_path_factory.mktemp("ended")).start()
    monitor.wait()
    return monitor.snapshot()


def test_curves_and_gates_are_the_numbers_of_the_state(ended):
    pytest.importorskip("plotly")
    curves = curves_figure(ended)
    assert curves.layout.yaxis.type == "log" and list(curves.data[0].y) == ended.losses and list(curves.data[0].x) == list(range(1, 21))
    assert (list(curves.data[2].x), list(curves.data[2].y)) == ([5, 10, 15, 20], [row[HELD_OUT] for row in ended.validations])
    gates = gates_figure(ended)
    assert len(gates.data) == 6 and list(gates.data[0].x) == [0, 5, 10, 15, 20]
    for i in range(3):
        for block in range(2): assert list(gates.data[2 * i + block].y) == [g[block, i] for _, g in ended.gates]
    assert [a.text for a in gates.layout.annotations] == [f"<b>{b}</b>" for b in BRANCHES]
    assert list(pace_figure(ended).data[1].y) == [m for _, m in ended.memory]


def test_the_cloud_is_drawn_with_limits_of_the_truth_and_at_most_so_many_points(ended):
    pytest.importorskip("plotly")
    fig, truth = body_figure(ended, HELD, LOOK), HELD.truth
    ids = drawn_points(len(truth), 100)
    assert len(truth) == 128 and len({*ids}) == 100 and "100 of 128 points drawn" in fig.layout.title.text and "20 steps" in fig.layout.title.text
    for trace, values in zip(fig.data, (ended.prediction, truth, ended.prediction - truth)): np.testing.assert_allclose(trace.marker.color, values[ids], rtol=1e-5, atol=1e-6)
    assert [t.marker.coloraxis for t in fig.data] == ["coloraxis", "coloraxis", "coloraxis2"]
    (low, high), most = body_limits(truth)
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (low, high) == (float(truth.min()), float(truth.max()))
    assert fig.layout.coloraxis2.cmax == -fig.layout.coloraxis2.cmin == most > 0
    early = ended.copy()
    early.prediction = ended.prediction * 3
    later = body_figure(early, HELD, LOOK).layout
    assert (later.coloraxis.cmin, later.coloraxis.cmax, later.coloraxis2.cmax) == (low, high, most)
    assert body_figure(MonitorState(3), HELD) is None


def test_a_picture_is_updated_not_replaced(ended):
    pytest.importorskip("plotly")
    early = ended.copy()
    early.rewind(10, ended.losses[:10], ended.validations[:0])
    early.prediction, early.predicted_at = ended.prediction * 0, 10
    for draw in (curves_figure, gates_figure, pace_figure, lambda s: body_figure(s, HELD, LOOK)):
        shown, fresh = draw(early), draw(ended)
        traces = shown.data
        repaint(shown, fresh)
        assert all(a is b for a, b in zip(traces, shown.data)) and shown.to_dict()["data"] is not None
        for a, b in zip(shown.data, fresh.data, strict=True):
            assert np.array_equal(a.x, b.x) and np.array_equal(a.y, b.y) and a.name == b.name
            if b.type == "scatter3d": assert np.array_equal(a.marker.color, b.marker.color)
        assert shown.layout.title.text == fresh.layout.title.text


def test_dark_figures_are_dark(ended):
    pytest.importorskip("plotly")
    assert {f.layout.paper_bgcolor for f in (curves_figure(ended, MonitorConfig(theme="dark")), body_figure(ended, HELD, MonitorConfig(theme="dark")))} == {module.THEMES["dark"]["paper"]}


# ---------------------------------------------------------------- the view
def test_buttons_pause_stop_and_continue_and_pictures_follow(tmp_path, whole):
    pytest.importorskip("anywidget")
    pytest.importorskip("ipywidgets")
    pytest.importorskip("plotly")
    monitor = watched(tmp_path, on_step=lambda step, loss: view.turn.click() if step == 6 else None)
    view = monitor.view = MonitorView(monitor)
    view.paint()
    assert view.turn.disabled and view.halt.disabled and "ready: 20 steps to go" in view.status.value
    monitor.start()
    until(lambda: "paused at step 7" in view.status.value and view.turn.description == "Continue")
    chart, cloud = view.charts["loss"], view.charts["cloud"]
    until(lambda: len(chart.data[0].y) == 7)
    assert "after 5 steps" in cloud.layout.title.text
    view.halt.click()
    monitor.wait()
    assert "stopped at step 7" in view.status.value and view.turn.description == "Continue" and not view.turn.disabled and view.halt.disabled
    view.turn.click()
    until(lambda: monitor.snapshot().step > 7 or monitor.snapshot().phase == "done")
    assert monitor.result() == whole[1] and same(monitor.model, whole[0])
    assert view.charts["loss"] is chart and view.charts["cloud"] is cloud and {type(c).__name__ for c in view.charts.values()} == {"FigureWidget"}
    assert {name: place.children for name, place in view.places.items()} == {name: (view.charts[name],) for name in ("loss", "gates", "speed", "cloud")}
    assert list(chart.data[0].y) == whole[1] and "after 20 steps" in cloud.layout.title.text
    np.testing.assert_allclose(cloud.data[0].marker.color, monitor.snapshot().prediction[drawn_points(128, 100)], rtol=1e-5)
    assert view.turn.disabled and view.halt.disabled and view.message.value == ""
    view.refresh.value = 0.2
    assert view.box.children[0].children[2] is view.refresh
    monitor.close()
    assert monitor.view is None and view.closed


def test_a_failure_is_a_message_in_the_view(tmp_path):
    pytest.importorskip("ipywidgets")
    def on_step(step, loss): raise ValueError("given: <b>; needed: c; do: d")
    monitor = watched(tmp_path, on_step=on_step)
    view = monitor.view = MonitorView(monitor)
    monitor.start()
    with pytest.raises(ValueError): monitor.wait()
    assert 'role="alert"' in view.message.value and "&lt;b&gt;" in view.message.value and "Traceback" not in view.message.value
    assert "failed at step 1 of 20" in view.status.value and view.turn.disabled
    monitor.close()


def test_closing_the_view_leaves_the_training_alone(tmp_path, whole):
    pytest.importorskip("ipywidgets")
    monitor = watched(tmp_path, on_step=lambda step, loss: monitor.close() if step == 8 else None)
    monitor.view = MonitorView(monitor)
    monitor.start()
    assert monitor.result() == whole[1] and monitor.snapshot().phase == "done"


def test_without_a_figure_widget_the_loss_is_a_drawing(tmp_path, monkeypatch):
    pytest.importorskip("ipywidgets")
    go = pytest.importorskip("plotly.graph_objects")
    def missing(fig): raise ImportError("Please install anywidget to use the FigureWidget class")
    monkeypatch.setattr(go, "FigureWidget", missing)
    monitor = watched(tmp_path)
    view = monitor.view = MonitorView(monitor)
    monitor.start()
    monitor.wait()
    drawn, = view.places["loss"].children
    assert {*view.charts} == {"loss"} and drawn.value.startswith("<svg") and HELD_OUT in drawn.value
    monitor.close()


def test_without_widgets_it_is_lines_of_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monitor = watched(tmp_path).start()
    assert monitor.show() is None
    monitor.wait()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("done: 20 steps in ") and lines[-1].endswith("checkpoint step-20") and 2 <= len(lines) <= 7


def test_memory_is_that_of_the_process():
    before = memory_now(torch.device("cpu"))
    if math.isnan(before): pytest.skip("no /proc here")
    kept = np.ones(2**25)                                                         # 256 MiB
    assert memory_now(torch.device("cpu")) - before == pytest.approx(0.25, abs=0.05) and kept[-1] == 1


def test_work_of_the_notebook_changes_no_bit_of_the_training(tmp_path, whole):
    monitor = watched(tmp_path).start()
    beside = new(3)
    with torch.no_grad():
        while monitor.snapshot().active: mean_square(beside, TRAIN[0])
    assert monitor.result() == whole[1] and same(monitor.model, whole[0])
