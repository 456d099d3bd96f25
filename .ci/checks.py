"""Checks of the checkout itself. `python .ci/checks.py [exports-current] [notebooks-clean] [readme-current]`; none named: all.

Each check works on a copy in a temporary folder, so the working tree is never changed, and returns complaints.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("settings.ini", "pyproject.toml", "README.md", "CONTRIBUTING.md", "_quarto.yml", "nbs", "erwin_nsa", "kernels", ".ci")
BY_HAND = {"kernels/__init__.py"}


def copy_of_project(folder:Path) -> Path: # the copy
    "What nbdev reads and writes, links kept as links."
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.so")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir(): shutil.copytree(source, folder / name, symlinks=True, ignore=skip)
        elif source.exists(): shutil.copy2(source, folder / name)
    return folder


def command(name:str, folder:Path) -> None:
    "An nbdev command inside a copy; raises RuntimeError with its output when it fails."
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"} | {"PYTHONPATH": str(folder)}
    done = subprocess.run([Path(sys.executable).with_name(name)], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode: raise RuntimeError(f"{name} failed:\n{done.stdout}{done.stderr}")


def sources(root:Path) -> dict: # path -> bytes of every Python file in the package and in kernels
    return {str(path.relative_to(root)): path.read_bytes() for room in ("erwin_nsa", "kernels")
            for path in sorted((root / room).rglob("*.py")) if "__pycache__" not in path.parts
            and not str(path.relative_to(root)).startswith("erwin_nsa/kernels/")}


def notebooks(root:Path) -> list: # paths of all notebooks, in reading order
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(root).parts))


def exports_current(root:Path=ROOT) -> list: # complaints
    "Every module is what its notebook exports now."
    with tempfile.TemporaryDirectory() as temporary:
        copy = copy_of_project(Path(temporary))
        for name in sources(copy):
            if name not in BY_HAND: (copy / name).unlink()
        command("nbdev_export", copy)
        fresh, present = sources(copy), sources(root)
    said = {True: "is not exported by any notebook; remove it", False: "differs from its notebook"}
    return [f"{name}: " + ("is missing" if name not in present else said[name not in fresh]) + "; run nbdev_export" * (name in fresh)
            for name in sorted({*fresh, *present}) if fresh.get(name) != present.get(name)]


def notebooks_clean(root:Path=ROOT) -> list: # complaints
    "nbdev_clean would change nothing but the order and spacing of the JSON."
    with tempfile.TemporaryDirectory() as temporary:
        copy = copy_of_project(Path(temporary))
        command("nbdev_clean", copy)
        return [f"{path.relative_to(root)}: holds execution counts or stray metadata; run nbdev_clean" for path in notebooks(root)
                if json.loads((copy / path.relative_to(root)).read_bytes()) != json.loads(path.read_bytes())]


def readme_current(root:Path=ROOT) -> list: # complaints
    "README.md, CONTRIBUTING.md and llms.txt are what the notebooks say now."
    from readme import texts
    return [f"{name}: differs from the notebooks; run make readme" for name, text in texts(root).items()
            if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != text]


CHECKS = {"exports-current": exports_current, "notebooks-clean": notebooks_clean, "readme-current": readme_current}


def main(names:list) -> int: # exit status
    failed = 0
    for name in names or CHECKS:
        complaints = CHECKS[name]()
        failed += bool(complaints)
        print(f"{name}: " + ("ok" if not complaints else "FAILED\n  " + "\n  ".join(complaints)), flush=True)
    return int(bool(failed))


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
