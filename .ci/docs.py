"""Check the pages of the site where Quarto is missing: they convert, links resolve, the sidebar is complete, no output is an error."""
import copy
import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
LIMIT = 3_000_000 # bytes of a page
PLOTLY = "application/vnd.plotly.v1+json"
LARGE = {} # page -> why it may have more
LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|<(?:img|a|script|iframe)\b[^>]*?\b(?:src|href)=[\"']([^\"']+)")


def pages() -> list: # files that become pages, notebooks and others
    found = [p for pattern in ("*.ipynb", "*.qmd") for p in NBS.rglob(pattern)]
    return sorted(p for p in found if not any(part[0] in "._" for part in p.relative_to(NBS).parts))


def without_code(text:str) -> str: # markdown without code
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S))


def markdown(path:Path) -> list: # (place, text) of every piece of markdown in a page, included files too
    if path.suffix == ".ipynb":
        return [(f"cell {i}", c.source) for i, c in enumerate(nbformat.read(path, as_version=4).cells) if c.cell_type == "markdown"]
    def include(found):
        target = path.parent / found[1]
        return target.read_text(encoding="utf-8") if target.is_file() else f"[included]({found[1]})"
    return [("page", re.sub(r"\{\{<\s*include\s+(\S+)\s*>\}\}", include, path.read_text(encoding="utf-8")))]


def slug(heading:str) -> str: # the anchor Quarto gives a heading
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    text = re.sub(r"[^\w\s.-]", "", text.replace("`", "").replace("*", ""))
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text.strip()))


def anchors(path:Path) -> set: # anchors of a page
    text = re.sub(r"^(```|~~~).*?^\1", "", "\n".join(t for _, t in markdown(path)), flags=re.M | re.S)
    return {slug(h) for h in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.M)} | set(re.findall(r"\{#([\w-]+)", text))


def link_problem(page:Path, link:str) -> str: # complaint, or "" for a link that resolves or leaves the site
    if re.match(r"[a-z][a-z0-9+.-]*:|//", link): return ""
    name, _, anchor = unquote(link).partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists(): return f"link to {link}: no such file"
    if not target.is_relative_to(ROOT): return f"link to {link}: leaves the project"
    if not target.is_relative_to(NBS): return f"link to {link}: is no part of the site; use the address of the file in the repository"
    if anchor and target.suffix in (".ipynb", ".qmd") and anchor not in anchors(target): return f"link to {link}: no such heading"
    return ""


def output_problems(notebook) -> list: # complaints about outputs: errors, and what would not show without a network
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error": found.append(f"cell {number}: its output is the error {output.ename}")
            shown = "".join(output.get("data", {}).get("text/html", ""))
            for link in re.findall(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']((?:https?:)?//[^\"']+)", shown):
                found.append(f"cell {number}: its output loads {link}")
    return found


def page_size(notebook) -> int: # bytes
    "What a reader downloads: the page, and the data of figures that only become HTML when the site is built."
    notebook, figures = copy.deepcopy(notebook), 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if PLOTLY not in output.get("data", {}): continue
            figures += len(json.dumps(output["data"][PLOTLY]))
            output["data"] = nbformat.from_dict({"text/plain": "figure"})
    return figures + len(HTMLExporter(template_name="basic").from_notebook_node(notebook)[0].encode())


def shown_problems(notebook, name:str) -> list: # complaints about what a notebook shows; name: below nbs
    found, size = output_problems(notebook), page_size(notebook)
    if size <= LIMIT or name in LARGE: return found
    return found + [f"the page has {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}; make it smaller, or say why in LARGE of .ci/docs.py"]


def page_problems(page:Path) -> list: # complaints about one page
    found = [f"{place}: {problem}" for place, text in markdown(page) for a, b in LINK.findall(without_code(text)) if (problem := link_problem(page, a or b))]
    return found if page.suffix != ".ipynb" else found + shown_problems(nbformat.read(page, as_version=4), page.relative_to(NBS).as_posix())


def sidebar_entries(node) -> list: # every file named below a sidebar node
    if isinstance(node, str): return [node]
    if isinstance(node, list): return [entry for part in node for entry in sidebar_entries(part)]
    return sidebar_entries(node.get("contents", [])) + [node[key] for key in ("href",) if key in node]


def sidebar_problems() -> list: # complaints about _quarto.yml
    website = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    entries = sidebar_entries(website["sidebar"]["contents"])
    names = [p.relative_to(NBS).as_posix() for p in pages()]
    bar = [entry for side in ("left", "right") for entry in sidebar_entries(website["navbar"].get(side, []))]
    found = [f"{name} is missing in the sidebar" for name in names if name not in entries]
    found += [f"the sidebar names {entry}, which is not there" for entry in entries if not (NBS / entry).exists()]
    found += [f"the sidebar names {entry} twice" for entry in sorted(set(entries)) if entries.count(entry) > 1]
    found += [f"the bar above names {entry}, which is not there" for entry in bar if not re.match(r"https?:", entry) and not (NBS / entry).exists()]
    rooms = [[e for e in entries if e.startswith(f"{room}/")] for room in dict.fromkeys(e.split("/")[0] for e in entries if "/" in e)]
    found += [f"{a} stands before {b}; a room is read by number" for room in rooms for a, b in zip(room, room[1:]) if a > b]
    return [f"_quarto.yml: {problem}" for problem in found]


def index_problems() -> list: # complaints about the table of rooms on the home page
    linked = {link.partition("#")[0] for _, text in markdown(NBS / "index.ipynb") for link, _ in LINK.findall(without_code(text))}
    rooms = [p.relative_to(NBS).as_posix() for p in pages() if p.parent != NBS]
    return [f"nbs/index.ipynb: does not link {name}" for name in rooms if name not in linked]


def main() -> int: # exit status
    found = sidebar_problems() + index_problems()
    for page in pages(): found += [f"{page.relative_to(ROOT)}: {problem}" for problem in page_problems(page)]
    print("\n".join(f"  {line}" for line in found))
    print(f"docs: {len(pages())} pages checked, {len(found)} problem{'s' * (len(found) != 1)}")
    return int(bool(found))


if __name__ == "__main__": sys.exit(main())
