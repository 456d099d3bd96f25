"""`erwin-nsa explore`: what the page holds against the probe, which inputs are refused and how, and that no name becomes markup."""
import base64
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from erwin_nsa.data.bodies import find_sample
from erwin_nsa.data.clouds import read_cloud
from erwin_nsa.data.cosmology import HaloScale
from erwin_nsa.data.store import CloudSample, CloudStore
from erwin_nsa.data.surfaces import Normalizer
from erwin_nsa.explore import page as pg
from erwin_nsa.explore.cloud import CloudState
from erwin_nsa.explore.probe import Probe
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.erwin import ErwinConfig
from erwin_nsa.nn.fields import ChainModel, VelocityModel
from erwin_nsa.nn.tasks import PointwiseMLP, SurfaceModel
from erwin_nsa.train import cli
from erwin_nsa.train.checkpoint import FitState, save_checkpoint
from erwin_nsa.train.experiments import preset, run_experiment, runs_of
from erwin_nsa.train.fit import FitConfig

BODIES, HALOS = find_sample("bodies.h5"), find_sample("cosmology.h5")
SMALL = dict(c_in=8, c_hidden=16, depth=2, num_heads=4, num_kv_heads=2, head_dim=4, local_ball_size=32, compressed_ball_size=8, num_selected_balls=3, mp_steps=1)
RNG = np.random.default_rng(0)
NASTY = "</script><img src=x onerror=alert(1)>&\"'{title}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Folder of a finished smoke run on bodies."
    folder = tmp_path_factory.mktemp("runs") / "cars"
    run_experiment(runs_of(["experiment=shapenet_car", "fit.steps=3", "validate=3"])[0], folder, device="cpu", progress=False)
    return folder


def disturbed(model):
    "As if it had been trained: no parameter is where it was drawn."
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def blob_of(n=150, D=3, target=True, name="blob"):
    pos = RNG.normal(size=(n, D)) * 3 + 5
    return CloudSample(pos, None, pos[:, :1] if target else None, name)


def explored(capsys, *words):
    status = cli.main(["explore", *map(str, words), "--device", "cpu"])
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return status, out.out, out.err


def embedded(text):
    "The dictionary and the bytes of a page."
    words = json.loads(re.search(r'<script type="application/json" id="erwin-page">(.*?)</script>', text, re.S)[1])
    return words, base64.b64decode(re.search(r'id="erwin-page-bytes">(.*?)</script>', text, re.S)[1])


def array(blob, place):
    return np.frombuffer(blob, dict(u1="<u1", u2="<u2", u4="<u4", f4="<f4")[place[0]], place[2], place[1])


def weights(about, blob, query, layer, branch):
    "As page.js restores them."
    out = np.zeros(about["count"])
    for part in about["parts"][query][layer]:
        if branch in ("gated", part["branch"]):
            p = part["gated" if branch == "gated" else "plain"]
            w = pg.restore_weights(array(blob, p["place"]), p["low"], p["high"])
            if "group" in part:
                out += w[array(blob, about["groups"][part["group"]])]
            else:
                np.add.at(out, array(blob, part["rows"]), w)
    return out


# ---------------------------------------------------------------- what the page holds
CONFIGS = dict(plain=ErwinNSAConfig(**SMALL), ball=ErwinNSAConfig(**SMALL, selection="ball"), no_rotation=ErwinNSAConfig(**SMALL, rotate=0.),
               overlap=ErwinNSAConfig(**SMALL, compressed_stride=4), local=ErwinNSAConfig(**SMALL, branches=("local",)), copies=ErwinNSAConfig(**SMALL, layout="erwin"),
               erwin=ErwinConfig(c_in=8, c_hidden=16, enc_depths=(1, 1), enc_num_heads=(2, 4), dec_depths=(1,), dec_num_heads=(2,), strides=(2,), ball_sizes=(32, 32), mp_steps=1))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("budget", [1000, 60])
