"""What reaches a user: a source archive that builds the same wheel, a wheel that runs the README, and each optional package missing in turn."""
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import erwin_nsa

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "erwin_nsa", "kernels", "data/sources.toml")


def run(*command, cwd, **env):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    "The source archive, built from a copy so that the checkout stays as it is."
    copy, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("sdist")
    for name in SHIPPED:
        (copy / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, copy / name)
    run("-c", f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})", cwd=copy)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    "The wheel that the source archive alone makes."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="fully_trusted")
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-w", out, next(source.iterdir()), cwd=out)
    return next(out.glob("*.whl"))


def test_wheel_of_the_source_archive_holds_everything(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        assert file.read("erwin_nsa/data/sources.toml") == (ROOT / "data/sources.toml").read_bytes()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "erwin_nsa").rglob("*.py")} | {f"erwin_nsa/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    static = {p.relative_to(ROOT).as_posix() for p in (ROOT / "erwin_nsa/explore/static").iterdir()}
    assert static and modules | static | {"erwin_nsa/py.typed"} <= names


def test_installed_wheel_runs_the_readme(wheel, tmp_path):
    "Installed into a folder of its own and run from elsewhere, so that the checkout cannot help."
    site = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", site, wheel, cwd=tmp_path)
    snippet = re.search(r"```python\n(.*?from erwin_nsa import.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    program = tmp_path / "readme.py"
    program.write_text(snippet + f"\nimport erwin_nsa\nassert erwin_nsa.__file__.startswith({str(site)!r}), erwin_nsa.__file__\n"
                                 "from erwin_nsa.data.sources import load_sources\nprint(sorted(load_sources())[:1])\n")
    said = run(program, cwd=tmp_path, PYTHONPATH=str(site))
    assert "3 clouds of 500, 37, 1200 points" in said and "(500, 64), (37, 64), (1200, 64)" in said
    helped = run("-m", "erwin_nsa.train", "--help", cwd=tmp_path, PYTHONPATH=str(site))
    assert "erwin-nsa" in helped


PRELUDE = """
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None): return None if name.split('.')[0] == blocked else self.finder.find_spec(name, path, target)
for name in [n for n in sys.modules if n.split('.')[0] == blocked]: del sys.modules[name]
sys.meta_path[:] = map(Without, sys.meta_path)
for name in modules: importlib.import_module(name)
assert blocked not in {name.split('.')[0] for name in sys.modules}
from erwin_nsa import ErwinNSA, PointBatch, knn_graph
pos = torch.rand(200, 3)
model = ErwinNSA(c_in=3, c_hidden=16, depth=2, num_heads=2, local_ball_size=32, compressed_ball_size=8, num_selected_balls=2)
out = model(pos, pos, edge_index=knn_graph(pos, k=4))
out.sum().backward()
assert out.shape == (200, 16) and out.isfinite().all()
"""
DRIVER = """
import importlib, io, json, os, sys, traceback
import torch, numpy, scipy.spatial, scipy.sparse.csgraph, h5py      # once, the rest in a child for each package
torch.set_num_threads(1)
for line in sys.stdin:
    blocked, modules, program = json.loads(line)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        answer = dict(message="", trace="")
        try: exec(program, answer | dict(blocked=blocked, modules=modules, answer=answer, torch=torch, importlib=importlib, sys=sys))
        except BaseException: answer["trace"] = traceback.format_exc()
        os.write(write, json.dumps(dict(message=answer["message"], trace=answer["trace"][-4000:])).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe: said = pipe.read() or json.dumps(dict(message="", trace="the process died"))
    os.waitpid(child, 0)
    print(said, flush=True)
"""
NEEDED = { # package -> (a call that needs it, what the error must tell)
    "plotly": ("from erwin_nsa.explore.scenes import cloud_figure; cloud_figure(pos)", ["plotly 6", "erwin_nsa[explore]"]),
    "pyvista": ("open('mesh.vtk', 'w').close(); from erwin_nsa.data.clouds import read_cloud; read_cloud('mesh.vtk')", ["pyvista", "pip install pyvista", ".npz"]),
    "anywidget": ("from erwin_nsa.explore.cloud import widget_class; widget_class()", ["anywidget", "erwin_nsa[explore]", "cloud_html"]),
    "nbclient": ("from erwin_nsa.explore.report import jupyter_tools; jupyter_tools()", ["nbclient", "erwin_nsa[explore]"]),
    "accelerate": ("from erwin_nsa.train.cli import _accelerator; import os; os.environ['WORLD_SIZE'] = '2'; _accelerator()", ["Accelerate", "pip install accelerate"]),
    "safetensors": ("from pathlib import Path; from erwin_nsa.train.checkpoint import read_whole; Path('a.safetensors').touch(); read_whole(Path('a.safetensors'))",
                    ["safetensors", "pip install safetensors"]),
    "colossus": ("from erwin_nsa.data.density import linear_power; linear_power()", ["colossus", "erwin_nsa[cosmology]", "sample_power"]),
    "openmm": ("from erwin_nsa.data.chains import _openmm; _openmm()", ["OpenMM", "pip install openmm"]),
    "triton": ("from erwin_nsa.nn.runtime import implementations, resolve_impl; resolve_impl('triton', implementations(torch.rand(8, 1, 16)))", ["Triton does not import here", "torch: available"]),
}
WITHOUT = { # package -> what must work all the same
    "safetensors": "from erwin_nsa.train.checkpoint import default_suffix; assert default_suffix() == '.pt'",
    "ipywidgets": "from erwin_nsa.explore.cloud import CloudState, cloud_html; assert cloud_html(CloudState(pos.numpy()), 'cloud.html').stat().st_size > 1000",
    "anywidget": "from erwin_nsa.explore.cloud import CloudState, cloud_html; assert cloud_html(CloudState(pos.numpy()), 'cloud.html').stat().st_size > 1000",
    "latex2mathml": "from erwin_nsa.explore.report import tex_html; assert '<code>' in tex_html('x^2')",
    "nbdev": "import erwin_nsa.kernels.docidx",
}


def modules_without(package):
    "Every module; without Triton, every module but the kernels, which are written in it."
    paths = [p.relative_to(ROOT) for p in (ROOT / "erwin_nsa").rglob("*.py")] + [Path("erwin_nsa") / p.relative_to(ROOT) for p in (ROOT / "kernels").glob("*.py")]
    names = sorted({".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in paths if p.name not in ("_modidx.py", "__main__.py")})
    return [name for name in names if package != "triton" or not name.startswith("erwin_nsa.kernels.")]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    "A function that runs a program in a fresh child where one package is missing."
    if not hasattr(os, "fork"): pytest.skip("children are made by fork, which this system has not")
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    parent = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=tmp_path_factory.mktemp("without"), env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def ask(package, program):
        parent.stdin.write(json.dumps([package, modules_without(package), program]) + "\n")
        parent.stdin.flush()
        return json.loads(parent.stdout.readline())
    with parent:
        yield ask
        parent.stdin.close()


@pytest.mark.parametrize("package", sorted({*NEEDED, *WITHOUT}))
def test_package_can_be_missing(package, without):
    "Everything imports, a model trains a step, what does not need the package works, and what needs it says so."
    call, told = NEEDED.get(package, ("", []))
    program = PRELUDE + WITHOUT.get(package, "") + "\n"
    if call: program += "try:\n" + "".join(f"    {part.strip()}\n" for part in call.split(";")) + "except (ImportError, ValueError) as error: answer['message'] = str(error)\n"
    said = without(package, program)
    assert not said["trace"], said["trace"]
    assert all(word in said["message"] for word in told), said["message"]


def test_citation_and_changelog_know_the_version():
    version = re.escape(erwin_nsa.__version__)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert re.search(rf"^## {version}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def test_public_names_have_hints():
    "py.typed promises them: every argument of what `import erwin_nsa` offers has a type."
    import inspect
    bare = [f"{name}({parameter})" for name in erwin_nsa.__all__ for parameter, p in inspect.signature(getattr(erwin_nsa, name)).parameters.items()
            if p.annotation is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert not bare, bare
