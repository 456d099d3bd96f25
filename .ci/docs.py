"""Check the pages of the site where Quarto is missing: they convert, links resolve, the sidebar is complete, no output is an error."""
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
LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|<(?:img|a)\b[^>]*?\b(?:src|href)=[\"']([^\"']+)")


def pages() -> list: # notebooks that become pages
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))


def prose(cell) -> str: # markdown without code
    text = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def slug(heading:str) -> str: # the anchor Quarto gives a heading
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    text = re.sub(r"[^\w\s.-]", "", text.replace("`", "").replace("*", ""))
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text.strip()))


def anchors(path:Path) -> set: # anchors of a notebook
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    return {slug(h) for h in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.M)} | set(re.findall(r"\{#([\w-]+)", text))


def link_problem(page:Path, link:str) -> str: # complaint, or "" for a link that resolves or leaves the site
    if re.match(r"[a-z][a-z0-9+.-]*:|//", link): return ""
    name, _, anchor = unquote(link).partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists(): return f"link to {link}: no such file"
    if not target.is_relative_to(ROOT): return f"link to {link}: leaves the project"
    if anchor and target.suffix == ".ipynb" and anchor not in anchors(target): return f"link to {link}: no such heading"
    return ""


def page_problems(page:Path) -> list: # complaints about one notebook
    notebook, found = nbformat.read(page, as_version=4), []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            links = (a or b for a, b in LINK.findall(prose(cell)))
            found += [f"cell {number}: {problem}" for link in links if (problem := link_problem(page, link))]
        found += [f"cell {number}: its output is the error {o.ename}" for o in cell.get("outputs", []) if o.output_type == "error"]
    html, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    if len(html.encode()) > LIMIT: found.append(f"the page has {len(html.encode()) / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}")
    return found


def sidebar_entries(node) -> list: # every file named below a sidebar node
    if isinstance(node, str): return [node]
    if isinstance(node, list): return [entry for part in node for entry in sidebar_entries(part)]
    return sidebar_entries(node.get("contents", [])) + [node[key] for key in ("href",) if key in node]


def sidebar_problems() -> list: # complaints about _quarto.yml
    entries = sidebar_entries(yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"])
    names = [str(p.relative_to(NBS)) for p in pages()]
    return ([f"_quarto.yml: {name} is missing in the sidebar" for name in names if name not in entries]
            + [f"_quarto.yml: the sidebar names {entry}, which is not there" for entry in entries if not (NBS / entry).exists()]
            + [f"_quarto.yml: the sidebar names {entry} twice" for entry in sorted(set(entries)) if entries.count(entry) > 1])


def main() -> int: # exit status
    found = sidebar_problems()
    for page in pages(): found += [f"{page.relative_to(ROOT)}: {problem}" for problem in page_problems(page)]
    print("\n".join(f"  {line}" for line in found))
    print(f"docs: {len(pages())} pages checked, {len(found)} problem{'s' * (len(found) != 1)}")
    return int(bool(found))


if __name__ == "__main__": sys.exit(main())
