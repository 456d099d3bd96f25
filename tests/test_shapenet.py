"""ShapeNet-Car: the published points, cars, split, constants and units, and every way a raw archive can be wrong."""
import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from erwin_nsa.data import cars, shapenet, sources
from erwin_nsa.data.shapenet import (CarSet, ShapeNetCars, car_split, convert, normalised_mse, physical_mse, published_test_ids, raw_cars,
                                     read_raw_car, shapenet_geometry)
from erwin_nsa.data.store import CloudStore, PreparedClouds, collate, surface_cloud, write_clouds
from erwin_nsa.data.surfaces import Normalizer

SMALL = CarSet(cars=8, points=10, unused=(2, 4), tests=2, vals=2, missing=("param1/lost",))
XY = np.array([(0, 0), (1, 0), (50, 50), (60, 60), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1)])
QUADS = np.array([[0, 1, 7, 6], [1, 4, 8, 7], [4, 5, 9, 8]])
KEPT = [0, 1, 4, 5, 6, 7, 8, 9]


def press(i): return np.random.default_rng(i).uniform(-200, 150, 10).astype(np.float32)


def pos(i): return (np.c_[XY, np.full(10, i)] * .37).astype(np.float32)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    "Eight cars in the raw layout, and things beside them that are not cars."
    pytest.importorskip("pyvista", reason="reading VTK needs pyvista")
    root = tmp_path_factory.mktemp("raw")
    for i in range(8):
        cars.write_car_folder(root / "training_data" / f"param{i // 3}" / f"car{9 - i}", pos(i), QUADS, press(i), binary=i % 2 == 1)
    (root / "training_data" / "param1" / "lost").mkdir()
    (root / "training_data" / "param1" / "car0.old").mkdir()
    (root / "training_data" / "param1" / "list.txt").write_text("")
    return root


@pytest.fixture
def raw(archive, tmp_path):
    "A copy to damage."
    shutil.copytree(archive, tmp_path / "raw")
    return tmp_path / "raw"


# ---- points

def test_published_points():
    """3586 of 3682: 0 to 15 and 112 to 3681; 96 are dropped."""
    kept = CarSet().kept
    assert len(kept) == 3586 and np.array_equal(kept, np.concatenate([np.arange(16), np.arange(112, 3682)]))


def test_points_are_those_that_quads_use_in_order(archive):
    folder = raw_cars(archive, SMALL)[0]
    car = read_raw_car(folder, SMALL)
    i = 9 - int(folder.name[3:])
    assert np.array_equal(car.pos, pos(i)[KEPT]) and np.array_equal(car.pressure, press(i)[KEPT]) and car.name == f"param0_{folder.name}"


@pytest.mark.parametrize("unused", [(1, 3), (3, 5), (8, 10)])
def test_other_unused_points_are_refused(archive, unused):
    """The right number of points is not enough."""
    with pytest.raises(ValueError, match=f"quadpress_smpl.vtk: expected quads that use all points but {unused[0]} to {unused[1] - 1}"):
        read_raw_car(raw_cars(archive, SMALL)[0], CarSet(points=10, unused=unused))


# ---- cars

def test_cars_are_numbered_by_folder_then_name(archive):
    """param0 first, names sorted within; a known gap, a name with a dot and a file are no cars."""
    found = [f"{c.parent.name}/{c.name}" for c in raw_cars(archive, SMALL)]
    assert found == ["param0/car7", "param0/car8", "param0/car9", "param1/car4", "param1/car5", "param1/car6", "param2/car2", "param2/car3"]
    assert raw_cars(archive / "training_data", SMALL) == raw_cars(archive, SMALL)


def test_known_gaps_are_the_four_of_the_published_scripts():
    assert [m.split("/")[0] for m in CarSet().missing] == ["param2", "param2", "param5", "param8"]
    assert [m.split("/")[1][:6] for m in CarSet().missing] == ["854bb9", "85bb97", "9ec13d", "c5079a"]


@pytest.mark.parametrize("lose", ["quadpress_smpl.vtk", "press.npy"])
def test_an_unknown_gap_is_an_error(raw, lose):
    """A car that is quietly dropped would shift the number, and so the split, of all that follow."""
    (raw / "training_data/param0/car8" / lose).unlink()
    with pytest.raises(FileNotFoundError, match=rf"param0/car8/{lose}: expected a file, found none \(1 files are missing in 1 cars\)"):
        convert(raw, raw / "out.h5", SMALL, progress=False)
    assert not (raw / "out.h5").exists()


