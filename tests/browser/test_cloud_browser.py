"""The point cloud widget in Chromium: pages from disk, then a real JupyterLab. Run: make test-browser."""
import base64
import io
from dataclasses import replace

import numpy as np
import pytest

from erwin_nsa.data.bodies import load_bodies
from erwin_nsa.explore.cloud import SPLAT, CloudState, box_segments, cloud_html, colour_table, drawn_rows, home_camera, point_diameter, project
from pages import pixels, settle

FIVE = CloudState([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], range(5), "kind", colours="categories", point_size=0.2)
LIGHT, DARK = (247, 248, 250), (20, 22, 26)


@pytest.fixture(scope="module")
def body():
    sample = load_bodies("test")[0]
    return CloudState(sample.pos, sample.pressure, "pressure", "Pa", colours="diverging", up="y")


@pytest.fixture
def show(open_page, tmp_path):
    "Write a page and open it in Chromium."
    def opened(states, init="", ready=".erwin-cloud-canvas[data-frames]", context=None, **page):
        return open_page(cloud_html(states, tmp_path / "page.html", **dict(theme="light", height=400) | page), init, ready, **context or {})
    return opened


def get(page, trait, at=0): return page.evaluate("([at, trait]) => erwinClouds[at].get(trait)", [at, trait])


def put(page, trait, value, at=0):
    if isinstance(value, np.ndarray):
        page.evaluate("""([at, trait, text]) => erwinClouds[at].set(trait, new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer))""",
                      [at, trait, base64.b64encode(value.tobytes()).decode()])
    else: page.evaluate("([at, trait, value]) => erwinClouds[at].set(trait, value)", [at, trait, value])
    settle(page)


def covered(picture, ground=LIGHT): # share of pixels that are not background
    return (np.abs(picture.astype(int) - ground).max(2) > 12).mean()


def size(page):
    box = page.locator(".erwin-cloud-canvas").first.bounding_box()
    return box["width"], box["height"]


def click(page, x, y):
    page.locator(".erwin-cloud-canvas").first.click(position=dict(x=x, y=y))
    settle(page)
    return get(page, "picked")


def front(state, page, x, y): # id of the frontmost point whose disc holds (x, y), by the numpy projection
    width, height = size(page)
    across, down, depth = project(state.pos, get(page, "camera"), width, height, state.up).T
    radius = np.clip(point_diameter(state) * min(width, height) / 2 / np.tan(0.35) / depth, *SPLAT) / 2
    inside = np.flatnonzero(np.hypot(across - x, down - y) <= radius)
    return int(inside[depth[inside].argmin()])


def test_a_scene_is_not_blank_and_recolours(show, body):
    page = show(body)
    before = pixels(page)
    assert 0.05 < covered(before) < 0.6 and len(np.unique(before.reshape(-1, 3), axis=0)) > 500
    put(page, "values", -body.values)
    after = pixels(page)
    changed = (before != after).any(2)
    assert changed.mean() > 0.05 and abs(covered(before) - covered(after)) < 0.01         # other colours in the same places
    put(page, "limits", [-1e6, 1e6])
    assert len(np.unique(pixels(page).reshape(-1, 3), axis=0)) < len(np.unique(after.reshape(-1, 3), axis=0))
    assert page.locator(".erwin-cloud-tick").first.inner_text() == "−10⁶"


def test_click_and_hover_find_the_point_that_is_seen(show):
    page = show(FIVE)
    places = project(FIVE.pos, get(page, "camera"), *size(page))
    picture = pixels(page)
    for point, (x, y, _) in enumerate(places):
        assert np.abs(picture[round(y), round(x)].astype(int) - colour_table("categories")[point]).max() < 30, "the shader and numpy project alike"
        page.locator(".erwin-cloud-canvas").hover(position=dict(x=x, y=y))
        settle(page)
        assert get(page, "hovered") == point
        assert click(page, x, y) == point
        assert page.locator(".erwin-cloud-status").inner_text().startswith(f"point {point}: {point} at")
    assert click(page, 5, 395) == 4                                                       # nothing there: the last one stays


@pytest.mark.parametrize("ratio", [1, 2])
def test_picks_on_a_body_are_exact(show, body, ratio):
    page = show(body, context=dict(device_scale_factor=ratio))
    assert page.evaluate("() => document.querySelector('canvas').width / document.querySelector('canvas').clientWidth") == ratio
    places = project(body.pos, get(page, "camera"), *size(page), up="y")
    for x, y, _ in places[np.random.default_rng(0).choice(len(places), 12, replace=False)]:
        x, y = round(x), round(y)
        assert click(page, x, y) == front(body, page, x, y)


