"""The page of `erwin-nsa explore --html` in Chromium, from disk: its numbers, its controls, its pixels, and names that must stay text."""
import numpy as np
import pytest
import torch

from conftest import pixels, settle
from erwin_nsa.data.store import CloudSample
from erwin_nsa.explore import page as pg
from erwin_nsa.explore.probe import ranked_balls
from erwin_nsa.nn.config import ErwinNSAConfig
from erwin_nsa.nn.tasks import SurfaceModel

NASTY = "</script><img src=x onerror=alert(1)>&\"'{title}"
RIGHT = ".erwin-cloud-canvas"


@pytest.fixture(scope="module")
def view():
    torch.manual_seed(0)
    model = SurfaceModel(ErwinNSAConfig(c_in=8, c_hidden=16, depth=2, num_heads=4, num_kv_heads=2, head_dim=4, local_ball_size=32, compressed_ball_size=8, num_selected_balls=3, mp_steps=1))
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))       # as if it had been trained
    pos = np.random.default_rng(0).normal(size=(400, 3)) * 3 + 5
    return pg.make_view(model, CloudSample(pos, None, pos[:, :1], NASTY), pg.CloudScale((5.,) * 3, (3.,) * 3, f"from {NASTY}", "m", (0., 1.), "Pa"))


@pytest.fixture
def shown(view, open_page, tmp_path):
    path = pg.write_page(view, tmp_path / "a page #1.html", count=3)
    page = open_page(path)
    page.wait_for_function("[...document.querySelectorAll('.erwin-cloud-canvas')].filter((c) => c.dataset.frames > 0).length === 2")
    return page, pg.spread_points(view.cloud.pos, 3)


def test_numbers_of_every_choice_are_those_of_the_probe(view, shown):
    page, queries = shown
    assert NASTY in page.inner_text("h1") and page.title().endswith(NASTY) and page.locator("img").count() == 0
    for query, point in enumerate(queries):
        for layer in range(2):
            for branch in ("compressed", "selected", "local", "gated"):
                for box, choice in (("#query", query), ("#layer", layer), ("#branch", branch)): page.select_option(box, str(choice))
                drawn = page.evaluate("() => { const v = erwinClouds[1].get('values'); return [...new Float32Array(v.buffer, v.byteOffset, v.byteLength / 4)]; }")
                true = view.probe.rows(int(point), layer).on_points(branch, "mean").numpy()
                np.testing.assert_allclose(drawn, true, rtol=.03, atol=3e-6 * true.max())
            assert page.locator("#balls tr").count() == 1 + len(ranked_balls(view.probe.rows(int(point), layer)))
            assert page.locator("#gates .bars i").count() == 12
            assert f"read from point {point}" in page.inner_text("#right-title") and page.evaluate("erwinClouds[0].get('picked')") == point


def test_pixels_follow_the_controls(shown):
    page, _ = shown
    first = pixels(page, RIGHT, 1)
    assert (np.abs(first.astype(int) - first[0, 0]).max(2) > 12).mean() > .02           # not blank
    seen = [first]
    for box, choice in (("#branch", "selected"), ("#layer", "0"), ("#query", "2"), ("#scale", "linear")):
        page.select_option(box, choice)
        seen.append(pixels(page, RIGHT, 1))
        assert (seen[-1] != seen[-2]).any(2).mean() > .002, box
    left = pixels(page, RIGHT, 0)
    page.select_option("#field", "2")
    assert (pixels(page, RIGHT, 0) != left).any(2).mean() > .01
    assert "error [Pa]" in page.inner_text("main section:first-child")


def test_clicks_pick_the_nearest_query_and_say_so(view, shown):
    page, queries = shown
    other = next(i for i in range(400) if i not in queries)
    page.evaluate("(id) => erwinClouds[1].set('picked', id)", other)
    settle(page)
    nearest = queries[np.linalg.norm(view.cloud.pos[queries] - view.cloud.pos[other], axis=1).argmin()]
    assert page.inner_text("#note").startswith(f"Point {other} was not computed. Shown is the nearest of the 3 that were: point {nearest}, ")
    assert page.evaluate("erwinClouds.map((c) => c.get('picked'))") == [nearest, nearest]
    page.evaluate("(id) => erwinClouds[0].set('picked', id)", int(queries[2]))
    settle(page)
    assert page.inner_text("#note") == "" and page.input_value("#query") == "2"
    box = page.locator(RIGHT).nth(1).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    settle(page)
    assert page.evaluate("erwinClouds[1].get('picked')") in queries
    page.locator("#layer").focus()
    page.keyboard.press("ArrowUp")                                                       # controls work from the keyboard
    assert "block 0" in page.inner_text("#right-title")
