"""Clouds from users' files: every format in small, and every way in which such a file can be wrong."""
import struct
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest

from erwin_nsa.data import clouds
from erwin_nsa.data.bodies import find_sample
from erwin_nsa.data.clouds import describe_cloud, read_cloud

RNG = np.random.default_rng(0)
POS = RNG.normal(size=(30, 3)).astype(np.float32)
CP = RNG.normal(size=30).astype(np.float32)
NORMAL = (POS / np.linalg.norm(POS, axis=1, keepdims=True)).astype(np.float32)


def refused(path, *says, error=ValueError, **how):
    with pytest.raises(error) as e:
        read_cloud(path, **how)
    for words in says:
        assert words in str(e.value), str(e.value)
    assert "\n" not in str(e.value)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def ply(path, form, extra=("cp",), head=None, rows=None, count=None):
    columns = np.c_[POS, CP] if rows is None else rows
    names = ["x", "y", "z", *extra]
    text = head or f"ply\nformat {form} 1.0\ncomment made by a test\nelement vertex {len(columns) if count is None else count}\n" + "".join(f"property float {n}\n" for n in names) \
        + "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    if form == "ascii":
        body = "".join(" ".join(f"{v:.9g}" for v in row) + "\n" for row in columns).encode() + b"3 0 1 2\n"
    else:
        body = columns.astype("<f4" if "little" in form else ">f4").tobytes() + struct.pack("<Biii", 3, 0, 1, 2)
    path.write_bytes(text.encode() + body)
    return path


# ---------------------------------------------------------------- formats
@pytest.mark.parametrize("names", [dict(pos="pos", target="target"), dict(pos="points", target="pressure"), dict(pos="XYZ", target="values")])
def test_npz_by_usual_names(tmp_path, names):
    s = read_cloud(npz(tmp_path / "my cloud.npz", **{names["pos"]: POS, names["target"]: CP, "normals": NORMAL, "other": CP}))
    assert s.id == "my cloud" and s.pos.dtype == np.float32
    np.testing.assert_array_equal(s.pos, POS)
    np.testing.assert_array_equal(s.target[:, 0], CP)
    np.testing.assert_array_equal(s.x, NORMAL)


def test_npz_by_given_names_columns_and_types(tmp_path):
    path = npz(tmp_path / "a.npz", u=POS[:, 0].astype(np.float64), v=(POS[:, 1] * 100).astype(np.int16), pressure=CP, values=CP)
    s = read_cloud(path, dict(pos="u,v", target="values"))
    assert s.pos.shape == (30, 2)
    np.testing.assert_array_equal(s.target[:, 0], CP)
    assert read_cloud(path, dict(pos="u,v", target=None)).target is None
    comma = npz(tmp_path / "b.npz", **{"a,b": POS, "velocity": NORMAL})
    s = read_cloud(comma, dict(pos="a,b", target="velocity"))
    assert s.target.shape == (30, 3)


