"""The table of what works here: packages that are missing, broken, slow or deadly must end as a line of it."""
import subprocess
import sys
import time

import pytest

from erwin_nsa.explore import doctor as d

KNOWN = {p.name: p for p in d.PARTS}
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    "A folder that comes before all installed packages."
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def put(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


@pytest.mark.parametrize("name, blocked", [("plotly", "plotly"), ("anywidget", "anywidget"), ("trame", "trame"), ("safetensors", "safetensors"), ("openmm", "openmm"),
                                           ("torch", "torch"), ("numpy, scipy, h5py", "h5py"), ("WebGL", "playwright"), ("pyvista", "pyvista"), ("jupyterlab", "jupyterlab")])
def test_missing_packages(packages, name, blocked):
    (packages / "sitecustomize.py").write_text(BLOCK.format(names=(blocked,)))
    found = d.try_part(KNOWN[name])
    assert (found.status, found.says) == ("missing", f"the package {blocked} is not installed")
    assert found.do and found.core == (name in ("torch", "numpy, scipy, h5py"))


@pytest.mark.parametrize("text, says", [
    ("raise ImportError('libGL.so.1: cannot open shared object file')", "ImportError: libGL.so.1"),
    ("import no_such_helper", "ModuleNotFoundError"),
    ("import os; os.abort()", "ended with status"),
    ("import sys; sys.exit(0)", "SystemExit"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("import os; os._exit(0)", "ended with status 0"),
    ("print('@doctor nonsense'); import os; os._exit(0)", "without an answer"),
])
def test_broken_packages(packages, text, says):
    put(packages, "safetensors", text)
    found = d.try_part(KNOWN["safetensors"])
    assert found.status == "broken" and says in found.says and found.do, found


def test_a_package_that_talks_is_fine(packages):
    put(packages, "safetensors", "import sys; print('hello'); print('x' * 100_000); print('noise', file=sys.stderr)")
    assert d.try_part(KNOWN["safetensors"]).status == "ok"


@pytest.mark.parametrize("text", ["import time; time.sleep(60)", "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"])
def test_a_package_that_hangs_is_given_up_with_all_it_started(packages, text):
    put(packages, "safetensors", text)
    start = time.monotonic()
    found = d.try_part(KNOWN["safetensors"], limit=1)
    assert time.monotonic() - start < 10
    assert found.status == "broken" and "no answer within 1 second" in found.says


def test_messages_show_no_addresses_hosts_or_folders(packages):
    put(packages, "safetensors", "raise OSError('cannot reach https://user:pw@index.example.org/simple, proxy cache.example.com:80, see /srv/secret/pip.conf\\nand /more')")
    found = d.try_part(KNOWN["safetensors"])
    assert not any(word in found.says for word in ("example", "secret", "http", "more")), found.says
    assert found.says.startswith("OSError: cannot reach")


def test_a_blank_picture_is_broken(packages):
    pytest.importorskip("pyvista")
    blank = KNOWN["pyvista"].program.replace('plotter.add_mesh(pv.Sphere(), color="red")', "")
    assert blank != KNOWN["pyvista"].program
    found = d.try_part(d.Part("pyvista", "x", blank, "pip install pyvista"))
    assert found.status == "broken" and "covers 0%" in found.says and "software renderer" in found.do
    assert d.try_part(KNOWN["pyvista"]).status == "ok"


def test_core_decides(packages):
    (packages / "sitecustomize.py").write_text(BLOCK.format(names=("plotly",)))
    report = d.doctor(["Python", "plotly"])
    assert report.sound and [f.status for f in report.found] == ["ok", "missing"]
    text = str(report)
    assert "The core works, and 1 of 2 parts." in text and "for charts: pip install plotly" in text
    (packages / "sitecustomize.py").write_text(BLOCK.format(names=("tqdm",)))
    report = d.doctor(["numpy, scipy, h5py"])
    assert not report.sound and "The core is broken: numpy, scipy, h5py." in str(report)


def test_unknown_part_is_refused():
    with pytest.raises(ValueError, match="needed: some of Python, torch"):
        d.doctor(["torhc"])


def test_doctor_itself_needs_nothing_but_python():
    "The table must come even where torch cannot be imported."
    program = ("import sys\n" + BLOCK.format(names=("torch", "numpy", "h5py", "scipy")) +
               "import importlib.util, pathlib\n"
               f"spec = importlib.util.spec_from_file_location('doctor', {d.__file__!r})\n"
               "m = importlib.util.module_from_spec(spec); sys.modules['doctor'] = m; spec.loader.exec_module(m)\n"
               "print(m.doctor(['Python']).sound)\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.parametrize("part", d.PARTS, ids=lambda p: p.name)
def test_every_program_is_python(part):
    import textwrap
    compile(d._FRAME.format(program=textwrap.indent(part.program.strip("\n"), "    "), packages=[]), part.name, "exec")
    assert part.do and part.use