def test_keys_move_the_camera_and_pick(show):
    page = show(FIVE)
    home = get(page, "camera")
    page.locator(".erwin-cloud-canvas").focus()
    assert page.evaluate("() => getComputedStyle(document.querySelector('canvas')).outlineStyle") == "solid"
    for key, part, sign in (("ArrowLeft", 0, 1), ("ArrowRight", 0, -1), ("ArrowDown", 1, 1), ("ArrowUp", 1, -1), ("+", 2, -1), ("-", 2, 1)):
        before = get(page, "camera")
        page.keyboard.press(key)
        assert sign * (get(page, "camera")[part] - before[part]) > 0, key
    before = pixels(page)
    page.keyboard.press("Shift+ArrowRight")
    assert get(page, "camera")[3:] != home[3:] and (before != pixels(page)).any()
    page.keyboard.press("r")
    assert get(page, "camera") == pytest.approx(home)
    put(page, "camera", [*home[:3], 0, 0, 1])                                             # point 3 in the middle
    page.keyboard.press("Enter")
    assert get(page, "picked") == 3
    page.keyboard.press("Escape")
    assert get(page, "picked") == -1


def test_mouse_turns_moves_and_zooms(show):
    page = show(FIVE)
    box = page.locator(".erwin-cloud-canvas").bounding_box()
    x, y, home = box["x"] + 60, box["y"] + 60, get(page, "camera")

    def drag():
        page.mouse.move(x, y); page.mouse.down(); page.mouse.move(x + 80, y + 40, steps=4); page.mouse.up()
        return get(page, "camera")
    page.mouse.move(x, y)
    page.mouse.wheel(0, 200)
    assert get(page, "camera") == home, "without focus the page scrolls"
    turned = drag()
    assert turned[0] < home[0] and turned[1] > home[1] and turned[2:] == home[2:] and get(page, "picked") == -1
    page.mouse.wheel(0, 200)
    page.wait_for_function("far => erwinClouds[0].get('camera')[2] > far", arg=home[2])
    page.keyboard.down("Shift")
    moved = drag()
    assert moved[:2] == turned[:2] and moved[3:] != turned[3:]
    page.keyboard.up("Shift")
    page.get_by_role("button", name="Reset").click()
    assert get(page, "camera") == pytest.approx(home)


def test_two_fingers_zoom(show):
    page = show(FIVE, context=dict(has_touch=True))
    devtools, far = page.context.new_cdp_session(page), get(page, "camera")[2]
    touch = lambda kind, *points: devtools.send("Input.dispatchTouchEvent", dict(type=kind, touchPoints=[dict(x=x, y=200, id=i) for i, x in enumerate(points)]))
    touch("touchStart", 300, 400)
    for step in range(1, 6): touch("touchMove", 300 - 10 * step, 400 + 10 * step)
    touch("touchEnd")
    assert get(page, "camera")[2] < 0.8 * far


def test_marks_are_drawn(show, body):
    page = show(body)
    before = pixels(page)
    marks = dict(spheres=np.float32([[0, 0.7, 0, 0.9]]), sphere_colours=np.uint8([[213, 94, 0]]))
    for name, value in marks.items(): put(page, name, value)
    sphere = pixels(page)
    assert 0.02 < (before != sphere).any(2).mean() < 0.5
    put(page, "segments", box_segments(body.pos.min(0), body.pos.max(0)))
    boxed = pixels(page)
    assert 0.001 < (sphere != boxed).any(2).mean() < 0.1
    put(page, "highlight", np.int32([0, 500, 1000, 1500]))
    assert (boxed != pixels(page)).any()
    put(page, "picked", 1000)
    ring, drawn = pixels(page), page.get_attribute("canvas", "data-frames")
    assert (np.abs(ring.astype(int) - (209, 0, 107)).max(2) < 3).sum() > 20               # the accent colour of the picked point
    put(page, "picked", 1001)
    assert page.get_attribute("canvas", "data-frames") == drawn and (ring != pixels(page)).any(), "the ring moves, the cloud is not drawn again"


def test_a_lost_context_comes_back_as_it_was(show, body):
    page = show(replace(body, spheres=[[0, 0.7, 0, 0.9]], highlight=[3, 5]))
    before = pixels(page)
    page.evaluate("() => { window.loss = document.querySelector('canvas').getContext('webgl2').getExtension('WEBGL_lose_context'); loss.loseContext(); }")
    page.wait_for_selector(".erwin-cloud-note:not([hidden])")
    assert "took the graphics memory back" in page.locator(".erwin-cloud-note").inner_text()
    put(page, "label", "changed meanwhile")
    page.evaluate("() => loss.restoreContext()")
    page.wait_for_selector(".erwin-cloud-note", state="hidden")
    assert (pixels(page) == before).all() and page.locator(".erwin-cloud-title").inner_text() == "changed meanwhile [Pa]"
    page.evaluate("() => loss.loseContext()")                                             # and where the browser does not restore it
    page.get_by_role("button", name="Rebuild").click()
    assert (pixels(page) == before).all()


