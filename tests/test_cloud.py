"""The state of a point cloud scene, the bytes that travel, pages and the widget, without a browser (`tests/browser` has one)."""
import base64
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from erwin_nsa.explore import cloud
from erwin_nsa.explore.cloud import CloudState, cloud_page, cloud_traits, drawn_rows, home_camera, project, value_limits

SCRIPT = (cloud.STATIC / "cloud.js").read_text(encoding="utf-8")


def points(n=60, seed=0, width=3):
    return np.random.default_rng(seed).random((n, width))


def locked(*rows):
    a = np.array(rows, np.float32)
    a.setflags(write=False)
    return a


@pytest.mark.parametrize("fields, says", [
    (dict(pos=np.zeros((0, 3))), "0 points"),
    (dict(pos=points(width=4)), r"pos of shape \(60, 4\)"),
    (dict(pos="car.vtk"), "pos"),
    (dict(pos=locked([0, 0, float("nan")])), "1 NaN"),
    (dict(pos=1e8 + points()), "from the origin"),
    (dict(values=np.full(60, np.inf)), "60 NaN or infinite values of 60"),
    (dict(values=points()), r"values of shape \(60, 3\)"),
    (dict(values=range(59)), "59 values for 60 points"),
    (dict(values=points()[:, 0], colours="balls"), "row of integers"),
    (dict(values=np.full(60, -2), colours="balls"), "below -1"),
    (dict(colours="rainbow"), "viridis, cividis, diverging, categories, balls"),
    (dict(scale="sqrt"), "linear or log"),
    (dict(values=np.zeros(60), scale="log"), "without a value above zero"),
    (dict(values=np.ones(60), limits=(1, 1)), "the lower one first"),
    (dict(values=np.ones(60), limits=(0, float("nan"))), "the lower one first"),
    (dict(values=np.ones(60), limits=(1,)), "1 limits"),
    (dict(values=np.ones(60), limits=(-1, 1), scale="log"), "logarithmic scale from -1"),
    (dict(highlight=[60]), r"points \[60\]; needed: ids from 0 to 59"),
    (dict(highlight=[1.5]), "highlight"),
    (dict(spheres=[[0, 0, 0, 0]]), "without a radius"),
    (dict(spheres=[[0, 0, 0, 1]], sphere_colours=[[1, 2, 3], [4, 5, 6]]), "2 colours for 1 spheres"),
    (dict(segments=[[0, 0, 0]]), "segments"),
    (dict(up="w"), "x, y or z"),
    (dict(budget=0), "budget"),
    (dict(point_size=0), "above zero"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_refused(fields, says):
    with pytest.raises(ValueError, match=says) as raised:
        CloudState(**dict(pos=points()) | fields)
    assert all(part in str(raised.value) for part in ("given: ", "needed: ", "do: "))


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError) as raised: CloudState(points(), values=[1.0], colours="jet", up="w", budget=0)
    assert all(word in str(raised.value) for word in ("1 values", "jet", "up 'w'", "budget"))


def test_arrays_are_copies_and_stay():
    pos = points().astype(np.float32)
    state = CloudState(pos, torch.arange(60.0, requires_grad=True).double())
    pos[0] = 9
    assert state.pos[0].max() < 1 and state.values.dtype == np.float32
    with pytest.raises(ValueError): state.pos[0] = 1
    other = replace(state, values=np.ones(60))
    assert other.pos is state.pos and other.values is not state.values


def test_a_checked_array_of_the_wrong_shape_is_refused():
    state = CloudState(points())
    with pytest.raises(ValueError, match="values of shape"): replace(state, values=state.pos)


@pytest.mark.parametrize("up", "xyz")
@pytest.mark.parametrize("stretch", [(1, 1, 1), (9, 1, 1), (1, 1, 0), (1, 0, 0)])
def test_home_shows_every_point(up, stretch):
    pos = (5 + points(200) * stretch).astype(np.float32)
    camera = home_camera(pos, up)
    for width, height in ((300, 300), (900, 300), (300, 900)):
        x, y, depth = project(pos, camera, width, height, up).T
        assert depth.min() > 0 and 0 < x.min() and x.max() < width and 0 < y.min() and y.max() < height
    wide = np.ptp(project(pos, camera, 300, 300, up)[:, :2], axis=0).max()
    assert wide > 130                                                              # and large enough to be seen


@pytest.mark.parametrize("up, axis", [("x", 0), ("y", 1), ("z", 2)])
def test_up_is_up(up, axis):
    camera = [0.7, 0.3, 4, 0, 0, 0]
    low, high = project([-0.1 * np.eye(3)[axis], 0.1 * np.eye(3)[axis]], camera, 100, 100, up)
    assert high[1] < low[1] and high[0] == pytest.approx(low[0])
    axes = cloud.camera_axes(camera, up)
    assert np.allclose(axes @ axes.T, np.eye(3)) and np.linalg.det(axes) == pytest.approx(1)


def test_one_point_and_a_constant_field():
    state = CloudState([[3, 3, 3]], [2.0])
    assert value_limits(state) == (1.5, 2.5) and cloud.point_diameter(state) > 0
    assert project(state.pos, home_camera(state.pos), 200, 200)[0, :2] == pytest.approx([100, 100])


def test_the_sample_is_small_the_same_and_holds_what_is_marked():
    state = CloudState(points(5000), budget=100, highlight=[4999, 7, 7])
    rows = drawn_rows(state)
    assert len(rows) <= 100 and {7, 4999} <= set(rows.tolist()) and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, drawn_rows(replace(state, values=np.ones(5000))))
    assert len(drawn_rows(state, full=True)) == len(drawn_rows(replace(state, budget=5000))) == 0
    traits = cloud_traits(replace(state, values=np.arange(5000)))
    assert np.array_equal(np.frombuffer(traits["values"], "<f4"), rows) and traits["total"] == 5000
    assert np.array_equal(np.frombuffer(traits["positions"], "<f4").reshape(-1, 3), state.pos[rows])


@pytest.mark.parametrize("top, code", [(255, "u1"), (256, "u2"), (65535, "u2"), (65536, "i4")])
def test_ids_travel_in_as_few_bytes_as_they_need(top, code):
    traits = cloud_traits(CloudState(points(2), [0, top], colours="balls"))
    assert traits["value_type"] == code and np.frombuffer(traits["values"], f"<{code}").tolist() == [0, top]


def test_ids_without_a_ball_are_signed():
    assert cloud_traits(CloudState(points(2), [-1, 3], colours="categories"))["value_type"] == "i4"


def test_positions_travel_once():
    state = CloudState(points())
    assert "positions" not in cloud_traits(replace(state, values=np.ones(60), highlight=[3]), since=state)
    for change in (dict(up="y"), dict(point_size=1), dict(budget=10), dict(pos=points(60, 1))):
        assert "positions" in cloud_traits(replace(state, **change), since=state), change


def scenes_of(page):
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]