def test_weights_of_the_page_are_those_of_the_probe(name, budget):
    cloud = blob_of()
    view = pg.make_view(disturbed(SurfaceModel(CONFIGS[name])), cloud, pg.find_scale("extent", cloud, None))
    queries = pg.spread_points(cloud.pos, 3)
    about, blob = pg.pack_view(view, queries, CloudState(cloud.pos, budget=budget, highlight=np.sort(queries)))
    ids = array(blob, about["ids"])
    drawn = ids if len(ids) else np.arange(len(cloud))
    assert budget - 3 <= about["count"] == len(drawn) <= budget or len(drawn) == len(cloud) < budget
    assert set(queries) <= set(drawn.tolist())
    np.testing.assert_array_equal(array(blob, about["places"]).reshape(-1, 3), cloud.pos[drawn])
    for q, point in enumerate(queries):
        for at, layer in enumerate(view.probe.layers):
            rows = view.probe.rows(int(point), layer)
            for branch in (*rows.branches, "gated"):
                true, got = rows.on_points(branch, "mean").numpy()[drawn], weights(about, blob, q, at, branch)
                np.testing.assert_allclose(got, true, rtol=1.01 * pg.worst_error(), atol=1e-6 * max(true.max(), 1e-30) * 3)
                np.testing.assert_array_equal(got > 0, true > 0)
            np.testing.assert_allclose([g for g in about["gates"][q][at] if g], rows.gates.numpy()[[b in rows.branches for b in pg.BRANCHES]], rtol=1e-3)
    field = about["fields"][0]
    low, high = field["range"]
    true = view.fields[field["label"]][0][drawn]
    np.testing.assert_allclose(low + (high - low) * array(blob, field["place"]) / 65535., true, atol=(high - low) / 65535)


def test_balls_of_the_page_hold_what_they_say():
    cloud = blob_of()
    view = pg.make_view(disturbed(SurfaceModel(CONFIGS["plain"])), cloud, pg.find_scale("extent", cloud, None))
    about, blob = pg.pack_view(view, np.array([7]), CloudState(cloud.pos))
    for layer in range(2):
        inside = np.zeros(len(cloud), bool)
        for ball in about["balls"][0][layer]:
            inside |= np.linalg.norm(cloud.pos - ball["centre"], axis=1) <= ball["radius"] * 1.01 + 1e-3
        assert about["balls"][0][layer] and inside[weights(about, blob, 0, layer, "selected") > 0].all()


@pytest.mark.parametrize("decades", [0.01, 3, 9])
def test_quantised_weights_stay_within_the_stated_error(decades):
    w = np.r_[0., 10. ** RNG.uniform(-decades, 0, 500), 1.]
    codes, low, high = pg.quantise(w)
    back = pg.restore_weights(codes, low, high)
    np.testing.assert_array_equal(back == 0, w == 0)
    kept = w >= 1e-6
    assert (np.abs(back - w)[kept] <= pg.worst_error() * w[kept] * 1.0001).all() and pg.worst_error() < .0285
    np.testing.assert_allclose(back[(w > 0) & ~kept], 1e-6)


@pytest.mark.parametrize("count", [1, 5, 500])
def test_spread_points_are_different_and_apart(count):
    pos = RNG.normal(size=(200, 3))
    ids = pg.spread_points(pos, count)
    assert len(set(ids.tolist())) == min(count, 200)
    if count == 5:
        apart = np.linalg.norm(pos[ids][:, None] - pos[ids], axis=-1)[np.triu_indices(5, 1)].min()
        random = np.linalg.norm(pos[:5][:, None] - pos[:5], axis=-1)[np.triu_indices(5, 1)].min()
        assert apart > random


def test_fields_and_units():
    cloud = CloudSample(blob_of().pos, None, RNG.normal(size=(150, 3)), "g")
    scale = pg.as_scale(HaloScale((5,) * 3, (3,) * 3, (1, 2, 3), (10, 20, 30)), "t")
    view = pg.make_view(disturbed(VelocityModel(ErwinNSAConfig(**SMALL))), cloud, scale)
    y = view.probe.output.detach().numpy() * [10, 20, 30] + [1, 2, 3]
    np.testing.assert_allclose(view.fields["predicted velocity y"][0], y[:, 1], rtol=1e-4)
    np.testing.assert_allclose(view.fields["predicted speed"][0], np.linalg.norm(y, axis=1), rtol=1e-4)
    np.testing.assert_allclose(view.fields["error"][0], np.linalg.norm(y - cloud.target, axis=1), rtol=1e-4)
    assert {unit for _, unit, _ in view.fields.values()} == {"km/s"} and any("taken to be in km/s" in n for n in view.notes)
    view = pg.make_view(disturbed(VelocityModel(ErwinNSAConfig(**SMALL))), cloud, pg.find_scale("extent", cloud, None))
    assert "error" not in view.fields and view.fields["predicted speed"][1] == "normalised" and view.fields["speed of the file"][1] == "unit of the file"


