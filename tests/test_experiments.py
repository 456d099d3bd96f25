"""Experiments end to end: presets against the printed tables, words, data that stay apart, runs that are killed, tables that two processes write."""
import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from erwin_nsa.data.bodies import find_sample
from erwin_nsa.data.cosmology import HaloScale
from erwin_nsa.data.generate import RECIPES, find_recipe, generate
from erwin_nsa.data.store import CloudSample, CloudStore, write_clouds
from erwin_nsa.data.surfaces import Normalizer
from erwin_nsa.geometry.partitions import OF_BONDS, PARTITIONS, partition_tree
from erwin_nsa.nn.config import BRANCHES, ErwinNSAConfig
from erwin_nsa.nn.erwin import build_trees
from erwin_nsa.nn.model import ErwinNSA
from erwin_nsa.train import results
from erwin_nsa.train.cli import main
from erwin_nsa.train.experiments import (EXPERIMENTS, MODELS, VARIANTS, Experiment, Measure, batches_of, changes_of, find_data, folder_name, make_model, open_parts,
                                         own_trees, preset, ready_batches, run_experiment, runs_of, times_of, training_batches, words_of)
from erwin_nsa.train.log import read_log
from erwin_nsa.train.step import Preparing

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CASES = [(name, model) for name in EXPERIMENTS for model in MODELS]


# presets

def test_presets_are_table_3():
    "Table 3: local ball, compressed ball, selected balls, steps, depth, width; both models run equally long at batch size 1."
    printed = dict(shapenet_car=(128, 32, 16, 80_000, 6, 64), cosmology=(128, 32, 16, 10_000, 4, 64), molecular_dynamics=(32, 32, 16, 90_000, 2, 128))
    for name, row in printed.items():
        e = preset(name, size="paper")
        c = e.config
        assert (c.local_ball_size, c.compressed_ball_size, c.num_selected_balls, e.fit.steps, c.depth, c.c_hidden) == row
        assert (c.num_heads, c.num_kv_heads, c.width, c.rotate, c.mp_steps, c.mlp_ratio) == (16, 1, 16, 45, 3, 4)
        assert e.batch_size == 1 and e.data == "original"
        assert preset(name, "erwin", "paper").fit == e.fit


def test_erwin_presets_are_the_small_models():
    blocks, widths = dict(shapenet_car=18, cosmology=18, molecular_dynamics=22), dict(shapenet_car=(64, 64), cosmology=(32, 64, 128, 256), molecular_dynamics=(16, 32, 64, 128, 256))
    for name in EXPERIMENTS:
        c = preset(name, "erwin", "paper").config
        assert (sum(c.enc_depths) + sum(c.dec_depths), c.widths) == (blocks[name], widths[name])


def test_table_4_changes_batch_size_and_steps():
    printed = dict(shapenet_car=(2, 1000), cosmology=(16, 5000), molecular_dynamics=(32, 50_000))
    for name, row in printed.items():
        e = preset(name, "erwin", "paper", "table_4")
        assert (e.batch_size, e.fit.steps) == row and e.stream


@pytest.mark.parametrize("size", ["lease", "paper"])
def test_training_is_the_published_one(size):
    rates = dict(shapenet_car=(1e-3, 5e-5), cosmology=(5e-4, 1e-6), molecular_dynamics=(5e-4, 1e-7))
    for name, model in CASES:
        how = preset(name, model, size).fit
        assert (how.learning_rate(0), how.learning_rate(how.steps - 1)) == pytest.approx(rates[name])
        assert (how.weight_decay, how.decay_all, how.warmup, how.clip, how.numbers) == (.01, True, 0, None, "tf32")


def test_graphs_are_the_published_ones():
    "8 neighbours with the point itself, 10 without, bonds both ways."
    edges = {name: batches_of(e := preset(name), open_parts(e).train)[0] for name in EXPERIMENTS}
    for name, k, own in (("shapenet_car", 8, True), ("cosmology", 10, False)):
        source, target = edges[name].edge_index
        assert torch.equal(target.bincount(), torch.full((256,), k))
        assert int((source == target).sum()) == 256 * own
    source, target = edges["molecular_dynamics"].edge_index
    pairs = set(zip(source.tolist(), target.tolist()))
    assert len(pairs) == 2 * (len(edges["molecular_dynamics"].points.pos) - 1) and all((b, a) in pairs and a != b for a, b in pairs)


