"""README.md, CONTRIBUTING.md and llms.txt from the notebooks, without Quarto. `python .ci/readme.py` writes them."""
import configparser
import re
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.ipynb", "CONTRIBUTING.md": "contributing.ipynb"}
HIDDEN = re.compile(r"^#\|\s*(hide|slow|export|default_exp)\b", re.M)
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)(\))")


def output_text(output) -> str: # plain text of one output, or ""
    if output.output_type == "stream": return output.text.rstrip()
    return output.get("data", {}).get("text/plain", "").rstrip()


def cell_text(cell) -> str: # markdown of one cell, or "" where it is hidden
    "Markdown with links seen from the root; code in a fence, its output in another."
    if cell.cell_type == "markdown": return LINK.sub(r"\1nbs/\2\3", cell.source).replace("](nbs/../", "](").strip()
    if cell.cell_type != "code" or HIDDEN.search(cell.source): return ""
    code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
    outputs = "\n".join(filter(None, map(output_text, cell.outputs)))
    return f"```python\n{code}\n```" + (f"\n\n```text\n{outputs}\n```" if outputs else "")


def readme_text(notebook:Path) -> str: # the README
    "The visible cells of a notebook as one markdown page for GitHub."
    cells = filter(None, map(cell_text, nbformat.read(notebook, as_version=4).cells))
    return f"<!-- made from nbs/{notebook.name} by `make readme`; edit the notebook -->\n\n" + "\n\n".join(cells) + "\n"


def title_of(path:Path) -> tuple: # title, one sentence
    "What a page calls itself: its heading and the quotation below, or its front matter."
    if path.suffix == ".qmd":
        about = yaml.safe_load(path.read_text(encoding="utf-8").split("---")[1])
        return about["title"], about.get("description", "")
    first = next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    return tuple(found[1].strip() if (found := re.search(pattern, first, re.M)) else "" for pattern in (r"^# (.+)$", r"^> (.+)$"))


def llms_text(root:Path) -> str: # llms.txt
    "Every page of the sidebar by room: address, title, one sentence; for readers that are programs."
    settings = configparser.ConfigParser()
    settings.read(root / "settings.ini")
    s = settings["DEFAULT"]
    site = s["doc_host"] + s["doc_baseurl"]
    lines = [f"# {s['title']}", "", f"> {s['description']}.", "",
             "A Python package and the notebooks it is exported from: `nbs/<room>/NN_<name>.ipynb` is `erwin_nsa/<room>/<name>.py`. Shapes and units stand beside every argument. "
             "Rooms import downward only: geometry, kernels, nn, train, explore; data needs geometry alone."]
    def line(entry): return f"- [{title_of(root / 'nbs' / entry)[0]}]({site}/{entry.rpartition('.')[0]}.html): {title_of(root / 'nbs' / entry)[1]}"
    contents = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    start = [entry for entry in contents if isinstance(entry, str)]
    for name, entries in [("Start", start)] + [(part["section"], part["contents"]) for part in contents if not isinstance(part, str)]:
        lines += ["", f"## {name}", "", *map(line, entries)]
    return "\n".join(lines) + "\n"


def texts(root:Path) -> dict: # file -> what it must hold
    return {name: readme_text(root / "nbs" / notebook) for name, notebook in PAGES.items()} | {"llms.txt": llms_text(root)}


if __name__ == "__main__":
    for name, text in texts(ROOT).items(): (ROOT / name).write_text(text, encoding="utf-8")
    print("readme: wrote README.md, CONTRIBUTING.md and llms.txt")
    sys.exit(0)
