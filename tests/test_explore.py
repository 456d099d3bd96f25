"""Structure, values, errors and size of the figures of `erwin_nsa.explore`, and the self-contained report."""
import base64
import html.parser
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("plotly")
from erwin_nsa.explore import attention, live, panels, report, scenes
from erwin_nsa.explore.cloud import CloudState
from erwin_nsa.explore.probe import Probe, ranked_balls
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.erwin import Erwin, ErwinConfig
from erwin_nsa.nn.model import ErwinNSA

RNG = np.random.default_rng(0)
N = 300
POS = RNG.normal(size=(N, 3)) * [0.9, 0.7, 2.1]
FACES = RNG.integers(0, N, size=(120, 4))
WEIGHTS = {b: RNG.random((2, N)) for b in ("compressed", "selected", "local")}
GATES = {b: RNG.random(2) for b in WEIGHTS}
IDS = np.arange(N) % 7


def decode(value):
    "The numbers of a typed array as plotly writes it into JSON."
    if not isinstance(value, dict):
        return np.asarray(value)
    return np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"]))


def saved(fig):
    "The figure as a page sees it."
    return json.loads(fig.to_json())


def scene_names(spec):
    return [k for k in spec["layout"] if k.startswith("scene")]


# ---------------------------------------------------------------- clouds and surfaces
@pytest.mark.parametrize("as_tensor", [False, True])
def test_cloud_values_round_trip(as_tensor):
    values = RNG.normal(size=N)
    args = (torch.tensor(POS), torch.tensor(values, requires_grad=True)) if as_tensor else (POS, values)
    trace = saved(scenes.cloud_figure(*args, "t", "Pa"))["data"][0]
    np.testing.assert_allclose(decode(trace["marker"]["color"]), values, rtol=1e-6)
    for axis, column in zip("xyz", POS.T):
        np.testing.assert_allclose(decode(trace[axis]), column, rtol=1e-6)
        assert trace[axis]["dtype"] == "f4"


def test_cloud_of_two_dimensions_lies_flat_and_is_seen_from_above():
    spec = saved(scenes.cloud_figure(POS[:, :2]))
    assert set(decode(spec["data"][0]["z"])) == {0.0}
    eye = spec["layout"]["scene"]["camera"]["eye"]
    assert eye["x"] == eye["y"] == 0 and eye["z"] > 0


@pytest.mark.parametrize("count, mode, length", [(N, "vertex", N), (120, "cell", 240)])
def test_surface_values_on_vertices_or_quads(count, mode, length):
    trace = saved(scenes.cloud_figure(POS, np.arange(count), faces=FACES))["data"][0]
    assert (trace["type"], trace["intensitymode"]) == ("mesh3d", mode)
    shown = decode(trace["intensity"])
    assert len(shown) == length
    np.testing.assert_array_equal(shown[-count:], np.arange(count))


def test_scene_is_equal_in_scale_with_y_up_and_no_axes():
    scene = saved(scenes.cloud_figure(POS))["layout"]["scene"]
    assert scene["aspectmode"] == "data"
    assert scene["camera"]["up"] == dict(x=0, y=1, z=0)
    assert not any(scene[f"{a}axis"]["visible"] for a in "xyz")


def test_compare_shares_one_scale_and_centres_the_error():
    truth, guess = RNG.normal(size=N) + 5, RNG.normal(size=N) + 7
    fig = scenes.compare_figure(POS, dict(prediction=guess, truth=truth, error=guess - truth), "Pa")
    spec = saved(fig)
    assert len(scene_names(spec)) == 3
    assert [t["marker"]["coloraxis"] for t in spec["data"]] == ["coloraxis", "coloraxis", "coloraxis2"]
    shared, error = spec["layout"]["coloraxis"], spec["layout"]["coloraxis2"]
    both = np.concatenate([truth, guess])
    np.testing.assert_allclose([shared["cmin"], shared["cmax"]], [both.min(), both.max()], rtol=1e-5)
    assert error["cmin"] == -error["cmax"] == pytest.approx(-np.abs(guess - truth).max(), rel=1e-5)
    assert "Pa" in shared["colorbar"]["title"]["text"] and "Pa" in error["colorbar"]["title"]["text"]


def test_compare_clip_is_said_and_of_the_stated_size():
    values = np.concatenate([np.zeros(N - 1), [1e6]])
    axis = saved(scenes.compare_figure(POS, dict(truth=values), clip=0.05))["layout"]["coloraxis"]
    assert axis["cmax"] < 1e6 and "5% at each end" in axis["colorbar"]["title"]["text"]