def test_every_variant_builds_and_differs():
    for name, model in CASES:
        plain = preset(name, model, "lease")
        for variant, v in VARIANTS.items():
            if v.of(model, name) is None:
                with pytest.raises(ValueError, match="given: variant"): preset(name, model, "lease", variant)
                continue
            e = preset(name, model, "lease", variant)
            same = e.config == plain.config and e.batch_size == plain.batch_size
            assert same == (variant == "default" or (name, variant) in {("molecular_dynamics", "m_32")}), (name, model, variant)
            assert Experiment.from_dict(json.loads(json.dumps(e.to_dict()))) == e
            assert v.says


def test_matched_variants_match():
    from erwin_nsa.nn.erwin import backbone
    count = lambda name, model, variant="default": sum(p.numel() for p in backbone(preset(name, model, "lease", variant).config).parameters())
    for name in EXPERIMENTS:
        for model, other in (MODELS, MODELS[::-1]):
            assert count(name, model, "parameters_matched") == pytest.approx(count(name, other), rel=.05)
        c = preset(name, "erwin", "lease").config
        assert preset(name, "erwin_nsa", "lease", "depth_matched").config.depth == sum(c.enc_depths) + sum(c.dec_depths)


def test_a_branch_that_is_out_is_not_run(monkeypatch):
    "Neither its operator nor its parameters."
    import erwin_nsa.nn.nsa as nsa
    called = []
    for name in ("compressed_attention", "select_balls", "selected_attention", "local_attention"):
        monkeypatch.setattr(nsa, name, lambda *a, _f=getattr(nsa, name), _n=name, **k: called.append(_n) or _f(*a, **k))
    needs = dict(compressed={"compressed_attention"}, selected={"select_balls", "selected_attention"}, local={"local_attention"})
    for on in (("local",), ("selected", "local"), ("compressed", "selected"), BRANCHES):
        called.clear()
        model = ErwinNSA(ErwinNSAConfig(c_in=4, c_hidden=16, depth=1, local_ball_size=16, compressed_ball_size=8, num_selected_balls=2, mp_steps=0, branches=on))
        model(torch.randn(40, 4), torch.rand(40, 3)).square().sum().backward()
        assert set(called) == set().union(*(needs[b] for b in on))
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert (model.blocks[0].attention.sigma is not None) == ("local" in on) and (model.blocks[0].attention.phi_v is not None) == ("compressed" in on)


# words

def test_words_are_typed_by_the_fields():
    e, = runs_of("experiment=shapenet_car model=erwin_nsa fit.lr=1e-2 fit.steps=7 model.head_dim=none model.memory=false model.gate_init=0,0,1.5 points=99 stream=true".split())
    assert (e.fit.lr, e.fit.steps, e.config.head_dim, e.config.memory, e.config.gate_init, e.points, e.stream) == (.01, 7, None, False, (0., 0., 1.5), 99, True)
    assert runs_of(words_of(e)) == [e]
    e, = runs_of("experiment=cosmology model=erwin size=lease model.enc_depths=1,1,1,1 model.sigma_init=none".split())
    assert e.config.enc_depths == (1, 1, 1, 1) and e.config.sigma_init is None


def test_commas_make_several_runs():
    runs = runs_of(["experiment=cosmology,shapenet_car", "seed=0,1,2", "model=erwin,erwin_nsa"])
    assert len(runs) == 12 and len({folder_name(e) for e in runs}) == 12
    assert all(e.fit.seed == e.seed for e in runs)


@pytest.mark.parametrize("words, says", [
    ("experiment=shapenet-car", "did you mean 'shapenet_car'"), ("experiment=cosmology size=leese", "did you mean 'lease'"), ("experiment=cosmology model=ervin", "did you mean 'erwin'"),
    ("experiment=cosmology variant=k8", "did you mean 'k_8'"), ("experiment=cosmology fit.step=3", "did you mean fit.steps"), ("experiment=cosmology model.dept=3", "did you mean model.depth"),
    ("experiment=cosmology batchsize=3", "did you mean batch_size"), ("experiment=cosmology fit.steps=3.5", "type int"), ("experiment=cosmology model.memory=yes", "type bool"),
    ("experiment=cosmology train.lr=1", "fit.FIELD"), ("experiment=cosmology seed=a", "type int"), ("experiment=cosmology model.num_heads=0", "num_heads is 0"),
    ("experiment=cosmology model=erwin variant=no_selected", "of erwin"), ("seed=1", "experiment=NAME"), ("experiment=cosmology depth", "name=value"),
    ("experiment=molecular_dynamics points=64", "whole chains"), ("experiment=cosmology partition=hilbrt", "did you mean 'hilbert'"),
    *((f"experiment={name} model={model} partition={p}", "clouds with bonds, as in molecular_dynamics") for name, model in CASES[:4] for p in OF_BONDS),
    *((f"experiment=cosmology model={model} variant=published partition=hilbert", "model.layout=full") for model in MODELS)])