def test_themes(show, body):
    page = show(body)
    assert tuple(pixels(page)[-30, 5]) == LIGHT
    put(page, "theme", "dark")
    assert tuple(pixels(page)[-30, 5]) == DARK and covered(pixels(page), DARK) > 0.05
    text, ground = page.evaluate("() => ['color', 'backgroundColor'].map((k) => getComputedStyle(document.querySelector('.erwin-cloud-root'))[k])")
    assert text == "rgb(232, 234, 237)" and ground == "rgb(20, 22, 26)"
    put(page, "theme", "auto")
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("canvas[data-theme=dark]")
    page.emulate_media(color_scheme="light")
    page.wait_for_selector("canvas[data-theme=light]")


def test_size_follows_the_page(show, body):
    page = show(body)
    wide = size(page)
    page.set_viewport_size(dict(width=480, height=700))
    page.wait_for_function("wide => document.querySelector('canvas').width < wide", arg=wide[0])
    settle(page)
    width, height = size(page)
    assert page.evaluate("() => [document.querySelector('canvas').width, document.querySelector('canvas').height]") == [round(width), round(height)]
    assert covered(pixels(page)) > 0.03
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_four_scenes_live_and_a_fifth_may_take_over(show):
    page = show({str(i): FIVE for i in range(5)}, context=dict(viewport=dict(width=1300, height=1100)), linked=False)
    assert page.locator("canvas").count() == 4 and "4 scenes are live" in page.locator(".erwin-cloud-note").nth(4).inner_text()
    page.get_by_role("button", name="Show this one").click()
    page.wait_for_selector("section:nth-of-type(5) canvas[data-frames]")
    assert page.locator("canvas").count() == 4 and page.locator("section").nth(0).locator("canvas").count() == 0
    assert covered(pixels(page, at=3)) > 0.005
    page.get_by_role("button", name="Show this one").click()
    page.wait_for_selector("section:nth-of-type(1) canvas[data-frames]")


def test_scenes_share_a_camera(show):
    page = show({"one": FIVE, "two": FIVE})
    page.locator("canvas").nth(1).focus()
    page.keyboard.press("ArrowLeft")
    assert get(page, "camera", 0) == get(page, "camera", 1) != home_camera(FIVE.pos)


def test_what_does_not_fit_is_said_in_place_of_the_scene(show):
    page = show(FIVE)
    note = page.locator(".erwin-cloud-note")
    for trait, bad, says in (("values", np.uint8([1, 2]), "2 values for 5 points"), ("limits", [2, 1], "the lower first"), ("camera", [0, 0, 1], "a target of three numbers"),
                             ("message", "given: a model for 3 features", "3 features")):
        good = page.evaluate("trait => { window.kept = erwinClouds[0].get(trait); return trait; }", trait)
        put(page, trait, bad)
        assert says in note.inner_text() and note.is_visible()
        page.evaluate("trait => erwinClouds[0].set(trait, kept)", good)
        settle(page)
        assert note.is_hidden()
    put(page, "picked", 77)
    assert "point 77 does not exist: ids run from 0 to 4" in page.locator(".erwin-cloud-status").inner_text()


def test_no_webgl2(show):
    page = show(FIVE, init="HTMLCanvasElement.prototype.getContext = () => null", ready=".erwin-cloud-note:not([hidden])")
    assert "a browser without WebGL2" in page.locator(".erwin-cloud-note").inner_text() and page.locator("canvas").count() == 0


def test_a_sample_of_a_large_cloud_says_so_and_keeps_ids(show):
    large = CloudState(np.random.default_rng(0).random((3000, 3)), budget=40, highlight=[2999])
    page, rows = show(large), drawn_rows(large)
    assert page.locator(".erwin-cloud-amount").inner_text() == "40 of 3,000 points shown"
    places = project(large.pos[rows], get(page, "camera"), *size(page))
    nearest = places[:, 2].argmin()
    assert click(page, *places[nearest, :2]) == rows[nearest]
    page.mouse.move(1, 1)
    page.wait_for_function("() => erwinClouds[0].get('hovered') === -1")
    put(page, "picked", int(np.setdiff1d(range(3000), rows)[0]))
    assert "not among the points shown" in page.locator(".erwin-cloud-status").inner_text()


def test_a_picture_has_the_scene_and_its_legend(show, body):
    from PIL import Image
    page = show(body)
    with page.expect_download() as download: page.get_by_role("button", name="PNG").click()
    data = download.value.path().read_bytes()
    picture, scene = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), pixels(page)
    assert picture.shape[1] == round(size(page)[0]) and picture.shape[0] == 400 + 64
    assert covered(picture[:400]) > 0.05 and covered(picture[400:]) > 0.02
    assert (picture[100:380, :-200] == scene[100:380, :-200]).mean() > 0.99