# ---------------------------------------------------------------- balls
@pytest.mark.parametrize("highlight, faces, traces", [(None, None, 2), (3, None, 2 + 4 + 2), (3, FACES, 2 + 4 + 2 + 2)])
def test_balls_has_two_scenes_and_one_step_a_level(highlight, faces, traces):
    levels = [dict(name=f"level {k}", main=IDS * k, rotated=IDS) for k in (1, 2)]
    spec = saved(scenes.balls_figure(POS, levels, highlight, faces=faces))
    assert len(scene_names(spec)) == 2 and len(spec["data"]) == traces
    (slider,) = spec["layout"]["sliders"]
    assert [s["label"] for s in slider["steps"]] == ["level 1 (7 balls)", "level 2 (7 balls)"]
    change, touched = slider["steps"][1]["args"]
    np.testing.assert_array_equal(decode(change["marker.color"][0]), IDS * 2)
    np.testing.assert_array_equal(decode(change["marker.color"][1]), IDS)
    assert len(touched) == len(change["marker.color"]) == 2 + (0 if highlight is None else 6)
    if highlight is not None:
        assert change["visible"] == [True, True, False, False, True, True, True, True]


def test_balls_draws_the_sphere_it_was_given_or_the_enclosing_one():
    level = dict(name="x", main=IDS, rotated=IDS, main_ball=([1.0, 2.0, 3.0], 0.5))
    data = saved(scenes.balls_figure(POS, [level], 3))["data"]
    vertices = np.stack([decode(data[2][a]) for a in "xyz"], 1)
    np.testing.assert_allclose(np.linalg.norm(vertices - [1, 2, 3], axis=1), 0.5, rtol=1e-5)
    other = np.stack([decode(data[3][a]) for a in "xyz"], 1)
    own = POS[IDS == IDS[3]]
    radius = np.linalg.norm(own - own.mean(0), axis=1).max()
    np.testing.assert_allclose(np.linalg.norm(other - own.mean(0), axis=1), radius, rtol=1e-4)


def test_ball_colours_of_power_of_two_neighbours_are_far_apart():
    rgb = np.array([[int(c) for c in s[4:-1].split(",")] for s in scenes.ball_colours()])
    i = np.arange(4096)
    for d in 2 ** np.arange(10):
        assert np.linalg.norm(rgb[i % len(rgb)] - rgb[(i + d) % len(rgb)], axis=1).min() > 100


# ---------------------------------------------------------------- attention and influence
@pytest.mark.parametrize("faces", [None, FACES])
def test_attention_structure_and_values(faces):
    weights = {b: w.copy() for b, w in WEIGHTS.items()}
    weights["local"][1, :100] = 0
    spec = saved(scenes.attention_figure(POS, [5, 7], weights, GATES, faces=faces))
    assert len(scene_names(spec)) == 3 and len(spec["data"]) == 3 + 3 + 3
    steps = spec["layout"]["sliders"][0]["steps"]
    assert [s["label"] for s in steps] == ["point 5", "point 7"]
    change = steps[1]["args"][0]
    shown = decode(change["intensity" if faces is not None else "marker.color"][2])
    assert len(set(shown[:100])) == 1 and shown[0] < shown[100:].min()
    np.testing.assert_allclose(10 ** shown[100:], np.maximum(weights["local"][1, 100:], 1e-6), rtol=1e-3)
    for trace, (branch, gate) in zip(spec["data"][6:], GATES.items()):
        assert trace["name"] == branch
        np.testing.assert_allclose(decode(trace["y"]), gate, rtol=1e-6)
    assert change["marker.size"][3] == [5, 14]


def test_attention_without_gates_has_no_bars():
    assert [t["type"] for t in saved(scenes.attention_figure(POS, [1, 2], WEIGHTS))["data"]] == ["scatter3d"] * 6