def test_scale_reaches_the_model():
    cloud, model = blob_of(), disturbed(SurfaceModel(ErwinNSAConfig(**SMALL)))
    near = pg.make_view(model, cloud, pg.find_scale("extent", cloud, model))
    moved = CloudSample(cloud.pos * 1000 + 7, None, cloud.target, "mm")
    np.testing.assert_allclose(pg.make_view(model, moved, pg.find_scale("extent", moved, model)).probe.pos, near.probe.pos, atol=1e-5)
    np.testing.assert_array_equal(pg.make_view(model, cloud, pg.find_scale("none", cloud, model)).probe.pos, cloud.pos)
    assert pg.find_scale("published", cloud, model).out == (-36.3099, 48.5743)
    fitted = pg.find_scale(str(BODIES), cloud, model)
    assert fitted.out_unit == "Pa" and "bodies.h5" in fitted.says
    assert pg.find_scale(str(HALOS), cloud, VelocityModel(ErwinNSAConfig(**SMALL))).out_unit == "km/s"


# ---------------------------------------------------------------- the page as a file
class Markup(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.loads = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "data") and not v.startswith("data:")]


def test_page_loads_nothing_and_names_stay_text():
    cloud = blob_of(name=NASTY)
    cloud = CloudSample(cloud.pos, None, cloud.target, NASTY)
    scale = pg.CloudScale((5.,) * 3, (3.,) * 3, f"from {NASTY}", f"m{NASTY}", (0., 1.), f"Pa{NASTY}")
    view = pg.make_view(disturbed(SurfaceModel(ErwinNSAConfig(**SMALL))), cloud, scale, notes=(NASTY,))
    text = pg.page_text(view, 2)
    seen = Markup(text)
    assert not seen.loads and "img" not in seen.tags and seen.tags.count("script") == 5
    assert not re.search(r"https?://|//cdn|@import|url\(", text.replace("http://www.w3.org", ""))
    assert "<img" not in text and "{title}" in text                             # braces of a name are no place to fill
    about, _ = embedded(text)
    assert about["unit"] == f"m{NASTY}" and about["fields"][0]["unit"] == f"Pa{NASTY}"
    assert re.search(r"This page holds 0\.\d\d MB", text) and "off by 2.8% at most" in text


def test_page_too_large_is_refused(monkeypatch):
    cloud = blob_of()
    view = pg.make_view(disturbed(SurfaceModel(ErwinNSAConfig(**SMALL))), cloud, pg.find_scale("extent", cloud, None))
    monkeypatch.setattr(pg, "MOST_BYTES", 50_000)
    with pytest.raises(ValueError, match="ask about fewer points"):
        pg.page_text(view, 2)
    with pytest.raises(ValueError, match="at least 1"):
        pg.page_text(view, 0)


@pytest.mark.parametrize("model, cloud, says", [
    (lambda: SurfaceModel(ErwinNSAConfig(**SMALL)), lambda: blob_of(), "never trained"),
    (lambda: disturbed(ChainModel(ErwinNSAConfig(**SMALL))), lambda: blob_of(), "a ChainModel"),
    (lambda: disturbed(PointwiseMLP()), lambda: blob_of(), "a PointwiseMLP"),
    (lambda: disturbed(SurfaceModel(ErwinNSAConfig(**SMALL))), lambda: blob_of(D=2), "2 dimensions for a model of 3"),
    (lambda: disturbed(SurfaceModel(ErwinNSAConfig(**SMALL), use_normals=True)), lambda: blob_of(), "no normals"),
])
def test_models_and_clouds_that_do_not_fit(model, cloud, says):
    sample = cloud()
    with pytest.raises(ValueError, match=says):
        pg.make_view(model(), sample, pg.find_scale("extent", sample, None))


def test_a_model_of_nan_or_of_one_answer_is_refused():
    cloud, model = blob_of(), disturbed(SurfaceModel(ErwinNSAConfig(**SMALL)))
    with torch.no_grad():
        model.head[2].weight.zero_()
    with pytest.raises(ValueError, match="the same at every point"):
        pg.make_view(model, cloud, pg.find_scale("extent", cloud, None))
    with torch.no_grad():
        model.head[2].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        pg.make_view(model, cloud, pg.find_scale("extent", cloud, None))


