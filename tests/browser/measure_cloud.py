"""How long a recolouring, a pick and a click that recolours take. `python tests/browser/measure_cloud.py [points ...]` prints a table in Markdown.

Medians of five, until the graphics have finished and the next frame begins. The first two columns are the page alone; the last two go through a
kernel in JupyterLab: values sent from Python until they are drawn, and a click until the distances from the clicked point, worked out in Python, are.
"""
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from playwright.sync_api import sync_playwright

from erwin_nsa.explore.cloud import CloudState, cloud_html
from lab import Lab
from pages import ARGS, chromium_path

SIZES, REPEATS = (3_500, 32_000, 100_000, 1_000_000), 5
SCRIPT = """
window.drawn = async () => { // when what was asked for is on the screen
  const canvas = document.querySelector(".erwin-cloud-canvas"), gl = canvas.getContext("webgl2");
  await new Promise(requestAnimationFrame);
  gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4));
  await new Promise(requestAnimationFrame);
  return performance.timeOrigin + performance.now();
};
window.press = () => {
  const canvas = document.querySelector(".erwin-cloud-canvas"), at = canvas.getBoundingClientRect();
  const where = { clientX: at.x + at.width * (0.4 + 0.2 * Math.random()), clientY: at.y + at.height * (0.4 + 0.2 * Math.random()), pointerId: 1, bubbles: true };
  canvas.setPointerCapture = () => {};
  for (const kind of ["pointerdown", "pointerup"]) canvas.dispatchEvent(new PointerEvent(kind, where));
};
window.now = () => performance.timeOrigin + performance.now();
window.whenTitled = async (text) => {
  while (!document.querySelector(".erwin-cloud-title")?.textContent.includes(text)) await new Promise(requestAnimationFrame);
  return window.drawn();
};
"""
RECOLOUR = """async () => {
  const values = new Float32Array(erwinClouds[0].get("values").byteLength / 4).map(Math.random), start = now();
  erwinClouds[0].set("values", new DataView(values.buffer));
  return await drawn() - start;
}"""
PICK = "async () => { const start = now(); press(); return await drawn() - start; }"
CLICK = "async (text) => { const start = now(); press(); return await whenTitled(text) - start; }"
CELLS = ["""import numpy as np, time
from erwin_nsa.explore.cloud import CloudWidget
pos = np.random.default_rng(0).normal(size=({n}, 3)).astype(np.float32)
pos /= np.linalg.norm(pos, axis=1, keepdims=True)
scene, count = CloudWidget(pos, values=pos[:, 2], label="height", height=480), 0
def follow(change):
    global count
    count += 1
    scene.show(values=np.linalg.norm(pos - pos[change.new], axis=1), label=f"distance {{count}}")""", "scene"]


def times(measure): # median [ms]; the first one warms up
    return median([measure() for _ in range(REPEATS + 1)][1:])


def page_times(browser, n, folder):
    pos = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    pos /= np.linalg.norm(pos, axis=1, keepdims=True)
    page = browser.new_page(viewport=dict(width=940, height=640))
    page.add_init_script(SCRIPT)
    page.goto(cloud_html(CloudState(pos, pos[:, 2], "height", "-"), Path(folder) / "page.html", height=480).as_uri())
    page.wait_for_selector(".erwin-cloud-canvas[data-frames]", timeout=120_000)
    found = times(lambda: page.evaluate(RECOLOUR)), times(lambda: page.evaluate(PICK))
    page.close()
    return found


def kernel_times(browser, lab, n):
    page, name = browser.new_page(viewport=dict(width=1200, height=900)), f"cloud{n}.ipynb"
    page.add_init_script(SCRIPT)
    lab.run(page, name, [cell.format(n=n) for cell in CELLS[:1]] + CELLS[1:])
    page.wait_for_selector(".erwin-cloud-canvas[data-frames]", timeout=120_000)

    def send():
        send.count += 1
        start = lab.ask(name, "start", f"start = time.time(); scene.show(values=np.random.rand(len(pos)), label='round {send.count}')")
        return page.evaluate("text => whenTitled(text)", f"round {send.count}") - 1000 * start

    def click():
        click.count += 1
        return page.evaluate(CLICK, f"distance {click.count}")
    send.count = click.count = 0
    sent = times(send)
    lab.ask(name, "0", "scene.observe(follow, 'picked')")
    clicked = times(click)
    page.close()
    return sent, clicked


def main():
    sizes = [int(a) for a in sys.argv[1:]] or SIZES
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright, Lab(Path(folder)) as lab:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=ARGS)
        print(f"Chromium {browser.version}, software rendering (SwiftShader), {os.cpu_count()} {platform.machine()} cores, scene 910 x 480 pixels, {time.strftime('%B %Y')}\n")
        print("| points | recolour, ms | pick, ms | recolour from the kernel, ms | click, kernel, recolour, ms |\n| ---: | ---: | ---: | ---: | ---: |")
        for n in sizes:
            cells = [*page_times(browser, n, folder), *kernel_times(browser, lab, n)]
            print(f"| {n:,} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |", flush=True)
        browser.close()


if __name__ == "__main__": main()