@pytest.mark.parametrize("faces", [None, FACES])
def test_influence_structure_and_values(faces):
    influence = 10.0 ** RNG.uniform(-6, 2, size=(2, N))
    influence[0, :50] = 0
    spec = saved(scenes.influence_figure(POS, [5, 7], influence, unit="m", faces=faces))
    assert len(spec["data"]) == 2 + 3 * 2
    assert f"{N - 50} of {N} points" in spec["layout"]["annotations"][0]["text"]
    assert decode(spec["data"][2]["y"]).sum() == N - 50
    change, text, touched = spec["layout"]["sliders"][0]["steps"][1]["args"]
    shown = decode(change["intensity" if faces is not None else "marker.color"][0])
    np.testing.assert_allclose(10 ** shown, influence[1] / influence[1].max(), rtol=1e-3)
    assert change["visible"] == [True, True] + [False] * 3 + [True] * 3 and len(touched) == 8
    assert f"{N} of {N} points influence point 7" in text["annotations[0].text"]


def test_influence_median_by_distance():
    distance = np.arange(8.0)
    row = 10.0 ** -distance
    s = scenes.influence_stats(row, distance, np.linspace(-8, 0, 9), bins=4)
    np.testing.assert_allclose(s["median"], [-0.5, -2.5, -4.5, -6.5], atol=1e-6)


@pytest.mark.parametrize("build", ["attention", "influence", "balls"])
def test_payload_of_a_real_car_stays_small(build):
    n, q = 3586, list(range(8))
    pos, weights = RNG.normal(size=(n, 3)), {b: RNG.random((8, n)) for b in WEIGHTS}
    levels = [dict(name=str(d), main=np.arange(n) >> d, rotated=np.arange(n) >> d) for d in range(12)]
    fig = dict(attention=lambda: scenes.attention_figure(pos, q, weights, {b: np.ones(8) for b in weights}),
               influence=lambda: scenes.influence_figure(pos, q, weights["local"]),
               balls=lambda: scenes.balls_figure(pos, levels, 0))[build]()
    size = len(fig.to_json())
    print(f"{build}: {size / 1e6:.2f} MB at {n} points")
    assert size < dict(attention=1e6, influence=6e5, balls=1e6)[build]


# ---------------------------------------------------------------- errors
NAN = np.full(N, np.nan)
ERRORS = {
    "value count": lambda: scenes.cloud_figure(POS, np.zeros(N - 1)),
    "value nan": lambda: scenes.cloud_figure(POS, NAN),
    "position nan": lambda: scenes.cloud_figure(POS * np.nan),
    "position width": lambda: scenes.cloud_figure(np.zeros((4, 5))),
    "no points": lambda: scenes.cloud_figure(np.zeros((0, 3))),
    "face ids": lambda: scenes.cloud_figure(POS, faces=FACES + N),
    "face width": lambda: scenes.cloud_figure(POS, faces=np.zeros((3, 5), int)),
    "no field": lambda: scenes.compare_figure(POS, {}),
    "field nan": lambda: scenes.compare_figure(POS, dict(truth=NAN)),
    "clip": lambda: scenes.compare_figure(POS, dict(truth=np.zeros(N)), clip=0.5),
    "no level": lambda: scenes.balls_figure(POS, []),
    "ball count": lambda: scenes.balls_figure(POS, [dict(name="x", main=IDS[:-1], rotated=IDS)]),
    "ball type": lambda: scenes.balls_figure(POS, [dict(name="x", main=IDS, rotated=IDS + 0.5)]),
    "ball negative": lambda: scenes.balls_figure(POS, [dict(name="x", main=IDS - 1, rotated=IDS)]),
    "highlight": lambda: scenes.balls_figure(POS, [dict(name="x", main=IDS, rotated=IDS)], N),
    "query id": lambda: scenes.attention_figure(POS, [0, N], WEIGHTS),
    "negative query": lambda: scenes.attention_figure(POS, [0, -1], WEIGHTS),
    "no query": lambda: scenes.attention_figure(POS, [], {b: w[:0] for b, w in WEIGHTS.items()}),
    "no branch": lambda: scenes.attention_figure(POS, [0, 1], {}),
    "weight rows": lambda: scenes.attention_figure(POS, [0], WEIGHTS),
    "weight negative": lambda: scenes.attention_figure(POS, [0, 1], {"local": -WEIGHTS["local"]}),
    "weight zero": lambda: scenes.attention_figure(POS, [0, 1], {"local": 0 * WEIGHTS["local"]}),
    "weight nan": lambda: scenes.attention_figure(POS, [0, 1], {"local": WEIGHTS["local"] * np.nan}),
    "gate names": lambda: scenes.attention_figure(POS, [0, 1], WEIGHTS, {"local": GATES["local"]}),
    "gate count": lambda: scenes.attention_figure(POS, [0, 1], WEIGHTS, {b: g[:1] for b, g in GATES.items()}),
    "influence zero": lambda: scenes.influence_figure(POS, [0, 1], 0 * WEIGHTS["local"]),
    "influence query": lambda: scenes.influence_figure(POS, [0, N], WEIGHTS["local"]),
    "influence nan": lambda: scenes.influence_figure(POS, [0, 1], WEIGHTS["local"] * np.nan),
    "panels none": lambda: panels.branch_panels({}, 4),
    "panels lost": lambda: panels.branch_panels({"a": dict(weights=np.eye(4))}, 4),
    "panels large": lambda: panels.branch_panels({"a": dict(weights=np.eye(300), mask=np.eye(300), gradient=np.eye(300))}, 4),
    "panels mask": lambda: panels.branch_panels({"a": dict(weights=np.eye(4), mask=np.eye(4) == 0, gradient=np.eye(4))}, 4),
    "loss nan": lambda: live.LossPlot().add(1, train=float("nan")),
    "loss log": lambda: live.LossPlot().add(1, train=0.0),
    "loss every": lambda: live.LossPlot(every=-1),
    "half life": lambda: live.smooth([1.0], 0),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_given_needed_and_what_to_do(case):
    with pytest.raises(ValueError, match=r"given: .*needed: .*do this: "):
        ERRORS[case]()


# ---------------------------------------------------------------- panels
def test_panels_three_columns_a_branch_with_shared_scales_and_ball_lines():
    eye, full = np.eye(16), np.ones((16, 16))
    rows = {"compressed": dict(weights=full / 16, mask=full, gradient=full), "local": dict(weights=eye, mask=eye, gradient=eye * 1e-3)}
    fig = panels.branch_panels(rows, dict(compressed=4, local=8))
    assert [t.coloraxis for t in fig.data] == ["coloraxis", "coloraxis2", "coloraxis3"] * 2
    assert len(fig.layout.shapes) == 3 * 6 + 3 * 2
    np.testing.assert_allclose(fig.data[3].z, eye)
    np.testing.assert_allclose(np.diag(fig.data[5].z), -3, atol=1e-5)
    assert fig.data[5].z[0, 1] < -3   # zero lies below the scale, in the grey foot
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 1)
    assert tuple(fig.layout.yaxis.range) == (15.5, -0.5)   # query 0 on top