def test_wrong_words_are_refused_with_what_to_do(words, says):
    with pytest.raises(ValueError) as error: runs_of(words.split())
    assert says in str(error.value)


def test_data_that_are_missing_are_refused_with_the_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("ERWIN_NSA_DATA", str(tmp_path))
    for name in EXPERIMENTS:
        with pytest.raises(FileNotFoundError, match="To do it by hand"): find_data(preset(name, size="paper"))
        with pytest.raises(FileNotFoundError, match="erwin-nsa data generate"): find_data(preset(name, size="lease"))
    with pytest.raises(FileNotFoundError, match="expected a file, or a folder"): find_data(replace(preset("cosmology"), data=str(tmp_path)))


# partitions

def test_partition_is_a_word_and_the_ball_tree_the_default():
    runs = runs_of("experiment=molecular_dynamics model=erwin,erwin_nsa partition=ball_tree,segments".split())
    assert [(e.model, e.partition) for e in runs] == [(m, p) for m in ("erwin", "erwin_nsa") for p in ("ball_tree", "segments")]
    assert len({folder_name(e) for e in runs}) == 4 and all(runs_of(words_of(e)) == [e] for e in runs)
    assert runs[0] == preset("molecular_dynamics", "erwin") and changes_of(runs[1]) == ["partition=segments"]
    old = runs[0].to_dict()
    del old["partition"]                                       # as it was written before there was a choice
    assert Experiment.from_dict(old) == runs[0]


def wanted_order(e, batch):
    "(S,) point of each slot and (V, S) views of the first level, by the partition itself."
    how, c = (dict(edge_index=batch.edge_index) if e.partition in OF_BONDS else {}), e.config
    if e.model == "erwin_nsa": tree = partition_tree(batch.points, e.partition, c.ball_sizes, c.rotate, **how)
    else: tree = build_trees(batch.points, c, partition_tree(batch.points, e.partition, c.tree_ball_sizes, 0, **how), e.partition).points
    return [tree.points_of(v) for v in (0, 1)]


def shown_order(geometry):
    frames = geometry.frames
    back = [torch.arange(len(geometry.order)), *(f.perm for f in frames[1:])]
    return [geometry.order[view].masked_fill(~frames[0].mask, -1) for view in back]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name, partition", [("cosmology", "hilbert"), ("cosmology", "balanced_kmeans"), ("shapenet_car", "morton"), ("molecular_dynamics", "segments"),
                                             ("molecular_dynamics", "graph_clusters"), ("molecular_dynamics", "ball_tree")])
def test_every_way_to_the_model_has_the_partition(name, partition, model):
    "Kept batches, streamed batches and those of a large test: the same geometry, and it is the one asked for."
    e, = runs_of(f"experiment={name} model={model} partition={partition} train_clouds=2 val_clouds=2 batch_size=2".split())
    parts, net = open_parts(e), make_model(e)
    raw = batches_of(e, parts.val)[0]
    kept, = ready_batches(e, parts, "val", net)
    stream = training_batches(replace(e, stream=True), replace(parts, train=parts.val), net)
    stream.order.shuffle = False
    streamed, = map(Preparing(net, "eager"), stream)
    large, = Measure(e, parts, "val", keep=0).batches(net)
    for batch in (kept, streamed, large):
        for mine, wanted in zip(shown_order(batch.geometry), wanted_order(e, raw)): assert torch.equal(mine, wanted)
        assert torch.equal(net(batch), net(kept))


