"""The data room from outside: files that arrive damaged, round trips, and imports that stay light."""
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from erwin_nsa.data import bodies, cars, surfaces
from erwin_nsa.data.surfaces import Normalizer, SurfaceSample, read_surfaces, write_surfaces

ROOT = Path(__file__).resolve().parents[1]
ABOUT = dict(source="test", licence="Apache-2.0", citation="none", created_by="tests")
ARRAYS = ("pos", "normal", "pressure", "vertices", "triangles")


@pytest.fixture(autouse=True)
def one_thread():
    """Short tensor operations on a busy machine: threads that wait for each other cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(name="s", n=7, seed=0, **kw):
    rng = np.random.default_rng(seed)
    return SurfaceSample(name, rng.normal(size=(n, 3)), None, rng.normal(size=n), **kw)


def assert_same(a, b):
    assert (a.name, a.unit, a.length_unit) == (b.name, b.unit, b.length_unit)
    for k in ARRAYS:
        u, v = getattr(a, k), getattr(b, k)
        assert (u is None and v is None) or (u.dtype == v.dtype and np.array_equal(u, v)), k


# ---- HDF5 files

@pytest.mark.parametrize("n", [1, 2, 33, 507])
def test_round_trip_keeps_every_bit(tmp_path, n):
    """Sizes of one point and up, extreme float32 values, absent optional arrays, names with spaces and accents."""
    s = sample("Käfer 1303", n, unit="-", length_unit="unit box")
    s.pressure[0] = np.finfo(np.float32).max
    t = sample("z", n, seed=1)
    t.pos[0] = np.finfo(np.float32).tiny
    write_surfaces(tmp_path / "a.h5", [s, t], ["test", "train"], ABOUT)
    assert_same(read_surfaces(tmp_path / "a.h5", "test")[0], s)
    assert_same(read_surfaces(tmp_path / "a.h5", "train")[0], t)


def test_file_is_deterministic_and_order_free(tmp_path):
    """Two writes of one set give the same bytes, in another process too, so a date or a path cannot be inside."""
    code = ("write_surfaces({!r}, [SurfaceSample('s', np.eye(3), None, [1, 2, 3])], 'train', "
            "dict(source='a', licence='b', citation='c', created_by='d', settings=dict(z=1, a=2)))")
    one, two = str(tmp_path / "one.h5"), str(tmp_path / "sub/two.h5")
    exec("import numpy as np; from erwin_nsa.data.surfaces import *; " + code.format(one), {})
    subprocess.run([sys.executable, "-c", "import numpy as np; from erwin_nsa.data.surfaces import *; " + code.format(two)], check=True, cwd=ROOT)
    assert Path(one).read_bytes() == Path(two).read_bytes()


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    """An error half way through, such as a full disk, leaves the destination whole and no temporary file."""
    file = write_surfaces(tmp_path / "a.h5", [sample()], "train", ABOUT)
    before = file.read_bytes()

    def full(*_):
        raise OSError("no space left on device")
    monkeypatch.setattr(surfaces, "_write_body", full)
    with pytest.raises(OSError, match="no space left"):
        write_surfaces(file, [sample("other")], "train", ABOUT)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_every_truncation_is_reported(tmp_path):
    """A copy cut anywhere is refused with its own name in the message; none is read as if it were whole."""
    whole = write_surfaces(tmp_path / "whole.h5", [sample(n=400)], "train", ABOUT).read_bytes()
    cut = tmp_path / "cut.h5"
    for part in np.linspace(0, len(whole) - 1, 12).astype(int):
        cut.write_bytes(whole[:part])
        with pytest.raises(ValueError, match="cut.h5.*expected an HDF5 file"):
            read_surfaces(cut)


def test_damaged_block_is_reported(tmp_path):
    """Bytes flipped inside a compressed block end in an error naming body and key."""
    file = write_surfaces(tmp_path / "a.h5", [sample("victim", n=5000)], "train", ABOUT)
    with h5py.File(file) as f:
        chunk = f["victim/pos"].id.get_chunk_info(0)
    data = bytearray(file.read_bytes())
    data[chunk.byte_offset:chunk.byte_offset + 64] = bytes(64)
    file.write_bytes(data)
    with pytest.raises(ValueError, match="'victim': key 'pos'.*damaged block"):
        read_surfaces(file)


@pytest.mark.parametrize("key, value, message", [
    ("pos", None, "found none of"),
    ("pressure", None, "found none of"),
    ("pos", np.zeros((7, 3), int), "expected a dataset of float32"),
    ("pressure", np.zeros(6, np.float32), r"pressure: given shape \(6,\), needed \(7\)"),
    ("normal", np.zeros((7, 2), np.float32), r"normal: given shape \(7, 2\)"),
    ("pressure", np.full(7, np.inf, np.float32), "7 NaN or infinite"),
    ("vertices", np.zeros((4, 3), np.float32), "both or neither"),
])
def test_malformed_body_names_file_and_key(tmp_path, key, value, message):
    file = write_surfaces(tmp_path / "a.h5", [sample()], "train", ABOUT)
    with h5py.File(file, "r+") as f:
        if key in f["s"]:
            del f["s"][key]
        if value is not None:
            f["s"][key] = value
    with pytest.raises(ValueError, match=message) as e:
        read_surfaces(file)
    assert str(file) in str(e.value)


def test_foreign_members_are_errors(tmp_path):
    """A dataset where a body is expected, a missing unit and a missing split are all named."""
    def broken(change):
        file = write_surfaces(tmp_path / "a.h5", [sample()], "train", ABOUT)
        with h5py.File(file, "r+") as f:
            change(f)
        return file

    def loose(f):
        f["loose"] = np.zeros(3)
        f["loose"].attrs["split"] = "train"
    for change, message in ((loose, "'loose': expected a group, found a dataset"),
                            (lambda f: f["s"].attrs.pop("unit"), "none of \\['unit'\\]"),
                            (lambda f: f["s"].attrs.pop("split"), "attribute 'split'.*found None")):
        with pytest.raises(ValueError, match=message):
            read_surfaces(broken(change))


# ---- normalisation

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalizer_inverts_and_survives_json(dtype):
    norm = Normalizer.fit([sample(n=100, seed=s) for s in range(3)])
    norm = Normalizer.from_dict(json.loads(json.dumps(norm.to_dict())))
    x = torch.randn(50, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 3
    for enc, dec, v in ((norm.encode_pos, norm.decode_pos, x), (norm.encode_pressure, norm.decode_pressure, 100 * x)):
        assert enc(v).dtype == dtype
        assert (dec(enc(v)) - v).abs().max() <= 4 * torch.finfo(dtype).eps * max(1, float(v.abs().max()))


def test_normalizer_gives_training_points_unit_variance():
    train = [sample(n=200, seed=s) for s in range(4)]
    norm = Normalizer.fit(train)
    p = np.concatenate([norm.encode_pressure(s.pressure) for s in train])
    x = np.concatenate([norm.encode_pos(s.pos) for s in train])
    assert abs(p.mean()) < 1e-6 and abs(p.std() - 1) < 1e-6
    assert np.abs(x.mean(0)).max() < 1e-6 and abs(x.var(0).mean() - 1) < 1e-6


def test_normalizer_passes_gradients():
    norm = Normalizer.shapenet_car()
    p = torch.zeros(3, requires_grad=True)
    norm.decode_pressure(p).sum().backward()
    assert torch.allclose(p.grad, torch.full((3,), 48.5743))


# ---- real cars

@pytest.fixture
def strip():
    """Three quads in a row, with the points 2 and 7 unused, as (points, quads, pressure)."""
    xy = [(0, 0), (1, 0), (50, 50), (2, 0), (3, 0), (0, 1), (1, 1), (60, 60), (2, 1), (3, 1)]
    pos = np.array([(x, y, 0) for x, y in xy], np.float32)
    return pos, np.array([[0, 1, 6, 5], [1, 3, 8, 6], [3, 4, 9, 8]]), np.linspace(-1, 1, 10).astype(np.float32)


def needs_pyvista():
    pytest.importorskip("pyvista", reason="reading VTK needs pyvista")


@pytest.mark.parametrize("binary", [False, True], ids=["ascii", "binary"])
def test_car_folder_keeps_used_points_in_order(tmp_path, strip, binary):
    needs_pyvista()
    pos, quads, press = strip
    car = cars.read_car_folder(cars.write_car_folder(tmp_path / "c", pos, quads, press, binary), counts=(10, 8))
    keep = [0, 1, 3, 4, 5, 6, 8, 9]
    assert np.array_equal(car.pos, pos[keep]) and np.array_equal(car.pressure, press[keep])
    with pytest.raises(ValueError, match="expected 10 points of which quads use 7, found 10 and 8"):
        cars.read_car_folder(tmp_path / "c", counts=(10, 7))


def test_car_folder_accepts_polydata_and_column_pressure(tmp_path, strip):
    """The same quads stored as PolyData, pressures as a column: the same sample."""
    needs_pyvista()
    import pyvista
    pos, quads, press = strip
    a = cars.read_car_folder(cars.write_car_folder(tmp_path / "c", pos, quads, press), counts=None)
    pyvista.PolyData(pos, np.c_[np.full(3, 4), quads]).save(tmp_path / "c" / "quadpress_smpl.vtk")
    np.save(tmp_path / "c" / "press.npy", press[:, None].astype(np.float64))
    assert_same(cars.read_car_folder(tmp_path / "c", counts=None), a)


@pytest.mark.parametrize("content", [b"", b"not a mesh\n", b"# vtk DataFile Version 3.0\nx\nASCII\nDATASET UNSTRUCTURED_GRID\nPOINTS 0 float\n"])
def test_unreadable_vtk_names_the_file(tmp_path, strip, content):
    needs_pyvista()
    cars.write_car_folder(tmp_path / "c", *strip)
    (tmp_path / "c" / "quadpress_smpl.vtk").write_bytes(content)
    with pytest.raises(ValueError, match="quadpress_smpl.vtk.*expected a legacy VTK"):
        cars.read_car_folder(tmp_path / "c", counts=None)


def test_packaged_cars_refuse_code_and_wrong_types(tmp_path):
    """A pickle that would run code is refused, a single dictionary is not a list of cars."""
    class Run:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)
    torch.save([Run()], tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt.*cannot be read safely"):
        cars.read_mini_car(tmp_path / "bad.pt")
    assert not (tmp_path / "pwned").exists()
    torch.save({"press": torch.zeros(3)}, tmp_path / "dict.pt")
    with pytest.raises(ValueError, match="expected a list of dictionaries, found dict"):
        cars.read_mini_car(tmp_path / "dict.pt")
    np.savez(tmp_path / "obj.npz", pos=np.array([{}], dtype=object), normal=np.zeros(1), press=np.zeros(1))
    with pytest.raises(ValueError, match="obj.npz: expected an npz archive"):
        cars.read_cars3(tmp_path / "obj.npz")


def test_named_but_missing_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv("ERWIN_NSA_DATA", raising=False)
    assert cars.find_cars() == []
    with pytest.raises(FileNotFoundError, match="named by argument"):
        cars.find_cars(tmp_path / "no")
    monkeypatch.setenv("ERWIN_NSA_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="named by ERWIN_NSA_DATA, expected cars.h5"):
        cars.find_cars()


def test_converted_tree_reads_back(tmp_path, strip):
    """Five raw cars to HDF5 and back: same samples, one test car, provenance in place."""
    needs_pyvista()
    pos, quads, press = strip
    for i in range(5):
        cars.write_car_folder(tmp_path / "training_data" / f"param{i // 3}" / f"car{i}", pos, quads, press + i)
    raw = cars.find_cars(tmp_path, counts=None)
    file = cars.convert_cars(tmp_path, tmp_path / "h5" / "cars.h5", counts=None)
    for a, b in zip(raw, cars.find_cars(tmp_path / "h5")):
        assert_same(a, b)
    assert len(read_surfaces(file, "test")) == 1 and len(read_surfaces(file, "train")) == 4
    assert json.loads(surfaces.read_provenance(file)["settings"])["n_cars"] == 5


def test_real_cars_where_present():
    """The three real cars, if a folder is named or lies beside the project."""
    folder = os.environ.get("ERWIN_NSA_DATA") or ROOT.parent / "shared" / "data"
    if not Path(folder).is_dir():
        pytest.skip("no real cars: set ERWIN_NSA_DATA or put them in ../shared/data")
    found = cars.find_cars(folder)
    assert len(found) >= 1
    for c in found:
        assert len(c) == 3586 and c.unit == cars.PRESSURE_UNIT and -400 < c.pressure.min() < 0 < c.pressure.max() < 400
        assert abs(np.linalg.norm(c.normal, axis=1) - 1).max() < 1e-4


# ---- bodies

def test_bodies_do_not_depend_on_workers_or_company():
    alone = bodies.make_body(7, 300)
    for b in bodies.make_bodies((6, 7), 300, workers=2)[1:]:
        assert_same(alone, b)


@pytest.mark.parametrize("n", [300, 1000, 1500])
def test_bodies_have_about_the_wanted_size(n):
    v, t = bodies.body_mesh(bodies.CarShape(), n)
    assert abs(len(t) - n) <= max(12, .06 * n)
    q = bodies.mesh_quality(v, t)
    assert q["min_angle"] > 12 and q["volume"] > 3


def test_flow_turns_with_the_body():
    """Turning body and stream together turns the velocity and leaves the pressure alone."""
    v, t = bodies.body_mesh(bodies.CarShape.sample(2), 300)
    q, r = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    q = q * np.sign(np.linalg.det(q))
    stream = np.array([.1, .2, 1.])
    a = bodies.source_panel_flow(v, t, tuple(stream))
    b = bodies.source_panel_flow(v @ q.T, t, tuple(q @ stream))
    assert (a.cp - b.cp).abs().max() < 1e-9
    assert (a.velocity @ torch.tensor(q.T) - b.velocity).abs().max() < 1e-9


def test_flow_is_scale_free_and_linear():
    """Cp does not change with size or speed; velocities of two streams add."""
    v, t = bodies.body_mesh(bodies.CarShape.sample(2), 300)
    one = bodies.source_panel_flow(v, t, (0, 0, 1.))
    assert (bodies.source_panel_flow(1000 * v, t, (0, 0, 1.)).cp - one.cp).abs().max() < 1e-9
    side = bodies.source_panel_flow(v, t, (.3, 0, 0.))
    both = bodies.source_panel_flow(v, t, (.3, 0, 1.))
    assert (one.velocity + side.velocity - both.velocity).abs().max() < 1e-9


def test_committed_sample_is_whole():
    train, test = bodies.load_bodies("train"), bodies.load_bodies("test")
    assert [s.name for s in train] == [f"body_{i:04d}" for i in bodies.TRAIN_SEEDS]
    assert [s.name for s in test] == [f"body_{i:04d}" for i in bodies.TEST_SEEDS]
    for s in train + test:
        assert len(s) == 3584 and s.unit == "Pa" and 200 < s.pressure.max() <= 240.01 and s.pos[:, 1].min() > .05
        mesh = s.vertices[s.triangles].astype(np.float64)
        assert np.abs(mesh.mean(1) - s.pos).max() < 1e-6
        out = np.cross(mesh[:, 1] - mesh[:, 0], mesh[:, 2] - mesh[:, 0])
        assert ((out * s.normal).sum(1) > .99 * np.linalg.norm(out, axis=1)).all()
    about = surfaces.read_provenance(bodies.find_sample())
    assert about["licence"] == "Apache-2.0" and len(json.loads(about["settings"])["shapes"]) == 32


def test_package_imports_without_plotting():
    """The data room loads where pyvista, plotly, nbdev and fastcore are absent, and says what VTK reading needs."""
    script = ("import sys\nfor m in ('pyvista', 'plotly', 'nbdev', 'fastcore'): sys.modules[m] = None\n"
              "from erwin_nsa.data import bodies, cars, surfaces\n"
              "from pathlib import Path\n"
              "try: cars._read_quads(Path('x.vtk'))\n"
              "except ImportError as e: assert 'erwin_nsa[explore]' in str(e); print('named')")
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "named", out.stderr
