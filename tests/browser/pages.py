"""What browser tests share: where Chromium is, how it starts, what a scene looks like now."""
import io
import shutil

import numpy as np

ARGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]   # WebGL without a graphics card


def chromium_path():
    return shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def settle(page):
    "Until the frame that was asked for is on the screen."
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def pixels(page, selector=".erwin-cloud-canvas", at=0):
    "(height, width, 3) uint8: what a scene looks like now."
    from PIL import Image
    settle(page)
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).nth(at).screenshot())).convert("RGB"))
