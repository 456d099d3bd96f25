"""A JupyterLab of its own for a test session: random port and token, no settings of the user, a second client to each kernel."""
import ast
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
from jupyter_client import BlockingKernelClient

WAIT = 120 # seconds
IDLE = """() => {
  const panel = window.jupyterapp.shell.currentWidget, kernel = panel.sessionContext.session?.kernel;
  const cells = panel.content.widgets.filter((cell) => cell.model.type === "code" && cell.model.sharedModel.source.trim());
  return kernel?.status === "idle" && cells.every((cell) => cell.model.executionCount !== null);
}"""


def _end_with_parent(): # Linux: no server is left behind when a test run is killed
    if sys.platform == "linux": ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Lab:
    def __init__(self, folder:Path):
        self.root, self.own = folder / "notebooks", folder / "jupyter"
        self.root.mkdir()
        news = self.own / "settings" / "@jupyterlab" / "apputils-extension"
        news.mkdir(parents=True)
        (news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.token, self.clients = secrets.token_hex(16), {}

    def __enter__(self):
        places = dict(CONFIG_DIR="config", RUNTIME_DIR="runtime", DATA_DIR="data")
        env = os.environ | {f"JUPYTER_{key}": str(self.own / name) for key, name in places.items()} | {"JUPYTER_TOKEN": self.token}
        env |= dict(JUPYTERLAB_SETTINGS_DIR=str(self.own / "settings"), JUPYTERLAB_WORKSPACES_DIR=str(self.own / "workspaces"))
        self.log = (self.own / "log.txt").open("wb")
        root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={self.port}", "--ServerApp.port_retries=0", *root,
             f"--ServerApp.root_dir={self.root}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"],
            env=env, stdout=self.log, stderr=self.log, preexec_fn=_end_with_parent)
        end = time.monotonic() + WAIT
        while True:
            try: return self.get("/api/status") and self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end: raise RuntimeError((self.own / "log.txt").read_text())
                time.sleep(0.2)

    def __exit__(self, *error):
        for client in self.clients.values(): client.stop_channels()
        self.process.terminate()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill()
        self.log.close()

    def get(self, path:str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}?token={self.token}", timeout=10) as answer: return json.load(answer)

    def run(self, page, name:str, cells:list) -> None:
        "Write a notebook, open it in the page and run it to its end."
        spec = dict(name="python3", display_name="Python 3", language="python")
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=dict(kernelspec=spec)), self.root / name)
        page.goto(f"http://127.0.0.1:{self.port}/doc/tree/{name}?token={self.token}&reset")
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext", timeout=1000 * WAIT)
        page.evaluate("""async () => {
          const panel = window.jupyterapp.shell.currentWidget;
          await panel.context.ready; await panel.sessionContext.ready;
          await window.jupyterapp.commands.execute("notebook:run-all-cells");
        }""")
        page.wait_for_function(IDLE, timeout=1000 * WAIT)

    def ask(self, name:str, expression:str, code:str=""):
        "Run code in a notebook's kernel, then the value of an expression there."
        if name not in self.clients:
            kernel = next(session["kernel"]["id"] for session in self.get("/api/sessions") if session["path"] == name)
            self.clients[name] = BlockingKernelClient(connection_file=str(self.own / "runtime" / f"kernel-{kernel}.json"))
            self.clients[name].load_connection_file()
            self.clients[name].start_channels()
        answer = self.clients[name].execute_interactive(code, user_expressions=dict(value=expression), store_history=False, timeout=WAIT, output_hook=lambda message: None)
        content = answer["content"]
        if content["status"] != "ok" or content["user_expressions"]["value"]["status"] != "ok": raise RuntimeError(str(content))
        return ast.literal_eval(content["user_expressions"]["value"]["data"]["text/plain"])
