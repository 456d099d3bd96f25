"""The house: what the wheel holds, what imports what, notebooks and modules in step, nothing in git that does not belong there."""
import ast
import configparser
import email
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import erwin_nsa

ROOT = Path(__file__).resolve().parents[1]
CORE = {"torch", "triton", "numpy", "scipy", "h5py", "tqdm"}
OPTIONAL = ("plotly", "pyvista", "ipywidgets", "anywidget", "nbdev", "fastcore", "matplotlib", "IPython", "colossus", "openmm")
BELOW = dict(geometry=set(), kernels={"geometry"}, nn={"geometry", "kernels"}, data={"geometry"},
             train={"geometry", "kernels", "nn", "data"}, explore={"geometry", "kernels", "nn", "data", "train"})
NOTEBOOKS = sorted(p.relative_to(ROOT / "nbs") for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def module_paths():
    "Every module of the package below its root, kernels by their public name."
    files = {p.relative_to(ROOT) for p in (ROOT / "erwin_nsa").rglob("*.py")}
    files |= {Path("erwin_nsa") / p.relative_to(ROOT) for p in (ROOT / "kernels").rglob("*.py")}
    return sorted(p for p in files if "__pycache__" not in p.parts and p.name != "_modidx.py")


MODULES = module_paths()


def cells(notebook):
    return json.loads((ROOT / "nbs" / notebook).read_text(encoding="utf-8"))["cells"]


def exported_module(notebook):
    "What `#| default_exp` says, or None."
    for cell in cells(notebook):
        if found := re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.M):
            return found[1]
    return None


def tracked_files():
    "Files that git has or would take."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git clone: files cannot be listed")
    return [ROOT / name for name in sorted(set(listed.stdout.split("\0"))) if name and (ROOT / name).is_file()]


def imports(path):
    "(line, absolute module name, at module level) of every import; names from `from a import b` are a.b as well as a."
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    inside = {id(node) for top in ast.walk(tree) if isinstance(top, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
              for node in ast.walk(top) if node is not top}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(path.parent.parts)[:len(path.parent.parts) - node.level + 1] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield node.lineno, name, id(node) not in inside


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy so that the checkout stays as it is."
    copy, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "erwin_nsa", "kernels", "data/sources.toml"):
        source = ROOT / name
        (copy / name).parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, copy / name)
    built = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check",
                            "-w", out, copy], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as file:
        yield file


def test_wheel_holds_kernels_every_room_and_the_sources(wheel):
    names = set(wheel.namelist())
    assert "erwin_nsa/kernels/__init__.py" in names
    assert {path.as_posix() for path in MODULES} <= names
    assert wheel.read("erwin_nsa/data/sources.toml") == (ROOT / "data/sources.toml").read_bytes()
    outside = {name.split("/")[0] for name in names} - {"erwin_nsa"}
    assert all(name.endswith(".dist-info") for name in outside), outside


def test_wheel_needs_the_core_alone_and_has_the_version_of_settings(wheel):
    about = email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))))
    needed = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w.-]+", line)[0] for line in needed} == CORE, needed
    assert next(line for line in needed if line.startswith("triton")).replace('"', "'").endswith("sys_platform == 'linux'")
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert about["Version"] == erwin_nsa.__version__ == settings["DEFAULT"]["version"]
    assert f'__version__ = "{about["Version"]}"' in "".join("".join(cell["source"]) for cell in cells("index.ipynb"))