def test_compressed_npz_and_npy(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", pos=POS)
    np.save(tmp_path / "a.npy", np.asfortranarray(POS))
    for name in ("a.npz", "a.npy"):
        np.testing.assert_array_equal(read_cloud(tmp_path / name).pos, POS)


def test_h5_of_the_package_and_of_others(tmp_path):
    body = read_cloud(find_sample("bodies.h5"), cloud="body_0001")
    assert body.id == "body_0001" and body.x.shape == body.pos.shape and body.target.shape == (len(body), 1)
    with h5py.File(find_sample("cosmology.h5")) as f:
        ids = f["ids"].asstr()[()]
    assert read_cloud(find_sample("cosmology.h5"), cloud=ids[-1]).id == ids[-1]
    refused(find_sample("cosmology.h5"), "expected the name of one of", ids[0], "found none")
    refused(find_sample("bodies.h5"), "found 'car'", cloud="car")
    refused(find_sample("bodies.h5"), "says itself", keys=dict(pos="pos"))
    refused(find_sample("chains.h5"), "erwin_nsa.chains", "holds no single clouds")
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["run/pos"], f["run/pressure"], f["run/name"], f["empty"] = POS, CP, "text", h5py.Empty("f4")
    s = read_cloud(tmp_path / "a.h5")
    np.testing.assert_array_equal(s.target[:, 0], CP)
    with h5py.File(tmp_path / "a.h5", "a") as f:
        f["other/pos"] = POS
    refused(tmp_path / "a.h5", "run/pos", "other/pos", "name one with keys")
    assert len(read_cloud(tmp_path / "a.h5", dict(pos="other/pos"))) == 30


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply_with_properties(tmp_path, form):
    s = read_cloud(ply(tmp_path / "a.ply", form), dict(target="cp"))
    np.testing.assert_allclose(s.pos, POS, rtol=1e-6)
    np.testing.assert_allclose(s.target[:, 0], CP, rtol=1e-6)
    s = read_cloud(ply(tmp_path / "n.ply", form, ("nx", "ny", "nz"), rows=np.c_[POS, NORMAL]))
    np.testing.assert_allclose(s.x, NORMAL, rtol=1e-6)


def test_meshes_through_pyvista(tmp_path):
    pv = pytest.importorskip("pyvista")
    mesh = pv.Sphere(theta_resolution=6, phi_resolution=6)
    mesh["cp"], mesh.cell_data["c"] = mesh.points[:, 0].copy(), np.arange(mesh.n_cells)
    for name in ("a.vtp", "a.vtk", "a.stl"):
        mesh.save(tmp_path / name)
    for name in ("a.vtp", "a.vtk"):
        s = read_cloud(tmp_path / name, dict(target="cp"))
        np.testing.assert_allclose(s.target[:, 0], mesh.points[:, 0], rtol=1e-6)
        assert s.x.shape == (mesh.n_points, 3)                                  # the normals that pyvista made
    assert len(read_cloud(tmp_path / "a.stl")) == mesh.n_points
    (tmp_path / "a.obj").write_text("".join(f"v {x} {y} {z}\n" for x, y, z in POS) + "f 1 2 3\n")
    np.testing.assert_allclose(read_cloud(tmp_path / "a.obj").pos, POS, rtol=1e-5)
    refused(tmp_path / "a.vtp", "'c'", "one on cells", "cell_data_to_point_data", keys=dict(target="c"))
    refused(tmp_path / "a.vtp", "at most 5 points", max_points=5)
    for name in ("a.vtp", "a.vtk", "a.obj"):
        cut = tmp_path / f"cut{name[1:]}"
        cut.write_bytes((tmp_path / name).read_bytes()[:len((tmp_path / name).read_bytes()) // 2 if name != "a.obj" else 0])
        refused(cut, str(cut), "expected")


def test_meshes_without_pyvista(tmp_path, monkeypatch):
    (tmp_path / "a.vtp").write_bytes(b"")
    find = clouds.importlib.util.find_spec
    monkeypatch.setattr(clouds.importlib.util, "find_spec", lambda name, *a: None if name == "pyvista" else find(name, *a))
    refused(tmp_path / "a.vtp", "pip install pyvista", error=ImportError)


# ---------------------------------------------------------------- what is wrong with files
def test_missing_files_and_unknown_formats(tmp_path):
    refused(tmp_path / "no.npz", "no such file", error=FileNotFoundError)
    (tmp_path / "d.npz").mkdir()
    refused(tmp_path / "d.npz", "a folder", error=FileNotFoundError)
    refused(tmp_path / "a.xlsx", "a.xlsx", ".npz")


@pytest.mark.parametrize("arrays, keys, says", [
    (dict(pos=POS.T), {}, "transpose"),
    (dict(pos=POS[:, :2].T), {}, "rows and columns look swapped"),
    (dict(pos=POS[:, :1]), {}, "(n, 2) or (n, 3)"),
    (dict(pos=POS[None]), {}, "one row a point"),
    (dict(pos=POS[:0]), {}, "at least one point"),
    (dict(pos=POS.astype(complex)), {}, "complex"),
    (dict(pos=POS.astype(bool)), {}, "bool"),
    (dict(pos=POS.astype(str)), {}, "numbers"),
    (dict(pos=POS.astype(np.float64) * 1e300), {}, "float32"),
    (dict(pos=np.where(np.arange(30)[:, None] == 7, np.nan, POS)), {}, "1 of 30 rows (first: [7])"),
    (dict(pos=POS, target=np.full(30, np.inf)), {}, "'target'"),
    (dict(pos=POS, target=CP[:-1]), {}, "30 rows, one a point"),
    (dict(pos=POS, target=CP), dict(target="cp"), "'cp'"),
    (dict(pos=POS), dict(tagret="cp"), "roles among"),
    (dict(nodes=POS), {}, "'nodes' (30, 3)"),
    (dict(pos=POS, pressure=CP, values=CP), {}, "several"),
    (dict(pos=POS, normal=NORMAL, features=CP), {}, "set one to None"),
    (dict(pos=POS, normal=CP), {}, "'normal'"),
    (dict(pos=POS.astype(np.float64) * 1e-3 + 4e6), {}, "subtract the centre"),
    ({}, {}, "no array of numbers"),
])
def test_arrays_that_do_not_fit(tmp_path, arrays, keys, says):
    refused(npz(tmp_path / "a.npz", **arrays), "a.npz", says, keys=keys)


def test_swapped_rows_are_named_only_where_they_are_swapped(tmp_path):
    refused(npz(tmp_path / "a.npz", pos=np.zeros((5, 4))), "shape (5, 4)")
    with pytest.raises(ValueError) as e:
        read_cloud(tmp_path / "a.npz")
    assert "transpose" not in str(e.value)


def test_objects_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'went off')!r}, 'w')",)
    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", pos=np.array([Bomb(), Bomb()], dtype=object))
    for name in ("a.npy", "a.npz"):
        refused(tmp_path / name, "never loaded")
    import pickle
    (tmp_path / "p.npy").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path / "p.npy", "damaged")
    assert not (tmp_path / "went off").exists()


