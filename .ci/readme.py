"""README.md from nbs/index.ipynb, without Quarto. `python .ci/readme.py` writes it."""
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
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
    return "<!-- made from nbs/index.ipynb by `make readme`; edit the notebook -->\n\n" + "\n\n".join(cells) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_text(ROOT / "nbs/index.ipynb"), encoding="utf-8")
    print("readme: wrote README.md")
    sys.exit(0)