def test_every_module_imports_without_optional_packages():
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
    program = ("import importlib, sys\n"
               "class Block:\n"
               "    def find_spec(self, name, path=None, target=None):\n"
               f"        if name.split('.')[0] in {OPTIONAL!r}: raise ModuleNotFoundError(f'{{name}} is blocked', name=name)\n"
               "sys.meta_path.insert(0, Block())\n"
               f"for name in {names!r}: importlib.import_module(name)\n"
               f"assert not set({OPTIONAL!r}) & {{name.split('.')[0] for name in sys.modules}}\n"
               f"print(len({names!r}))\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(len(names))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_module_imports_what_it_may(path):
    allowed = CORE | set(sys.stdlib_module_names) | {"erwin_nsa"}
    room = path.parts[1]
    for line, name, at_top in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("fastcore", "nbdev"), f"{path}:{line} imports {name}"
        assert not at_top or parts[0] in allowed, f"{path}:{line} imports {name} at module level"
        if room in BELOW and parts[0] == "erwin_nsa" and len(parts) > 1 and parts[1] in BELOW:
            lazy = {"geometry": {"kernels"}}.get(room, set())                     # a tree may ask for its kernel when it is built
            if path.name == "bench.py": lazy = set(BELOW)                         # the benchmark measures every room
            lazy = set() if at_top else lazy
            assert parts[1] in BELOW[room] | {room} | lazy, f"{path}:{line}: {room} must not import {parts[1]}"


def test_one_notebook_is_one_module():
    expected = {"erwin_nsa/_modidx.py", "kernels/__init__.py"}
    for notebook in NOTEBOOKS:
        room, stem, says = notebook.parent.as_posix(), re.sub(r"^\d+_", "", notebook.stem), exported_module(notebook)
        if room == "experiments" or str(notebook) in ("tour.ipynb", "own_data.ipynb", "contributing.ipynb"):
            assert says is None, f"{notebook} tells a story and exports nothing, yet has #| default_exp {says}"
            continue
        if room == ".":
            assert says is not None, f"{notebook} needs #| default_exp"
            expected.add(f"erwin_nsa/{says}.py")
            continue
        assert room in BELOW, f"{notebook}: there is no room {room}"
        assert re.match(r"\d\d_[a-z0-9_]+$", notebook.stem), f"{notebook} must be named NN_name.ipynb"
        assert says == f"{room}.{stem}", f"{notebook} has #| default_exp {says}, needed {room}.{stem}"
        expected |= {f"kernels/{stem}.py"} if room == "kernels" else {f"erwin_nsa/{room}/{stem}.py", f"erwin_nsa/{room}/__init__.py"}
    present = {p.relative_to(ROOT).as_posix() for p in [*(ROOT / "erwin_nsa").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
               if "erwin_nsa/kernels" not in p.as_posix()}
    assert present == expected


def test_no_notebook_shows_an_error():
    shown = [f"{notebook}, cell {i}: {output['ename']}" for notebook in NOTEBOOKS for i, cell in enumerate(cells(notebook))
             for output in cell.get("outputs", []) if output["output_type"] == "error"]
    assert not shown, shown


def test_links_of_the_checkout_are_links():
    for link, target in (("erwin_nsa/kernels", "../kernels"), ("nbs/_quarto.yml", "../_quarto.yml"), ("erwin_nsa/data/sources.toml", "../../data/sources.toml")):
        assert (ROOT / link).is_symlink() and (ROOT / link).readlink().as_posix() == target


def test_git_holds_no_large_file():
    large = [f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB" for path in tracked_files()
             if path.stat().st_size > 2e6 and not path.is_relative_to(ROOT / "data" / "samples")]
    assert not large, large


def test_no_machine_path_and_no_registry_host_in_text():
    machine = re.compile(r"(?<![\w.~-])/(?:work|root|home|Users|opt)/\w|[A-Z]:\\{1,2}Users\b")
    registry = re.compile(r"pypi\.org|pythonhosted\.org|npmjs\.org|deb\.debian\.org|download\.pytorch\.org|conda\.anaconda\.org")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {hit[0]}" for pattern in (machine, registry) if (hit := pattern.search(text))]
    assert not found, found


def test_pages_convert_and_links_resolve():
    done = subprocess.run([sys.executable, ".ci/docs.py"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


FAKE = """#!/bin/sh
case "$2" in
  *print*) echo {version} ;;
  *ensurepip*) exit {pip} ;;
  *version_info*) exit {old} ;;
esac
"""


@pytest.mark.parametrize("version, old, pip, says", [
    ("3.9", 1, 0, "is Python 3.9, but 3.10 or newer is needed"),
    ("3.12", 0, 1, "apt install python3.12-venv"),
    (None, 0, 0, "install Python 3.10 or newer"),
])
def test_environment_script_says_what_is_missing(tmp_path, version, old, pip, says):
    python = tmp_path / "python"
    if version:
        python.write_text(FAKE.format(version=version, old=old, pip=pip))
        python.chmod(0o755)
    done = subprocess.run(["sh", ".ci/venv.sh", python, tmp_path / "venv"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert not (tmp_path / "venv").exists()