def test_huge_arrays_are_refused_by_their_headers(tmp_path):
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + (b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 3), }").ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(head)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as z:
        z.writestr("pos.npy", head)
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("pos", shape=(10**12, 3), dtype="f4", chunks=(1000, 3))
    for name in ("a.npy", "a.npz", "a.h5"):
        refused(tmp_path / name, "at most 20,000,000 points", "1000000000000")
    refused(npz(tmp_path / "b.npz", pos=POS), "at most 29 points", max_points=29)
    refused(ply(tmp_path / "a.ply", "ascii", count=10**12), "at most 20,000,000 points", keys=dict(target="cp"))


@pytest.mark.parametrize("keep", [0, 10, 200, 600])
def test_cut_off_files(tmp_path, keep):
    npz(tmp_path / "a.npz", pos=POS, target=CP)
    np.save(tmp_path / "a.npy", POS)
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["pos"] = POS
    ply(tmp_path / "a.ply", "ascii")
    ply(tmp_path / "b.ply", "binary_little_endian")
    for name in ("a.npz", "a.npy", "a.h5", "a.ply", "b.ply"):
        cut = tmp_path / f"cut_{name}"
        cut.write_bytes((tmp_path / name).read_bytes()[:keep])
        if name == "a.npy" and keep == 600:
            assert len((tmp_path / name).read_bytes()) < 600                   # this one is whole
        if len((tmp_path / name).read_bytes()) > keep:
            refused(cut, str(cut), "expected", keys=dict(target="cp") if name.endswith("ply") else {})


def test_damaged_blocks(tmp_path):
    path = npz(tmp_path / "a.npz", pos=RNG.normal(size=(20_000, 3)))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(bytes(raw))
    refused(path, "'pos'", "damaged")


@pytest.mark.parametrize("text, says", [
    ("plx\n", "no line 'ply'"),
    ("ply\nformat ascii 1.0\nelement face 2\n", "'face' first"),
    ("ply\nformat ascii 1.0\nelement vertex 30\nproperty list uchar int x\n", "list uchar int x"),
    ("ply\nformat ascii 1.0\nelement vertex 30\nproperty float x\nproperty float x\nend_header\n", "properties"),
    ("ply\nformat oval 1.0\nelement vertex 30\nproperty float x\nend_header\n", "'oval'"),
])
def test_ply_headers_that_do_not_fit(tmp_path, text, says):
    refused(ply(tmp_path / "a.ply", "ascii", head=text), says)


def test_vtk_that_kills_its_process(tmp_path, monkeypatch):
    pytest.importorskip("pyvista")
    monkeypatch.setattr(clouds, "_READER", "import os; os.abort()")
    (tmp_path / "a.stl").write_bytes(b"solid")
    refused(tmp_path / "a.stl", "damaged or cut off")


# ---------------------------------------------------------------- words about a cloud
def test_description_states_scale(tmp_path):
    side = np.stack(np.meshgrid(np.arange(5.), np.arange(4.), np.arange(3.)), -1).reshape(-1, 3)
    text = describe_cloud(read_cloud(npz(tmp_path / "a.npz", pos=side, target=side[:, 0])), "mm")
    for words in ("60 points in 3 dimensions", "extent   4 x 3 x 2 [mm]", "centre   2, 1.5, 1 [mm]", "spacing  1,", "0 to 4"):
        assert words in text
    assert "not stated" in describe_cloud(read_cloud(tmp_path / "a.npz")) and "on top" not in text
    twice = read_cloud(npz(tmp_path / "b.npz", pos=np.r_[side, side[:3]]))
    assert "6 of 63 points lie on top of another one" in describe_cloud(twice)
    assert "1 points" in describe_cloud(read_cloud(npz(tmp_path / "c.npz", pos=side[:1])))


def test_import_stays_light():
    done = subprocess.run([sys.executable, "-c", "import sys, erwin_nsa.data.clouds; print('pyvista' in sys.modules)"], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