@pytest.mark.parametrize("model", MODELS)
def test_a_run_with_a_partition(model, tmp_path):
    e, = runs_of(f"experiment=molecular_dynamics model={model} partition=segments fit.steps=3 validate=3".split())
    rows = [run_experiment(replace(e, stream=stream), tmp_path / str(stream), device="cpu", progress=False) for stream in (False, True)]
    assert [r.variant for r in rows] == ["default partition=segments"] * 2 and json.loads(rows[0].config)["partition"] == "segments"
    assert np.isfinite([r.test_mse for r in rows]).all() and runs_of(rows[0].command.split()[2:]) == [e]


# data

@pytest.mark.parametrize("name", EXPERIMENTS)
def test_splits_have_no_cloud_in_common(name):
    parts = open_parts(replace(preset(name), train_clouds=None, val_clouds=None, test_clouds=None))
    ids = [{s[i].id.split(":")[0] for i in range(len(s))} for s in (parts.train, parts.val, parts.test)]
    assert all(ids) and not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
    assert [set(parts.members[s]) for s in ("train", "val", "test")] == ids
    with pytest.raises(ValueError, match="separate splits"): replace(parts, members=dict(parts.members, test=[*ids[2], min(ids[0])]))


def test_constants_come_from_training_clouds_alone():
    "Other test clouds, equal constants; other training clouds, other constants."
    e = replace(preset("cosmology"), train_clouds=8)
    scale = open_parts(e).scale
    assert open_parts(replace(e, val_clouds=1, test_clouds=1)).scale == scale != open_parts(replace(e, train_clouds=7)).scale
    raw = np.concatenate([c.target for c in list(CloudStore(find_sample("cosmology.h5"), "train"))[:8]]).astype(np.float64)
    np.testing.assert_allclose(scale.vel_std, raw.std(0), rtol=1e-6)


@pytest.mark.parametrize("name, maker, constants", [("cosmology", "erwin_nsa.data.cosmology.convert_halos", dict(scale=HaloScale.published().to_dict())),
                                                    ("shapenet_car", "erwin_nsa.data.shapenet.convert", dict(normalizer=Normalizer.shapenet_car().to_dict()))])
def test_converted_original_data_keep_the_published_constants(name, maker, constants, tmp_path, monkeypatch):
    "Files in the form of the converters, made of random clouds: found below the data root, never normalised anew."
    monkeypatch.setenv("ERWIN_NSA_DATA", str(tmp_path))
    (tmp_path / name).mkdir()
    rng, width = np.random.default_rng(0), 3 if name == "cosmology" else 1
    clouds = [CloudSample(rng.uniform(0, 4, (64, 3)), None, rng.normal(5, 9, (64, width)), f"c{i}") for i in range(6)]
    about = dict(generator=maker, parameters={}, seed=0, units=dict(pos="x"), licence="none", **constants)
    write_clouds(tmp_path / name / f"{name}.h5", clouds, attributes=about, split=["train", "train", "train", "val", "test", "test"])
    e = replace(preset(name, size="paper"), config=preset(name).config, workers=0, validate=2, fit=replace(preset(name).fit, steps=3))
    parts = open_parts(e)
    assert parts.scale == (HaloScale.published() if name == "cosmology" else Normalizer.shapenet_car()) and parts.name in ("Quijote halos", "ShapeNet-Car")
    row = run_experiment(e, tmp_path / "run", device="cpu", progress=False)
    assert row.clouds == "3 1 2" and row.size == "paper" and np.isfinite(row.test_mse) and row.best_step in (2, 3)


def test_recipes_share_no_seed():
    for name in RECIPES:
        jobs = [j for size in RECIPES[name] for j in find_recipe(name, size)]
        assert len({j.seed for j in jobs}) == len(jobs)
        assert {j.split for j in find_recipe(name, "lease")} == {"train", "val", "test"}


def test_generated_data_do_not_depend_on_workers_and_train(tmp_path):
    one, two = generate("bodies", tmp_path / "1", "tiny", progress=False), generate("bodies", tmp_path / "2", "tiny", workers=2, progress=False)
    assert one.read_bytes() == two.read_bytes()
    e = replace(preset("shapenet_car"), data=str(tmp_path / "1"), points=None, fit=replace(preset("shapenet_car").fit, steps=2), validate=2)
    row = run_experiment(e, tmp_path / "run", device="cpu", progress=False)
    size, = {len(c) for c in CloudStore(one)}
    assert row.data == "generated bodies" and row.points == f"{size}-{size}" and row.clouds == "3 1 2"