# ---------------------------------------------------------------- the command
def test_command_on_a_run(run, tmp_path, capsys):
    out = tmp_path / "out.html"
    status, said, notes = explored(capsys, run, BODIES, "--cloud", "body_0004", "--html", out, "--queries", 4)
    assert status == 0 and "4 points asked" in said, notes
    assert "fitted on the training clouds of the run, generated bodies" in notes and "unchanged" not in notes and "8 neighbours" in notes and "at most 256 points" in notes
    about, blob = embedded(out.read_text())
    e = preset("shapenet_car")
    from erwin_nsa.train.experiments import make_model, open_parts
    from erwin_nsa.train.checkpoint import load_model
    body, norm = read_cloud(BODIES, cloud="body_0004"), open_parts(e).scale
    model = load_model(next((run / "checkpoints").glob("best.*")))
    from erwin_nsa.data.store import Geometry, collate
    sample = CloudSample(norm.encode_pos(body.pos), None, None, "b")
    with torch.no_grad():
        y = model(collate([(sample, Geometry(k=8, loop=True)(sample.pos))])).numpy() * norm.pressure_std + norm.pressure_mean
    low, high = about["fields"][0]["range"]
    np.testing.assert_allclose(low + (high - low) * array(blob, about["fields"][0]["place"]) / 65535., y, atol=(high - low) * 1e-4)
    assert "unit not stated" in notes and "taken to be in m," in notes
    status, said, notes = explored(capsys, run / "checkpoints", BODIES, "--cloud", "body_0004", "--html", out, "--queries", 2, "--k", 5)
    assert status == 0 and "5 neighbours a point, as you said" in notes and "8 neighbours" not in notes


@pytest.mark.parametrize("words", [["model=erwin"], ["model=erwin", "partition=morton"], ["partition=hilbert"]], ids=" ".join)
def test_command_builds_the_tree_of_the_training(words, tmp_path, capsys):
    e = runs_of(["experiment=shapenet_car", "fit.steps=1", "validate=1", *words])[0]
    run_experiment(e, tmp_path / "run", device="cpu", progress=False)
    np.savez(tmp_path / "c.npz", pos=read_cloud(BODIES, cloud="body_0004").pos[::14])
    status, _, notes = explored(capsys, tmp_path / "run", tmp_path / "c.npz", "--html", tmp_path / "o.html", "--queries", 2)
    assert status == 0, notes
    from erwin_nsa.train.experiments import batches_of, make_model, open_parts, own_trees
    from erwin_nsa.train.checkpoint import load_model
    norm = open_parts(e).scale
    sample = CloudSample(norm.encode_pos(np.load(tmp_path / "c.npz")["pos"]), None, None, "c")
    with torch.no_grad():
        y = load_model(next((tmp_path / "run" / "checkpoints").glob("best.*")))(own_trees(e, batches_of(e, [sample])[0])).numpy() * norm.pressure_std + norm.pressure_mean
    about, blob = embedded((tmp_path / "o.html").read_text())
    low, high = about["fields"][0]["range"]
    np.testing.assert_allclose(low + (high - low) * array(blob, about["fields"][0]["place"]) / 65535., y, atol=(high - low) * 1e-3)


def test_command_asks_for_the_scale_it_does_not_know(run, tmp_path, capsys):
    alone = shutil.copy(next((run / "checkpoints").glob("best.*")), tmp_path)
    words = (alone, BODIES, "--cloud", "body_0004", "--html", tmp_path / "o.html", "--queries", 1)
    status, said, notes = explored(capsys, *words)
    assert status == 2 and "--scale extent" in notes and not (tmp_path / "o.html").exists() and not said
    for scale, says in (("extent", "not from the training"), (BODIES, "as training on bodies.h5 fits it"), ("published", "published ShapeNet-Car")):
        status, _, notes = explored(capsys, *words, "--scale", scale)
        assert status == 0 and says in notes and "the training's is not known" in notes