def test_a_wrong_number_of_cars_is_an_error(raw):
    shutil.rmtree(raw / "training_data/param2/car3")
    with pytest.raises(ValueError, match="expected 8 cars in param0 to param2, found 7"):
        raw_cars(raw, SMALL)
    with pytest.raises(ValueError, match="expected 889 cars .*found 7"):
        raw_cars(raw, CarSet(missing=SMALL.missing))
    with pytest.raises(FileNotFoundError, match="expected folders param0"):
        raw_cars(raw / "training_data/param0", SMALL)


# ---- split

def test_the_published_test_cars_are_drawn_again():
    ids = published_test_ids()
    assert len(set(ids)) == 189 and 0 <= min(ids) and max(ids) < 889
    assert ids[:14] == (550, 592, 229, 547, 62, 464, 798, 836, 5, 732, 876, 843, 367, 496)
    assert ids[-7:] == (580, 523, 631, 713, 607, 651, 168)


def test_another_permutation_is_noticed(monkeypatch):
    """Were torch to shuffle otherwise, the split would not change in silence; the digest covers ids that are not listed."""
    real = torch.randperm(889, generator=torch.Generator().manual_seed(0))
    swapped = real.clone()
    swapped[[50, 300]] = swapped[[300, 50]]
    monkeypatch.setattr(shapenet.torch, "randperm", lambda *a, **k: swapped)
    with pytest.raises(RuntimeError, match="another permutation"):
        car_split()


def test_validation_cars_come_from_the_training_cars():
    """630, 70 and 189; no test car is used for choosing a checkpoint; the same cars in every process."""
    split = np.array(car_split())
    assert [int((split == s).sum()) for s in ("train", "val", "test")] == [630, 70, 189]
    assert set(np.flatnonzero(split == "test")) == set(published_test_ids())
    assert np.flatnonzero(split == "val")[:6].tolist() == [24, 47, 51, 76, 90, 100] and car_split() == split.tolist()
    both = np.flatnonzero(split != "test")
    assert len(both) == 700 and (split[both] == "val").mean() == .1


def test_a_car_stays_in_validation_when_the_share_grows():
    few, many = car_split(CarSet(vals=30)), car_split(CarSet(vals=100))
    assert {i for i, s in enumerate(few) if s == "val"} < {i for i, s in enumerate(many) if s == "val"}
    with pytest.raises(ValueError, match="needed at least one each"):
        car_split(CarSet(vals=700))


# ---- conversion

def test_conversion_keeps_every_bit(archive, tmp_path):
    """Text and binary meshes, positions and pressures exactly, splits by car, and provenance."""
    file = convert(archive, tmp_path / "cars.h5", SMALL, progress=False)
    store, split = CloudStore(file), car_split(SMALL)
    assert len(store) == 8 and list(store.names) == split
    for cloud, folder in zip(store, raw_cars(archive, SMALL)):
        i = 9 - int(folder.name[3:])
        assert cloud.id == f"{folder.parent.name}_{folder.name}"
        assert cloud.pos.tobytes() == pos(i)[KEPT].tobytes() and cloud.target[:, 0].tobytes() == press(i)[KEPT].tobytes()
        assert np.abs(np.linalg.norm(cloud.x, axis=1) - 1).max() < 1e-6
    assert "not stated" in store.attrs["licence"] and "assumed" in store.attrs["units"]["target"] and store.attrs["parameters"]["vals"] == 2
    assert Normalizer.from_dict(store.attrs["normalizer"]) == Normalizer.shapenet_car()
    again = convert(archive, tmp_path / "again.h5", SMALL, progress=False)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("spoil, message", [
    (lambda d: np.save(d / "press.npy", press(1)[:9]), r"press.npy: expected 10 floating values, one a VTK point, found \(9,\) of float32"),
    (lambda d: np.save(d / "press.npy", press(1)[KEPT]), r"press.npy: expected 10 floating values, one a VTK point, found \(8,\)"),
    (lambda d: np.save(d / "press.npy", press(1).astype(int)), r"press.npy: expected 10 floating values.*found \(10,\) of int64"),
    (lambda d: np.save(d / "press.npy", np.where(np.arange(10) == 4, np.nan, press(1))), "press.npy: expected finite values, found 1 NaN"),
    (lambda d: np.save(d / "press.npy", np.array([{}] * 10, dtype=object)), "press.npy: expected a numpy array, found a file that cannot be read"),
    (lambda d: (d / "press.npy").write_bytes((d / "press.npy").read_bytes()[:-5]), "press.npy: expected a numpy array"),
    (lambda d: (d / "press.npy").write_bytes(b""), "press.npy: expected a numpy array"),
    (lambda d: (d / "quadpress_smpl.vtk").write_bytes(b""), "quadpress_smpl.vtk: expected a legacy VTK"),
    (lambda d: cars.write_car_folder(d, pos(1)[:9], QUADS.clip(max=8), press(1)[:9]), "expected 10 points of which quads use 8, found 9 and 7"),
    (lambda d: cars.write_car_folder(d, pos(1), QUADS[:2], press(1)), "expected 10 points of which quads use 8, found 10 and 6"),
    (lambda d: cars.write_car_folder(d, np.where(XY[:, :1] == 3, np.nan, pos(1)), QUADS, press(1)), "param0_car8: pos: given 6 NaN"),
])
def test_a_malformed_car_is_named(raw, spoil, message):
    """The error names the file, what was expected and what was found, and no output appears."""
    spoil(raw / "training_data/param0/car8")
    with pytest.raises(ValueError, match=message) as e:
        convert(raw, raw / "out.h5", SMALL, progress=False)
    assert "car8" in str(e.value) and not (raw / "out.h5").exists() and not list(raw.glob(".out*"))