# runs

@pytest.mark.parametrize("name, model", CASES)
def test_smoke_run(name, model, tmp_path):
    e = replace(preset(name, model), fit=replace(preset(name, model).fit, steps=6), validate=3, save=4)
    row = run_experiment(e, tmp_path / "run", table=tmp_path / "runs.csv", device="cpu", progress=False)
    assert np.isfinite([row.test_mse, row.test_mse_physical, row.validation, row.zero_mse, row.steps_per_s, row.seconds]).all()
    assert (row.test_nll is not None) == (name == "molecular_dynamics") and row.best_step in (3, 6) and row.peak_gib is None
    assert results.read_rows(tmp_path / "runs.csv") == [row]
    assert [point[0] for point in results.read_history(tmp_path / "runs.csv")[row.run]] == [3, 6]
    assert runs_of(row.command.split()[2:]) == [e] == [Experiment.from_dict(json.loads(row.config))]
    assert json.loads(row.parts)["total"] == row.parameters == sum(p.numel() for p in make_model(e).parameters())
    assert {"torch", "erwin_nsa", "python"} <= set(json.loads(row.versions))
    assert 0 < row.forward_ms < row.step_ms and row.prepare_ms > 0 and row.load_ms > 0


def test_timing_leaves_the_model_as_it_was(monkeypatch):
    e = preset("cosmology", "erwin", variant="published")      # with the running means of a batch norm
    parts, net = open_parts(e), make_model(e)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert set(times_of(e, parts, net.eval(), repeats=1)) == {"forward_ms", "step_ms", "prepare_ms", "load_ms"} and not net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    def full(*_): raise torch.OutOfMemoryError("no memory")
    monkeypatch.setattr(type(net), "forward", full)
    found = times_of(e, parts, net, repeats=1)
    assert found["forward_ms"] is found["step_ms"] is None and found["prepare_ms"] > 0


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    loss = lambda e, name: [r["loss"] for r in read_log(tmp_path / name / "log.csv")] if run_experiment(e, tmp_path / name, device="cpu", progress=False) else None
    short = lambda seed: replace(e := preset("cosmology", seed=seed), fit=replace(e.fit, steps=4), validate=4)
    first = loss(short(0), "a")
    assert len(first) == 4 and loss(short(0), "b") == first != loss(short(1), "c")


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_run_goes_on_to_the_last_bit(tmp_path):
    words = "experiment=cosmology fit.steps=120 save=7 validate=11 train_clouds=5 --device cpu --quiet".split()
    log = lambda folder: next((tmp_path / folder).rglob("log.csv"), None)
    command = [sys.executable, "-m", "erwin_nsa.train", *words, "--out", str(tmp_path / "cut"), "--table", str(tmp_path / "cut.csv"), "--resume"]
    process, deadline = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and (log("cut") is None or log("cut").read_text().count("\n") < 24): time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and log("cut") is not None
    assert 20 < len(read_log(log("cut"))) < 120 and not (tmp_path / "cut.csv").exists()
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert main(["train", *command[3:]]) == 0                 # the second time there is nothing left to do
    assert main(["train", *words, "--out", str(tmp_path / "whole"), "--table", str(tmp_path / "whole.csv")]) == 0
    cut, whole = read_log(log("cut")), read_log(log("whole"))
    assert [(r["step"], r["loss"], r["lr"], r.get("mse")) for r in cut] == [(r["step"], r["loss"], r["lr"], r.get("mse")) for r in whole]
    (a,), (b,) = results.read_rows(tmp_path / "cut.csv"), results.read_rows(tmp_path / "whole.csv")
    assert (a.test_mse, a.best_step, a.validation) == (b.test_mse, b.best_step, b.validation)


def test_a_folder_keeps_to_its_run(tmp_path):
    e = replace(preset("cosmology"), fit=replace(preset("cosmology").fit, steps=2), validate=2)
    run_experiment(e, tmp_path / "run", device="cpu", progress=False)
    with pytest.raises(ValueError, match="--resume"): run_experiment(e, tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="fit.steps=3"): run_experiment(replace(e, fit=replace(e.fit, steps=3)), tmp_path / "run", resume=True, device="cpu")
    assert changes_of(e) == ["validate=2", "fit.steps=2"]


# tables