def test_a_page_holds_the_numbers_and_nothing_to_load():
    state = CloudState(points(), np.arange(60.0), label="</script><b>&", unit="Pa")
    page = cloud_page({"one & two": state, "three": replace(state, values=None)}, title="A <page>", camera=[1, 0, 9, 0, 0, 0])
    first, second = scenes_of(page)
    assert np.array_equal(np.frombuffer(base64.b64decode(first["bytes"]["positions"]), "<f4").reshape(-1, 3), state.pos)
    assert first["plain"]["label"] == state.label and first["plain"]["camera"] == [1, 0, 9, 0, 0, 0] and second["bytes"]["values"] == ""
    assert "one &amp; two" in page and "A &lt;page&gt;" in page and page.count("</script>") == 3
    assert not re.search(r"https?:|(?:src|href)=\"(?!data:)|@import|url\(", page)


def test_traits_of_the_script_are_those_of_the_widget():
    pytest.importorskip("anywidget")
    groups = re.search(r"const GROUPS = \{(.*?)\n\};", SCRIPT, re.S)[1]
    heard = set(re.findall(r'"(\w+)"', groups))
    synced = set(cloud.CloudWidget(points()).traits(sync=True))
    assert heard <= synced
    sent = set(cloud_traits(CloudState(points()))) | set(cloud.VIEW) | {"camera"}
    assert sent <= synced and sent - heard == {"full"}
    numbers = re.search(r"SPLAT = \[(\d+), (\d+)\]", SCRIPT).groups() + re.search(r"FIELD_OF_VIEW = ([\d.]+);", SCRIPT).groups()
    assert tuple(map(float, numbers)) == (*cloud.SPLAT, cloud.FIELD_OF_VIEW)


@pytest.fixture
def widget(monkeypatch):
    pytest.importorskip("anywidget")
    made, sent = cloud.CloudWidget(CloudState(points(), np.arange(60.0), "height", "m")), []
    monkeypatch.setattr(made, "send_state", lambda key=None: sent.append({key} if isinstance(key, str) else set(key)))
    return made, sent


def test_recolouring_sends_values_in_one_message(widget):
    made, sent = widget
    made.show(values=np.arange(60.0)[::-1])
    assert sent == [{"values"}]
    made.show(values=2 * np.arange(60.0), label="twice")
    assert sent[1:] == [{"values", "label", "limits"}]


def test_a_new_cloud_moves_the_camera_and_a_recoloured_one_does_not(widget):
    made, _ = widget
    made.camera = [0, 0, 9, 1, 1, 1]
    assert made.show(values=None).camera == [0, 0, 9, 1, 1, 1]
    assert made.show(5 * points(30), keep_camera=True).camera == [0, 0, 9, 1, 1, 1]
    assert made.show(7 * points(30)).camera == made.home != [0, 0, 9, 1, 1, 1]


def test_what_does_not_fit_is_a_message_and_the_scene_stays(widget):
    made, sent = widget
    for bad in (dict(values=[1.0]), dict(highlight=[99]), dict(pressure=np.ones(60)), dict(state=np.full((4, 3), np.nan))):
        state = made.state
        made.show(**bad)
        assert made.message and made.state is state and sent[-1] == {"message"}
    assert made.show(values=np.ones(60)).message == ""


def test_all_points_on_demand(widget):
    made, _ = widget
    made.show(budget=10)
    assert len(made.positions) == 120 and len(made.ids) == 40
    made.full = True
    assert len(made.positions) == 720 and len(made.values) == 240 and made.ids == b""
    made.full = False
    assert len(made.positions) == 120


def test_linked_scenes_share_a_camera(widget):
    import traitlets
    made, _ = widget
    other = cloud.CloudWidget(points(), camera=[1, 0, 5, 0, 0, 0])
    link = traitlets.link((made, "camera"), (other, "camera"))
    other.camera = [2, 0, 5, 0, 0, 0]
    assert made.camera == [2, 0, 5, 0, 0, 0]
    link.unlink()


def test_without_anywidget_pages_still_work():
    program = ("import sys; sys.modules['anywidget'] = None\n"
               "from erwin_nsa.explore import cloud\n"
               "assert 'cloud.js' in str(cloud.STATIC / 'cloud.js') and len(cloud.cloud_page(cloud.CloudState([[0, 0, 1]]))) > 10000\n"
               "try: cloud.CloudWidget\n"
               "except ImportError as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and 'pip install "erwin_nsa[explore]"' in done.stdout, done.stderr