@pytest.mark.parametrize("binary", [False, True])
def test_every_truncation_of_a_mesh_is_reported(raw, binary):
    folder = cars.write_car_folder(raw / "training_data/param0/car8", pos(1), QUADS, press(1), binary)
    whole = (folder / "quadpress_smpl.vtk").read_bytes()
    for part in np.linspace(0, len(whole) - 8, 9).astype(int):
        (folder / "quadpress_smpl.vtk").write_bytes(whole[:part])
        with pytest.raises(ValueError, match="car8/quadpress_smpl.vtk: expected"):
            read_raw_car(folder, SMALL)


def test_the_archive_as_published_becomes_one_file(archive, tmp_path, monkeypatch):
    """A zip of compressed tars, as on the server: unpacked, converted, verified by the commands of the data room."""
    monkeypatch.setattr(shapenet, "convert", lambda folder, out: convert(folder, out, SMALL, progress=False))
    (tmp_path / "shapenet_car").mkdir()
    with zipfile.ZipFile(tmp_path / "shapenet_car" / "mlcfd_data.zip", "w") as z:
        for p in sorted((archive / "training_data").iterdir()):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w:gz") as t:
                t.add(p, arcname=p.name)
                t.addfile(tarfile.TarInfo(f"{p.name}/car1/hexvelo_smpl.vtk"))
            z.writestr(f"mlcfd_data/training_data/{p.name}.tar.gz", out.getvalue())
    file = sources.convert("shapenet_car", tmp_path, progress=False)
    assert file.name == "shapenet_car.h5" and len(CloudStore(file, "test")) == 2 and sources.main(["describe", "shapenet_car", "--root", str(tmp_path)]) == 0
    assert not list((tmp_path / "shapenet_car/raw").rglob("hexvelo*"))
    assert [c for c in sources.verify("shapenet_car", tmp_path) if "no digest" not in c] == []


# ---- reading

@pytest.fixture(scope="module")
def small(archive, tmp_path_factory):
    return convert(archive, tmp_path_factory.mktemp("h5") / "cars.h5", SMALL, progress=False)


def test_published_maps_of_position_and_pressure(small):
    """Position: to the domain box axis by axis, then (u - 0.4063) / 0.1531; pressure: (p + 36.3099) / 48.5743; and back."""
    data = ShapeNetCars(small, None)
    for i, cloud in enumerate(data):
        raw = data.surface(i)
        u = (raw.pos.astype(np.float64) - (-2, -1, -4.5)) / (4, 5.5, 10.5)
        assert np.abs(cloud.pos - (u - .4063) / .1531).max() < 1e-5
        assert np.abs(cloud.target[:, 0] - (raw.pressure.astype(np.float64) + 36.3099) / 48.5743).max() < 1e-5
        assert np.abs(data.normalizer.decode_pressure(cloud.target[:, 0]) - raw.pressure).max() < 1e-4
    corners = Normalizer.shapenet_car().encode_pos(np.array([[-2., -1, -4.5], [2, 4.5, 6]]))
    assert np.abs(corners - [[-.4063 / .1531] * 3, [.5937 / .1531] * 3]).max() < 1e-9


def test_points_keep_their_order_at_every_access(small):
    """The published loader shuffles at each access; here graph and tree of a car stay valid."""
    data = PreparedClouds(ShapeNetCars(small), shapenet_geometry((4, 2)))
    (a, p), (b, q) = data[0], data[0]
    assert np.array_equal(a.pos, b.pos) and p is q