def made_up(name, **changes):
    "A row for tests of the table; no measurement."
    kinds = dict(str="x", int=1, float=.5)
    return results.ResultRow(**{**{f.name: kinds.get(getattr(f.type, "__name__", ""), None) for f in fields(results.ResultRow)}, "run": name, **changes})


def append_many(table, letter):
    for i in range(25): results.append_row(table, made_up(f"{letter}{i}"))


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_two_processes_append_to_one_table(tmp_path):
    "To a table without the newest columns, which one of the two has to write in."
    old_table(tmp_path / "runs.csv")
    both = [multiprocessing.get_context("fork").Process(target=append_many, args=(tmp_path / "runs.csv", letter)) for letter in "ab"]
    for p in both: p.start()
    for p in both: p.join(100)
    assert [p.exitcode for p in both] == [0, 0]
    assert sorted(r.run for r in results.read_rows(tmp_path / "runs.csv")) == sorted(f"{letter}{i}" for letter in "ab" for i in range(25))


def test_rows_come_back_as_they_were_and_once(tmp_path):
    rows = [made_up("a", test_mse=.1 + .2, config='{"a": "b,\\"c\\""}'), made_up("b", peak_gib=1.25, command="line\nbreak")]
    for r in (*rows, rows[0]): results.append_row(tmp_path / "runs.csv", r)
    assert results.read_rows(tmp_path / "runs.csv") == rows


NEWEST = ("forward_ms", "step_ms", "prepare_ms", "load_ms")


def old_table(path, *rows):
    "As it was written before the newest columns."
    names = [f.name for f in fields(results.ResultRow) if f.name not in NEWEST]
    with open(path, "w", newline="") as file: csv.writer(file, lineterminator="\n").writerows([names, *([results._text(getattr(r, n)) for n in names] for r in rows)])


def test_tables_without_the_newest_columns_are_read_and_upgraded(tmp_path):
    table, rows = tmp_path / "runs.csv", [made_up("a"), made_up("b", peak_gib=1.25)]
    old_table(table, *rows)
    before = table.read_bytes()
    assert results.read_rows(table) == rows
    assert not results.append_row(table, rows[0]) and table.read_bytes() == before   # nothing new, nothing touched
    results.append_row(table, new := made_up("c", step_ms=2.5, load_ms=.125))
    assert results.read_rows(table) == [*rows, new] and table.read_text().splitlines()[0].endswith(",".join(NEWEST))
    assert [p.name for p in tmp_path.glob("*.csv")] == ["runs.csv"]


@pytest.mark.parametrize("spoil", [lambda head: head[:-5], lambda head: [*head[:-4], "load_ms"], lambda head: [*head, "more"], lambda head: head[1:]])
def test_tables_with_other_columns_are_refused(tmp_path, spoil):
    table, head = tmp_path / "runs.csv", [f.name for f in fields(results.ResultRow)]
    table.write_text(",".join(spoil(head)) + "\n")
    before = table.read_bytes()
    for use in (lambda: results.read_rows(table), lambda: results.append_row(table, made_up("a"))):
        with pytest.raises(ValueError, match="of erwin_nsa.train.results.ResultRow"): use()
    assert table.read_bytes() == before


def test_times_are_printed_where_there_are_any():
    plain = [made_up("a", experiment="cosmology", model="erwin")]
    assert not set(results.TIMES) & set(results.result_table(plain)[0])
    lines = results.result_table([*plain, made_up("b", experiment="cosmology", model="erwin_nsa", forward_ms=3.)])
    assert [line["forward ms"] for line in lines] == ["-", "3"] and "step ms" not in lines[0]


# comparisons

def lease_rows():
    "A table as a lease fills it, with invented numbers: 3 sets, 2 models, 3 seeds, and some variants of one seed."
    row = lambda name, model, seed, variant="default", **more: made_up(f"{name}-{model}-{variant}-{seed}", experiment=name, model=model, seed=seed, variant=variant, size="lease", steps=3000, **more)
    rows = [row(n, m, s, test_mse=.5 + .1 * s, test_nll=-1. + s if n == "molecular_dynamics" else None, steps_per_s=2., peak_gib=1.) for n, m in CASES for s in range(3)]
    rows += [row("cosmology", "erwin_nsa", s, "selection_ball", test_mse=.3, steps_per_s=4., peak_gib=.5) for s in range(2)]
    return rows + [row("molecular_dynamics", "erwin_nsa", 0, "k_8", test_mse=1.2, test_nll=1., device="another"), row("cosmology", "erwin", 0, "table_4", batch_size=16)]