# ---------------------------------------------------------------- live
def test_loss_plot_does_nothing_in_plain_python():
    code = ("import sys; from erwin_nsa.explore.live import LossPlot; p = LossPlot(every=0).show()\n"
            "for s in range(5): p.add(s, train=1.0)\n"
            "p.finish(); print(p.handle, p.drawn, 'IPython' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["None", "0", "False"]


def test_loss_curve_of_a_long_run_is_thinned_without_moving_its_mean():
    steps, losses = np.arange(50000), RNG.random(50000) + 0.5
    s, v = live.thin(steps, losses)
    assert len(s) == len(v) == 1000 and s[-1] == 49999
    assert v.mean() == pytest.approx(losses.mean())
    assert len(live.loss_figure(dict(train=(steps, losses))).to_json()) < 1e5


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    "A small notebook run through nbclient: a figure, a growing loss plot, an image, a widget, terminal output."
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    new, folder = nbformat.v4, tmp_path_factory.mktemp("report")
    cells = [new.new_markdown_cell("# Cars & <b>bold</b>\n\nLet $x<y$ and `$code$`. ![far](https://example.org/x.png) [page](https://example.org)"),
             new.new_code_cell("#| hide\nimport os\nfrom erwin_nsa.explore.live import LossPlot, use_small_output\n"
                               "from erwin_nsa.explore.scenes import cloud_figure\nimport numpy as np\nuse_small_output()"),
             new.new_code_cell("cloud_figure(np.random.rand(20, 3), np.arange(20.), '</script><script>alert(1)</script>')"),
             new.new_markdown_cell("## Train"),
             new.new_code_cell("p = LossPlot(every=0).show()"),
             new.new_code_cell("for s in range(1, 30): p.add(s, train=1/s)\np.finish(); print('\\r1 %\\r100 %'); print(os.environ['CARS'])"),
             new.new_code_cell("from IPython.display import HTML, Javascript, display\n"
                               "display(HTML('<script src=\"https://cdn.example.org/a.js\"></script>')); display(Javascript('1'))\n"
                               "display({'application/vnd.jupyter.widget-view+json': {'model_id': 'x'}, 'text/plain': 'HBox(<i>)'}, raw=True)")]
    nbformat.write(new.new_notebook(cells=cells), folder / "in.ipynb")
    return folder, report.execute_notebook(folder / "in.ipynb", folder / "out.ipynb", env=dict(CARS="three cars"), timeout=120)


def test_growing_plot_leaves_one_small_final_output(executed):
    import nbformat
    cell = nbformat.read(executed[1], 4).cells[4]
    (out,) = cell.outputs
    assert list(out.data) == [live.PLOTLY_MIME]
    assert len(decode(out.data[live.PLOTLY_MIME]["data"][0]["y"])) == 29


class Page(html.parser.HTMLParser):
    "Everything a browser would load, and the places for figures."
    def __init__(self, text):
        super().__init__()
        self.loads, self.plots, self.libraries, self.scripts, self.text, self.inside = [], 0, 0, 0, [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.inside = tag if tag in ("script", "style") else self.inside
        if tag != "a":
            self.loads += [v for k, v in a.items() if k in ("src", "href", "data", "srcset") and not (v or "").startswith("data:")]
        self.plots += a.get("class") == "plotly-plot"
        self.libraries += a.get("id") == "plotly-js"

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts += data.lstrip()[:40].startswith("/**\n* plotly.js v")
        elif not self.inside:
            self.text.append(data)


def test_report_is_self_contained(executed):
    import nbformat
    folder, path = executed
    count = report.write_report(path, folder / "page.html", "Cars & <more>")
    text = (folder / "page.html").read_text(encoding="utf-8")
    page, words = Page(text), " ".join(Page(text).text)
    outputs = sum(live.PLOTLY_MIME in o.get("data", {}) for c in nbformat.read(path, 4).cells for o in c.get("outputs", []))
    assert count == page.plots == outputs == 2
    assert page.loads == []
    assert page.libraries == page.scripts == 1
    assert "mathjax" not in words.lower() and "require.min.js" not in text
    assert "three cars" in words and "100 %" in words and "1 %\r" not in words
    assert "Left out" in words and "HBox(<i>)" in words          # shown as text, not as an element
    assert "<b>bold</b>" in words                                 # markdown's raw HTML is text
    assert text.count("<script>alert(1)") == 0
    data = [json.loads(s.split("</script>")[0]) for s in text.split('type="application/json" id="plot-')[1:] for s in [s.split(">", 1)[1]]]
    assert len(data) == 2 and "alert(1)" in data[0]["layout"]["title"]["text"]


def test_report_needs_outputs(executed):
    folder, _ = executed
    with pytest.raises(ValueError, match="execute_notebook first"):
        report.write_report(folder / "in.ipynb", folder / "x.html")
    assert not (folder / "x.html").exists()


def test_failing_notebook_prints_cell_and_traceback(tmp_path, capsys):
    nbformat = pytest.importorskip("nbformat")
    from nbclient.exceptions import CellExecutionError
    new = nbformat.v4
    nbformat.write(new.new_notebook(cells=[new.new_markdown_cell("# First"), new.new_code_cell("a = 1"), new.new_markdown_cell("# Second"),
                                           new.new_code_cell("a/0  # the culprit")]), tmp_path / "in.ipynb")
    with pytest.raises(CellExecutionError):
        report.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", timeout=60)
    out, err = capsys.readouterr()
    assert "First" in out and "Second" not in out
    assert "cell 3 of in.ipynb failed, in section 'Second'" in err and "the culprit" in err and "ZeroDivisionError" in err
    assert "\x1b" not in err and (tmp_path / "out.ipynb").exists()


def test_formulas_become_mathml_where_latex2mathml_is_installed():
    pytest.importorskip("latex2mathml")
    page = report.markdown_html("so $\\frac{1}{2}$ and\n\n$$x<y$$")
    assert page.count("<math") == 2 and "<mfrac>" in page


def test_formulas_stay_readable_without_latex2mathml(monkeypatch):
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", None)
    assert report.tex_html("x<y") == '<span class="tex"><code>x&lt;y</code></span>'


# ---------------------------------------------------------------- optional packages
def test_rooms_import_without_plotly_and_name_the_command():
    code = ("import sys\nfor m in ('plotly', 'IPython', 'nbformat', 'nbconvert', 'nbclient'): sys.modules[m] = None\n"
            "from erwin_nsa.explore import scenes, panels, live, report\nimport numpy as np\n"
            "for f in (lambda: scenes.cloud_figure(np.zeros((2, 3))), report.jupyter_tools):\n"
            "    try: f()\n    except ImportError as e: print(e)\n")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.count('pip install "erwin_nsa[explore]"') == 2 and '"plotly"' in out and '"nbformat"' in out


def test_growing_drawing_shows_the_same_curves_and_escapes_names():
    import xml.etree.ElementTree as ET
    history = dict(train=(range(1, 51), 10.0 ** -np.linspace(0, 3, 50)), val=([10, 40], [0.5, 0.01]))
    tree = ET.fromstring(live.loss_svg(history, "<b> & </b>", "Pa"))
    lines = [e.attrib["points"].split() for e in tree.iter() if e.tag.endswith("polyline")]
    assert [len(p) for p in lines] == [50, 50, 2] == [len(t.x) for t in live.loss_figure(history).data]
    heights = np.array([float(p.split(",")[1]) for p in lines[0]])
    np.testing.assert_allclose(np.diff(heights), np.diff(heights)[0], atol=0.2)   # straight on a logarithmic axis
    texts = [e.text for e in tree.iter() if e.tag.endswith("text")]
    assert {"<b> & </b>", "loss [Pa]", "0.001", "1", "optimiser step"} <= set(texts)


# ---------------------------------------------------------------- the attention explorer
PLAIN = dict(c_in=8, c_hidden=16, depth=2, num_heads=4, num_kv_heads=2, local_ball_size=32, compressed_ball_size=8, num_selected_balls=3, mp_steps=0)


def probe_of(points, seed=0, **changes):
    torch.manual_seed(seed)
    net = ErwinNSA(ErwinNSAConfig(**PLAIN | changes))
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return Probe(net, points)


@pytest.fixture(scope="module")
def looked_at():
    "Two clouds, three models."
    g = torch.Generator().manual_seed(0)
    points = PointBatch.from_clouds([torch.rand(n, 3, generator=g) for n in (150, 90)], [torch.randn(n, 8, generator=g) for n in (150, 90)])
    return attention.attention_data({"a": probe_of(points), "b": probe_of(points, 1, selection="ball", num_kv_heads=1), "local": probe_of(points, 2, branches=("local",))}, unit="m")


STATES = [dict(branch=b, scale=s, head=h, point=p, layer=l) for b, s, h, p, l in
          [("gated", "log", "mean", 3, -1), ("compressed", "linear", 2, 200, 0), ("selected", "log", 3, 149, 1), ("local", "linear", "mean", 150, 0)]]


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("other", ["", "b", "local"])
def test_scene_holds_what_the_probe_says(looked_at, state, other):
    state = attention.AttentionState(**state, other=other, show=2)
    scenes_ = attention.scenes_of(looked_at, state)
    assert len(scenes_) == 1 + bool(other) and len({s.limits for s in scenes_}) == 1
    for scene, name in zip(scenes_, ("a", other)):
        rows = looked_at.probes[name].rows(state.point, state.layer)
        weights = rows.on_points(state.branch, state.head).numpy()
        np.testing.assert_array_equal(scene.values, weights)
        np.testing.assert_array_equal(scene.unread, weights == 0)
        assert scene.limits[0] < scene.limits[1] and scene.shown.dtype == np.float32 and "[-]" in scene.label and name in scene.title
        back = 10.0 ** scene.shown if state.scale == "log" else scene.shown
        strong = weights > weights.max() * 1e-5
        if weights.any(): np.testing.assert_allclose(back[strong], weights[strong], rtol=1e-4)
        balls = ranked_balls(rows, state.head)[:2]
        assert len(balls) == len(scene.radii) == len(scene.colours) == len(scene.names) == (0 if name == "local" else 2)
        for ball, centre, radius in zip(balls, scene.centres, scene.radii):
            apart = np.linalg.norm(looked_at.pos[ball.points] - centre, axis=1)
            assert apart.max() == pytest.approx(radius, rel=1e-5)
            np.testing.assert_allclose(looked_at.pos[ball.points].mean(0), centre, rtol=1e-5)
        assert scene.highlight.tolist() == [state.point]
        drawn = CloudState(**attention.cloud_fields(scene))
        np.testing.assert_array_equal(drawn.values, weights)
        np.testing.assert_allclose(np.log10(drawn.limits) if state.scale == "log" else drawn.limits, scene.limits, atol=1e-9)
        assert len(drawn.spheres) == len(balls) and (drawn.spheres[:, 3] > 0).all()


@pytest.mark.parametrize("model, head", [("a", "mean"), ("a", 0), ("a", 3), ("b", "mean"), ("b", 1)])
@pytest.mark.parametrize("layer", [0, 1])
def test_mask_counts_what_every_query_selects(looked_at, model, head, layer):
    probe = looked_at.probes[model]
    mask = attention.mask_of(looked_at, attention.AttentionState(point=170, layer=layer, head=head, branch="selected", model=model))
    R, first = 12, 160 // 8                                                               # the second cloud: 90 points from slot 160 on
    counts, queries = np.zeros((R, R)), np.zeros(R)
    for point in range(150, 240):
        rows, kept = probe.rows(point, layer), probe.kept[layer]
        slot = int(probe.inverse[point]) if kept.frame.perm_inverse is None else int(kept.frame.perm_inverse[probe.inverse[point]])
        ball, key_heads = slot // 8 - first, range(len(rows.selected_balls)) if head == "mean" else [head * len(rows.selected_balls) // 4]
        queries[ball] += 1
        for h in key_heads:
            for chosen in rows.selected_balls[h].tolist(): counts[ball, chosen - first] += 1 / len(key_heads)
        if point == 170:
            assert mask.row == ball
            assert mask.columns.tolist() == sorted({b - first for h in key_heads for b in rows.selected_balls[h].tolist()})
    np.testing.assert_allclose(mask.reads, counts / queries[:, None], atol=1e-6)
    assert (mask.per, mask.size, mask.local_rows, mask.view) == (1, 8, 4, ("main", "rotated")[layer])


def test_mask_of_other_branches_and_of_a_large_cloud(looked_at, monkeypatch):
    look = lambda **changes: attention.mask_of(looked_at, attention.AttentionState(point=3, **changes))
    blocks = np.arange(19) // 4
    np.testing.assert_array_equal(look(branch="local").reads, blocks[:, None] == blocks)
    assert (look(branch="compressed").reads == 1).all()
    assert look(branch="gated", model="local").what == "shares a local ball"
    none = look(branch="selected", model="local")
    assert not none.reads.any() and none.what == "no selected branch"
    whole = look(branch="selected")
    monkeypatch.setattr(attention, "MASK_LIMIT", 7)
    coarse = look(branch="selected")
    assert coarse.per == 3 and coarse.reads.shape == (7, 7) and coarse.row == whole.row // 3
    np.testing.assert_allclose(coarse.reads.sum(1), 3, rtol=1e-5)                         # k picks a query, however balls are grouped
    full = np.zeros((21, 21)); full[:19, :19] = whole.reads
    np.testing.assert_allclose(coarse.reads[0], full[:3].reshape(3, 7, 3).sum(2).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(np.diag(look(branch="local").reads), 1)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("other", ["", "b", "local"])
def test_figures_of_the_light_views(looked_at, theme, other):
    state = attention.AttentionState(point=3, other=other, head=1)
    bars = attention.gates_figure(looked_at, state, theme)
    assert len(bars.data) == 3 * (1 + bool(other))
    gates = attention.gates_of(looked_at, state)
    for trace, values in zip(bars.data, [g for m in gates.values() for g in m]): np.testing.assert_allclose(trace.y, values)
    assert bars.data[0].marker.color[1].endswith(",1)") and bars.data[0].marker.color[0].endswith(",0.3)")
    if other == "local": assert not gates["local"][:2].any() and gates["local"][2].all()
    mask = attention.mask_figure(looked_at, state, theme)
    assert [t.type for t in mask.data] == ["heatmap", "scatter"] * (1 + bool(other))
    row = attention.mask_of(looked_at, state).row
    assert mask.data[1].y[0] == row and any((s.y0, s.y1) == (row - 1, row + 1) for s in mask.layout.shapes)
    histogram = attention.histogram_figure(looked_at, state, theme)
    for trace, scene in zip(histogram.data, attention.scenes_of(looked_at, state), strict=True):
        assert sum(trace.y) == (~scene.unread).sum() and f"{scene.unread.sum()} not" in trace.name
    for fig in (bars, mask, histogram):
        assert fig.layout.yaxis.title.text and len(fig.to_json()) < 1e5
    pages = {t: attention.gates_figure(looked_at, state, t).to_json() for t in ("light", "dark")}
    assert pages["light"] != pages["dark"]


def test_table_and_csv(looked_at, tmp_path):
    import csv
    state = attention.AttentionState(point=160, head=2, other="local", branch="local")
    rows = attention.table(looked_at, state)
    assert {r["model"] for r in rows} == {"a", "local"}
    mine = [r for r in rows if r["model"] == "a"]
    answer = looked_at.probes["a"].rows(160)
    assert len(mine) == 90 and [r["local"] for r in mine] == sorted((r["local"] for r in mine), reverse=True)
    for branch in attention.VIEWS:
        np.testing.assert_array_equal([r[branch] for r in mine], answer.on_points(branch, 2)[[r["point"] for r in mine]])
    for ball in ranked_balls(answer, 2): assert {r["point"] for r in mine if r["ball_rank"] == ball.rank} == set(ball.points.tolist())
    apart = np.linalg.norm(looked_at.pos[[r["point"] for r in mine]] - looked_at.pos[160], axis=1)
    np.testing.assert_allclose([r["distance"] for r in mine], apart, rtol=1e-6)
    assert len(attention.table(looked_at, state, top=5)) == 10
    path = attention.write_csv(tmp_path / "deep" / "rows.csv", rows)
    with path.open(newline="") as file: back = list(csv.DictReader(file))
    assert tuple(back[0]) == attention.TABLE_COLUMNS and [float(r["gated"]) for r in back] == [r["gated"] for r in rows]


def test_erwin_in_the_explorer(looked_at):
    torch.manual_seed(0)
    config = ErwinConfig(c_in=8, c_hidden=16, enc_depths=(1, 1), enc_num_heads=(2, 4), dec_depths=(1,), dec_num_heads=(2,), strides=(4,), ball_sizes=(16, 8), mp_steps=0)
    g = torch.Generator().manual_seed(0)
    points = PointBatch.from_clouds([torch.rand(n, 3, generator=g) for n in (150, 90)], [torch.randn(n, 8, generator=g) for n in (150, 90)])
    data = attention.attention_data({"Erwin": Probe(Erwin(config), points), "Erwin NSA": looked_at.probes["a"]})
    for layer in (0, 1, -1):
        state = attention.AttentionState(point=200, layer=layer, other="Erwin NSA" if layer < 1 else "")
        scene = attention.scenes_of(data, state)[0]
        assert scene.values.sum() == pytest.approx(1) and not len(scene.radii)
        mask = attention.mask_of(data, state)
        np.testing.assert_array_equal(mask.reads, np.eye(len(mask.reads)))
        assert mask.reads[mask.row, mask.row] == 1 and len(attention.mask_figure(data, state).data) == (4 if layer < 1 else 2)


BAD_STATES = {
    "all of it": (lambda d: attention.AttentionState(point=-1, layer=0.5, head="max", branch="all", show=-1, scale="root", model=1),
                  "point=-1.*layer=0.5.*head='max'.*branch='all'.*show=-1.*scale='root'.*model=1"),
    "point": (lambda d: attention.scenes_of(d, attention.AttentionState(point=240)), "0 to 239"),
    "layer": (lambda d: attention.mask_of(d, attention.AttentionState(layer=2)), "of 2 blocks"),
    "head": (lambda d: attention.gates_of(d, attention.AttentionState(head=4)), "0 to 3, or 'mean'"),
    "model": (lambda d: attention.table(d, attention.AttentionState(model="c")), "one of a, b, local"),
    "other": (lambda d: attention.mask_figure(d, attention.AttentionState(other="c")), "one of a, b, local"),
    "theme": (lambda d: attention.histogram_figure(d, attention.AttentionState(), "sepia"), "light or dark"),
    "no probes": (lambda d: attention.attention_data({}), "at least one Probe"),
    "not a probe": (lambda d: attention.attention_data({"a": 3}), "at least one Probe"),
    "no name": (lambda d: attention.attention_data({"": d.probes["a"]}), "not empty"),
    "positions": (lambda d: attention.attention_data(d.probes, d.pos[1:]), "239 positions"),
    "other cloud": (lambda d: attention.attention_data({"a": d.probes["a"], "c": probe_of(PointBatch.from_tensors(torch.rand(240, 3), x=torch.rand(240, 8)))}), "same batch"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_states_that_fit_nothing_are_refused_in_one_sentence(looked_at, case):
    call, says = BAD_STATES[case]
    with pytest.raises(ValueError, match=r"given: .*; needed: .*; do: ") as raised:
        call(looked_at)
    assert raised.match(says)