def test_graph_has_eight_neighbours_with_the_point_itself(small):
    """On normalised positions, which are squeezed, not on metres."""
    data = PreparedClouds(ShapeNetCars(small, None, normals=True), shapenet_geometry())
    batch = collate([data[0], data[1]])
    source, target = batch.edge_index
    assert batch.edge_index[1].bincount().tolist() == [8] * 16 and int((source == target).sum()) == 16
    assert batch.points.x.shape == (16, 3) and batch.target.shape == (16, 1)
    assert ShapeNetCars(small)[0].x is None


def test_a_file_of_another_kind_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="expected clouds of split 'dev', found \\['test', 'train', 'val'\\]"):
        ShapeNetCars(small, "dev")
    shutil.copy(small, tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "r+") as f: f.attrs["format"] = "erwin_nsa.surfaces"
    with pytest.raises(ValueError, match="x.h5: attribute 'format': expected 'erwin_nsa.clouds', found 'erwin_nsa.surfaces'"):
        ShapeNetCars(tmp_path / "x.h5")


# ---- units

def test_errors_convert_both_ways():
    """The numbers of the paper in both units; a zero predictor scores about 1 normalised, so 74.40 must be physical."""
    assert physical_mse(1.) == pytest.approx(2359.46, abs=.005)
    for normalised, physical in ((.0315, 74.40), (.00859, 20.26), (.0142, 33.5), (.0130, 30.7), (.0016, 3.8), (.0068, 16)):
        assert physical_mse(normalised) == pytest.approx(physical, rel=8e-3) and normalised_mse(physical) == pytest.approx(normalised, rel=8e-3)
    own = Normalizer((0, 0, 0), (1, 1, 1), 3., 10.)
    assert physical_mse(.25, own) == 25 and normalised_mse(25, own) == .25
    p = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = Normalizer.shapenet_car()
    assert (norm.decode_pressure(p) - norm.decode_pressure(p * 0)).square().mean() == pytest.approx(float(physical_mse(p.square().mean())))


# ---- real cars

@pytest.fixture(scope="module")
def real():
    folder = os.environ.get("ERWIN_NSA_DATA")
    file = Path(folder or ".") / "shapenet_car" / "cars3.npz"
    if not folder or not file.is_file():
        pytest.skip("no real cars: set ERWIN_NSA_DATA to a folder with shapenet_car/cars3.npz")
    return file


def test_real_cars_lose_exactly_the_96_published_points(real):
    with np.load(real) as z:
        assert np.array_equal(z["press_raw3682"][:, CarSet().kept], z["press"])


def test_real_cars_through_store_and_back(real, tmp_path):
    """Every bit of positions and pressures, 8 neighbours a point, positions inside the domain box, normalised pressure of unit scale."""
    given = cars.read_cars3(real)
    file = write_clouds(tmp_path / "real.h5", map(surface_cloud, given), split=["train", "val", "test"],
                        attributes=dict(generator="tests", parameters="none", seed="none", units=dict(pos="m", target="Pa"), licence="not stated upstream"))
    data = ShapeNetCars(file, None)
    for i, car in enumerate(given):
        assert data.surface(i).pos.tobytes() == car.pos.tobytes() and data.surface(i).pressure.tobytes() == car.pressure.tobytes()
        unit = (car.pos - (-2, -1, -4.5)) / (4, 5.5, 10.5)
        assert unit.min() > 0 and unit.max() < 1
    batch = collate([PreparedClouds(data, shapenet_geometry((256, 32)))[i] for i in range(3)])
    assert batch.points.sizes == (3586,) * 3 and set(batch.edge_index[1].bincount().tolist()) == {8}
    assert abs(float(batch.target.mean())) < .2 and .5 < float(batch.target.var()) < 1.5


def test_real_raw_cars_where_present(real, tmp_path):
    """The three real cars written as raw folders and read again: the published 96 points go, nothing else changes."""
    pytest.importorskip("pyvista", reason="reading VTK needs pyvista")
    kept = CarSet().kept
    with np.load(real) as z:
        full, p = np.zeros((3682, 3), np.float32), z["press_raw3682"][0]
        full[kept] = z["pos"][0]
    ring = np.stack([kept, np.roll(kept, -1), np.roll(kept, -2), np.roll(kept, -3)], 1)         # stands for the mesh, which is not in the file
    folder = cars.write_car_folder(tmp_path / "param0" / "a", full, ring, p, binary=True)
    car = read_raw_car(folder)
    assert len(car) == 3586 and np.array_equal(car.pos, full[kept]) and np.array_equal(car.pressure, p[kept])