def test_variants_stand_beside_the_default_of_the_same_work():
    ball, k_8 = results.compare_variants(lease_rows())         # table_4 has another batch size, and no default to stand beside
    assert (ball.row.variant, ball.seeds, ball.default_seeds, ball.speed, ball.memory, ball.nll) == ("selection_ball", 2, 3, 2., .5, ())
    assert ball.errors == pytest.approx((.5, .5)) and ball.band == pytest.approx((.5 / .6, .7 / .6))
    assert (k_8.row.variant, k_8.seeds, k_8.speed, k_8.memory, k_8.nll) == ("k_8", 1, None, None, (1.,)) and k_8.errors == pytest.approx((2.,))


def test_main_rows_are_the_largest_size_and_the_most_seeds():
    smoke = [made_up("s", experiment="cosmology", size="smoke"), made_up("one", experiment="cosmology", size="lease", data_id="other")]
    shown = results.main_rows([*smoke, *lease_rows()])
    assert {n: len(g) for n, g in shown.items()} == {n: 6 for n in EXPERIMENTS} and {r.variant for g in shown.values() for r in g} == {"default"}


def test_equal_seconds_end_with_the_faster_model():
    rows = [r for r in lease_rows() if r.experiment == "cosmology" and r.variant == "default"]
    ends = {r.run: (10. if r.model == "erwin" else 30.) + r.seed for r in rows}
    curves = {run: [(1, end / 2, 1., .5), (2, end, 1., .25)] for run, end in ends.items()}
    line, = results.equal_seconds(rows, curves)
    assert (line["first"], line["seconds"], line["best"]) == ("erwin", 12., dict(erwin=[.25] * 3, erwin_nsa=[None] * 3))
    curves = {run: [(1, 11., 1., .5), *curve[1:]] for run, curve in curves.items()}
    assert results.equal_seconds(rows, curves)[0]["best"]["erwin_nsa"] == [.5] * 3
    assert results.equal_seconds(rows, {}) == results.equal_seconds([r for r in rows if r.model == "erwin"], curves) == []


def test_table_groups_seeds_and_names_the_data():
    rows = [made_up(str(i), experiment="cosmology", model=model, data="generated universes", seed=i, test_mse=e) for model, errors in (("erwin", (.5, .6, .7)), ("erwin_nsa", (.4,))) for i, e in enumerate(errors)]
    lines = results.result_table(rows)
    assert [(line["model"], line["seeds"], line["MSE"], line["paper"], line["data"]) for line in lines] == [
        ("erwin", "3", "0.6 ± 0.1", "0.62", "generated universes"), ("erwin_nsa", "1", "0.4", "0.63", "generated universes")]


# the command

def test_help_and_list(capsys):
    for words, says in ((["--help"], "train"), (["train", "--help"], "experiment="), (["table", "--help"], "CSV"), (["data", "generate", "--help"], "lease")):
        with pytest.raises(SystemExit) as status: main(words)
        assert status.value.code == 0 and says in capsys.readouterr().out
    assert main(["train", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"variant={v}:" in said for v in VARIANTS) and all(f"experiment={e} model={m}" in said for e, m in CASES)


def test_mistakes_end_with_status_2_and_no_traceback(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for words in (["experiment=cosmolgy", *out], ["experiment=cosmology", "model.dept=2", *out], ["experiment=cosmology", "data=nowhere", *out], ["experiment=cosmology"]):
        assert main(["train", *words]) == 2 and capsys.readouterr().err.startswith("erwin-nsa train: ")
    done = subprocess.run([sys.executable, "-m", "erwin_nsa.train", "experiment=cosmology", "fit.steps=ten", *out], env=ENV, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("erwin-nsa train: "), done.stderr
    assert not (tmp_path / "out").exists()


def test_table_command(tmp_path, capsys):
    assert main(["table", str(tmp_path / "none.csv")]) == 2 and "no such file" in capsys.readouterr().err
    results.append_row(tmp_path / "runs.csv", made_up("a", experiment="cosmology", model="erwin", data="generated universes"))
    assert main(["table", str(tmp_path / "runs.csv")]) == 0
    said = capsys.readouterr().out
    assert "generated universes" in said and "0.62" in said