def test_legends(show):
    shares = np.float32([0, 1e-6, 1e-3, 0.1, 1])
    log = replace(FIVE, values=shares, label="weight", unit="-", colours="viridis", scale="log", limits=(1e-4, 1))
    page = show(log)
    assert page.locator(".erwin-cloud-tick").all_inner_texts() == ["10⁻⁴", "10⁻³", "10⁻²", "0.1", "1"]
    assert page.locator(".erwin-cloud-key").all_inner_texts() == ["0"]
    boxes = page.evaluate("() => Array.from(document.querySelectorAll('.erwin-cloud-tick'), (t) => t.getBoundingClientRect()).map((r) => [r.left, r.right])")
    assert all(left[1] + 3 < right[0] for left, right in zip(boxes, boxes[1:])), "labels do not touch"
    few = show(replace(FIVE, values=[-1, 0, 1, 2, 0], names=("compressed", "selected", "local")))
    assert few.locator(".erwin-cloud-key").all_inner_texts() == ["compressed", "selected", "local", "none"]
    assert few.locator(".erwin-cloud-bar").count() == 0
    many = show(replace(FIVE, values=[0, 1, 2, 3, 200], colours="balls", label="ball"))
    assert many.locator(".erwin-cloud-title").inner_text() == "ball: 201 ids, colours repeat after 53"


CELLS = ["""import numpy as np
from erwin_nsa.explore.cloud import CloudWidget, home_camera, project
corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], float)
scene = CloudWidget(corners, values=[0., 1, 2, 3, 4], label="height", unit="m", point_size=0.2, height=400, theme="light")""",
         "scene", "other = CloudWidget(corners, height=200); other", "import traitlets; link = traitlets.link((scene, 'camera'), (other, 'camera'))"]


def test_the_widget_in_jupyterlab(lab, chromium, tmp_path):
    context = chromium.new_context(viewport=dict(width=1200, height=1000))
    page = context.new_page()
    lab.run(page, "cloud.ipynb", CELLS)
    canvas = page.locator(".erwin-cloud-canvas").first
    page.wait_for_selector(".erwin-cloud-canvas[data-frames]")
    before = pixels(page)
    assert covered(before) > 0.01
    x, y, _ = lab.ask("cloud.ipynb", f"project(corners, scene.camera, {canvas.bounding_box()['width']}, {canvas.bounding_box()['height']})[4].tolist()")
    canvas.click(position=dict(x=x, y=y))
    page.wait_for_function("() => document.querySelector('.erwin-cloud-status').textContent.includes('point 4: 4 m')")
    assert lab.ask("cloud.ipynb", "scene.picked") == 4
    frames = int(canvas.get_attribute("data-frames"))
    lab.ask("cloud.ipynb", "0", "scene.show(values=[4., 3, 2, 1, 0], label='depth')")
    page.wait_for_function("frames => Number(document.querySelector('canvas').dataset.frames) > frames", arg=frames)
    assert (before != pixels(page)).any(2).mean() > 0.002 and page.locator(".erwin-cloud-title").first.inner_text() == "depth [m]"
    light = covered(pixels(page, at=1))
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
    page.wait_for_selector(".erwin-cloud-canvas[data-theme=dark]")
    page.wait_for_function("() => Array.from(document.querySelectorAll('canvas'), (c) => c.width === c.clientWidth && c.width > 500).every(Boolean)")
    assert covered(pixels(page, at=1), DARK) == pytest.approx(light, rel=0.4) and 0.01 < covered(pixels(page)) < 0.5   # the first was asked to stay light
    canvas.focus()
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert lab.ask("cloud.ipynb", "scene.camera == other.camera != scene.home")
    lab.ask("cloud.ipynb", "0", f"scene.show(values=[1.]); scene.screenshot({str(tmp_path / 'scene.png')!r})")
    page.wait_for_selector(".erwin-cloud-note:not([hidden])")
    assert "1 values for 5 points" in page.locator(".erwin-cloud-note").first.inner_text()
    lab.ask("cloud.ipynb", "0", f"scene.show(values=[1., 2, 3, 4, 5]); scene.screenshot({str(tmp_path / 'scene.png')!r})")
    page.wait_for_function("() => document.querySelector('.erwin-cloud-note').hidden")
    for _ in range(50):
        if (tmp_path / "scene.png").exists(): break
        page.wait_for_timeout(100)
    assert (tmp_path / "scene.png").read_bytes().startswith(b"\x89PNG")
    context.close()