def test_command_notices_data_that_changed(run, tmp_path, capsys):
    moved = shutil.copytree(run, tmp_path / "moved")
    result = json.loads((moved / "result.json").read_text())
    (moved / "result.json").write_text(json.dumps(result | dict(data_id="0123456789ab")))
    status, _, notes = explored(capsys, moved, BODIES, "--cloud", "body_0004", "--html", tmp_path / "o.html")
    assert status == 2 and "0123456789ab" in notes
    (moved / "result.json").unlink()
    status, _, notes = explored(capsys, moved, BODIES, "--cloud", "body_0004", "--html", tmp_path / "o.html", "--queries", 1)
    assert status == 0 and "nothing says that the data are unchanged" in notes
    (moved / "experiment.json").write_text("{}")
    status, _, notes = explored(capsys, moved, BODIES, "--cloud", "body_0004", "--html", tmp_path / "o.html")
    assert status == 2 and "--scale" in notes


def test_command_refuses_what_does_not_fit(run, tmp_path, capsys):
    np.savez(tmp_path / "nan.npz", pos=np.full((9, 3), np.nan))
    np.savez(tmp_path / "flat.npz", pos=RNG.normal(size=(99, 2)))
    np.savez(tmp_path / "ok.npz", pos=RNG.normal(size=(99, 3)))
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    out = tmp_path / "o.html"
    for words, says in (((run, tmp_path / "nan.npz"), "NaN"), ((run, tmp_path / "flat.npz"), "2 dimensions"), ((run, tmp_path / "no.npz"), "no such file"), ((run, tmp_path / "x.doc"), ".npz"),
                        ((tmp_path / "none", tmp_path / "ok.npz"), "checkpoint"), ((tmp_path / "bad.pt", tmp_path / "ok.npz"), "checkpoint"), ((run, BODIES), "body_0000"),
                        ((run, tmp_path / "ok.npz", "--key", "target"), "ROLE=NAME"), ((run, tmp_path / "ok.npz", "--key", "target=cp"), "'cp'"), ((run, tmp_path / "ok.npz", "--queries", 0), "at least 1"),
                        ((run, tmp_path / "ok.npz", "--k", 0), "k=0"), ((run, tmp_path / "ok.npz", "--scale", "no.h5"), "no such file")):
        status, said, notes = explored(capsys, *words, "--html", out)
        assert status == 2 and says in notes and not said and not out.exists(), (words, notes)
    assert explored(capsys, run, tmp_path / "ok.npz", "--html", tmp_path / "o.txt")[0] == 2


def test_untrained_checkpoint_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "ok.npz", pos=RNG.normal(size=(99, 3)))
    model = SurfaceModel(ErwinNSAConfig(**SMALL))
    path = save_checkpoint(tmp_path / "step-0.pt", model, torch.optim.AdamW(model.parameters()), FitState(torch.Generator()), FitConfig(1))
    status, _, notes = explored(capsys, path, tmp_path / "ok.npz", "--scale", "none", "--html", tmp_path / "o.html")
    assert status == 2 and "before the first step" in notes


def test_lines_to_paste_and_jupyterlab(run, tmp_path, capsys, monkeypatch):
    name = tmp_path / "it's \"mine\".npz"
    np.savez(name, pos=read_cloud(BODIES, cloud="body_0004").pos[::8], cp=np.arange(448.))
    status, said, _ = explored(capsys, run, name, "--key", "target=cp")
    assert status == 0 and said.count("\n") == 4
    space = {}
    exec("\n".join(line for line in said.splitlines()[1:] if not line.startswith("live_view")), space)
    view = eval(said.splitlines()[-1].removeprefix("live_view(").rsplit(", up=", 1)[0], space)
    assert view.cloud.target[3, 0] == 3
    capsys.readouterr()
    started = []
    monkeypatch.setattr(cli.subprocess, "call", lambda words: started.append(words) or 0)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["explore", str(run), str(name), "--device", "cpu"]) == 0
    book = json.loads(open(started[0][-1]).read())
    assert book["cells"][0]["source"].startswith("from erwin_nsa.train.cli import open_view") and started[0][1:3] == ["-m", "jupyterlab"]
    shutil.rmtree(os.path.dirname(started[0][-1]))


def test_command_doctor(capsys):
    assert cli.main(["doctor", "Python"]) == 0 and "The core works" in capsys.readouterr().out
    assert cli.main(["doctor", "Pythn"]) == 2 and "needed: some of Python" in capsys.readouterr().err
