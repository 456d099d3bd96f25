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
from erwin_nsa.explore import live, panels, report, scenes

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
