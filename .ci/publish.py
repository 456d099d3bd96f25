"""Build the site as it is published: run every notebook, turn its figures into plain HTML, render with Quarto, check the pages.

    python .ci/publish.py               all of it; needs Quarto
    python .ci/publish.py --pages ...   only run and check these notebooks (all if none is named), without Quarto

It works on a copy, so the notebooks of the checkout stay without outputs. Figures are plotly data and one plotly.js beside the pages: no network.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import plotly.offline

from checks import ROOT, copy_of_project
from docs import pages, shown_problems, sidebar_problems
from erwin_nsa.explore.report import PAGE_SCRIPT, execute_notebook, page_output

LIMIT = 1800 # seconds a cell may take
FLAGS = re.compile(r"^#\|\s*(notest|slow|cuda|eval:\s*false)\b", re.M) # cells that are shown and not run
SCRIPT = """```{{=html}}
<script>window.kept = window.define; window.define = undefined;</script>
<script src="{up}plotly.min.js"></script>
<script>window.define = window.kept;</script>
<script>{script}</script>
```"""


def run_notebook(path:Path, copy:Path, out:Path) -> None: # path: in the copy; out: folder for what it writes
    "Run a notebook in place, flagged cells left out."
    notebook = nbformat.read(path, as_version=4)
    sources = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == "code" and FLAGS.search(cell.source): cell.source = ""
    nbformat.write(notebook, path)
    env = dict(ERWIN_NSA_OUT=str(out), OMP_NUM_THREADS="1", PYTHONPATH=str(copy), TRITON_INTERPRET="1")
    try: execute_notebook(path, path, env=env, timeout=LIMIT)
    finally:
        notebook = nbformat.read(path, as_version=4)
        for cell, source in zip(notebook.cells, sources): cell.source = source
        nbformat.write(notebook, path)


def plain_figures(path:Path, nbs:Path) -> int: # number of figures
    "Figures as places in the page, each beside its data, and one script that draws those in sight."
    notebook, plots = nbformat.read(path, as_version=4), []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            before = len(plots)
            output.update(page_output(output, plots))
            for number in range(before, len(plots)):
                data = json.dumps(plots[number]).replace("<", "\\u003c")
                output["data"]["text/html"] += f'<script type="application/json" id="plot-{number}-data">{data}</script>'
    if plots:
        up = "../" * len(path.relative_to(nbs).parent.parts)
        notebook.cells.append(nbformat.v4.new_markdown_cell(SCRIPT.format(up=up, script=PAGE_SCRIPT)))
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)
    return len(plots)


def fill(names:list, copy:Path, out:Path) -> list: # complaints
    "Run and convert notebooks of the copy; a failing one does not stop the others."
    found = []
    for name in names:
        path = copy / "nbs" / name
        print(f"\n== {name}", flush=True)
        try: run_notebook(path, copy, out)
        except Exception as error: found.append(f"nbs/{name}: {type(error).__name__} while it ran")
        print(f"{plain_figures(path, copy / 'nbs')} figures", flush=True)
        found += [f"nbs/{name}: {problem}" for problem in shown_problems(nbformat.read(path, as_version=4), name)]
    return found


def render(copy:Path) -> None:
    "The pages by Quarto, moved into _docs of the checkout."
    shutil.copy2(ROOT / "llms.txt", copy / "nbs/llms.txt")
    (copy / "nbs/plotly.min.js").write_text(plotly.offline.get_plotlyjs(), encoding="utf-8")
    env = os.environ | dict(PYTHONPATH=str(copy), PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["nbdev_docs"], cwd=copy, env=env, check=True)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    shutil.move(copy / "_docs", ROOT / "_docs")


def main() -> int: # exit status
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", nargs="*", metavar="NOTEBOOK", help="paths below nbs, such as nn/04_local.ipynb")
    chosen = parser.parse_args().pages
    if chosen is None and shutil.which("quarto") is None:
        print("publish: there is no quarto on PATH; install it, or check pages without it: python .ci/publish.py --pages", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as out:
        copy = copy_of_project(Path(folder))
        for name in ("data", "tests", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile"): (copy / name).symlink_to(ROOT / name)
        found = fill(chosen or [str(p.relative_to(ROOT / "nbs")) for p in pages() if p.suffix == ".ipynb"], copy, Path(out)) + sidebar_problems()
        if chosen is None and not found: render(copy)
    print("\n".join(f"  {line}" for line in found))
    print(f"publish: {len(found)} problem{'s' * (len(found) != 1)}" + ("" if found or chosen is not None else f"; built in {ROOT / '_docs'}"))
    return int(bool(found))


if __name__ == "__main__": sys.exit(main())
