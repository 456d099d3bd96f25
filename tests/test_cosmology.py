"""Cosmology: halo records as TensorFlow writes them, damaged files, units and splits, real boxes, and the physics of the generator."""
import base64
import hashlib
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.spatial import cKDTree

from erwin_nsa.data import cosmology, density
from erwin_nsa.data.cosmology import HaloScale
from erwin_nsa.data.density import BoxConfig, Cosmology
from erwin_nsa.data.store import CloudStore, read_clouds

# Two records of three points with the features of the halo files, written by TensorFlow 2.21 (tf.io.TFRecordWriter, tf.io.serialize_tensor).
BY_TENSORFLOW = (
    "c-kvtVgQ4n$LG1YKC^Hsaxs_1R|rXQNpOjAFbc5<F>x>}@uV%gdH7pK*kSqBWJfMZE_VOi)bzyoBq2U79xg7RG6p3U%Pk(ZT*6$88OVZWXSMAiMpj`M`K<czLo4gUJLcUy1TwNXGd(vk-U3-STVp6#"
    "w-=^v`PA9YnlX${{fFugbIEftVkr2wLfnNR!OUgdb9NW5GA@>qg5)%zJgywBET|d@r33~V1Blxz(Ve!A{k3!Tm6XF=*FQRODRZ&<8W|WQqbpip93P?2rX1maLpp*>iHjwuEVBq*O|a&97tUWxUDAY`"
    "UARQKnDgR`k%RAMe3?BcY%m;9XxrlG5$Nr*#3025q@V&*fxL_S(>7<1hssV6PhcpSHIvsl#(y(ViNPU6ipWK_Kc;_?9VGHGTyXuf`w{upX@^?9uN|%maaS)RDivzRoN{_tCFA%;(8ifcsgQxe&pD<)"
    "$}z~|BpIpjn?~l5>Jp_R5333eVNHc+-}t%Ant8_ga4P3uONBe;?LAaI<(~68^|j78Q=ytgY((XmdEtJ=apAa9;oQ>gE){tVF4wJ&k(3H&Y391vzMAc9yXvwt)>QcI#ee6*xw$UiGz6S+q{715w!=$4"
    "Y&c|WZ0taKD&z{UJ^W20;n1v`s)x5`Bv=3dEhXlS")
# A tf.train.Example of TensorFlow 2.21: a float list, an int list, a tensor of floats, and 7.0 three times in the short form.
MIXED = base64.b64decode("CmMKFQoBYRIQEg4KDAAAwD8AAADAAABAQAoXCgFkEhIKEAoOCAESBBICCAMqBAAA4EAKGwoBYxIWChQKEggBEgQSAggCIggAAMA/AAAgQAoUCgFiEg8aDQoLA////////////wE=")
KEYS = ("x", "y", "z", "v_x", "v_y", "v_z")
MESSAGE = "ERWIN_NSA_DATA names no folder with cosmology/abacus_mini_z0_particles.npz"


@pytest.fixture
def tensorflow_file(tmp_path):
    path = tmp_path / "halos_test_0.tfrecord"
    path.write_bytes(zlib.decompress(base64.b85decode(BY_TENSORFLOW)))
    return path


@pytest.fixture
def abacus():
    path = cosmology.find_catalogue()
    if path is None:
        pytest.skip(MESSAGE)
    return cosmology.read_catalogue(path, 32.)


@pytest.fixture(scope="module")
def power():
    pytest.importorskip("colossus", reason="colossus is not installed")
    return density.linear_power()


def record(seed=0, n=4, **change):
    rng = np.random.default_rng(seed)
    found = {k: rng.uniform(0, 1000, n) for k in "xyz"} | {k: rng.normal(0, 344, n) for k in ("v_x", "v_y", "v_z")} | change
    return {k: v for k, v in found.items() if v is not None}


# ---- records

def test_records_of_tensorflow_are_read(tensorflow_file):
    """The same numbers that were given to TensorFlow, in its own file."""
    clouds = list(cosmology.read_halos(tensorflow_file, 3))
    assert [c.id for c in clouds] == ["halos_test_0_0000", "halos_test_0_0001"]
    for seed, c in enumerate(clouds):
        rng = np.random.default_rng(seed)
        pos = [np.round(rng.uniform(0, 1000, 3), 2) for _ in "xyz"]
        vel = [np.round(rng.normal(0, 344, 3), 2) for _ in "xyz"]
        assert np.array_equal(c.pos, np.stack(pos, 1).astype(np.float32)) and np.array_equal(c.target, np.stack(vel, 1).astype(np.float32))
        assert float(c.constants["sigma_8"]) == np.float32(.834) and float(c.constants["box"]) == 1000


def test_records_are_written_as_tensorflow_writes_them(tensorflow_file, tmp_path):
    """Byte for byte, so that a file of ours can be read by the published loader."""
    arrays = [cosmology.parse_example(r) for r in cosmology.read_records(tensorflow_file)]
    assert cosmology.write_halo_file(tmp_path / "back.tfrecord", arrays).read_bytes() == tensorflow_file.read_bytes()


def test_other_forms_of_a_feature():
    """Float lists and tensors without raw content are read, integers refused by name."""
    found = cosmology.parse_example(MIXED, {"a", "c", "d"})
    assert found["a"].tolist() == [1.5, -2, 3] and found["c"].tolist() == [1.5, 2.5] and found["d"].tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match="key 'b': expected float32 values, found a list of integers"):
        cosmology.parse_example(MIXED)


def test_every_flipped_bit_and_every_cut_is_found(tensorflow_file):
    """A file that changed in one byte, or ends early anywhere but between records, is refused with its name."""
    whole = tensorflow_file.read_bytes()
    first = 16 + int.from_bytes(whole[:8], "little")
    for i in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[i] ^= 1 << i % 8
        tensorflow_file.write_bytes(changed)
        with pytest.raises(ValueError, match="halos_test_0.tfrecord: record [01]: key '(length|data)': expected"):
            list(cosmology.read_records(tensorflow_file))
    for n in range(1, len(whole), 13):
        tensorflow_file.write_bytes(whole[:n])
        if n == first:
            continue
        with pytest.raises(ValueError, match="cut short"):
            list(cosmology.read_records(tensorflow_file))


def test_damaged_messages_raise_only_value_errors():
    """Bytes that are no message, with right check sums: a ValueError or other numbers, never another error, never endless memory."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        changed = bytearray(MIXED)
        for i in rng.integers(len(MIXED), size=rng.integers(1, 4)):
            changed[i] = rng.integers(256)
        try:
            cosmology.parse_example(bytes(changed[:rng.integers(1, len(MIXED) + 1)]))
        except ValueError:
            pass


@pytest.mark.parametrize("change, says", [
    (dict(v_z=None), "key 'v_z': expected keys v_x, v_y, v_z, found"),
    (dict(y=np.zeros(3)), r"key 'y': expected 4 values, found shape \(3,\)"),
    (dict(y=np.zeros((4, 1))), r"key 'y': expected 4 values, found shape \(4, 1\)"),
    (dict(v_x=[1, 2, np.nan, 4]), "key 'v_x': expected finite values, found 1 NaN"),
    (dict(x=[1, 2, 3, 9e5]), "key 'x': expected positions of 0 to 1000 Mpc/h, found .* convert the unit"),
])
def test_a_bad_record_stops_the_conversion(tmp_path, change, says):
    """The message names file, record and key; no half-written file remains."""
    cosmology.write_halo_file(tmp_path / "halos_train_0.tfrecord", [record(), record(1, **change)])
    with pytest.raises(ValueError, match=r"halos_train_0.tfrecord: record 1: " + says):
        cosmology.convert_halos(tmp_path, tmp_path / "out.h5", dict(train=2), n_points=4)
    assert [p.name for p in tmp_path.iterdir()] == ["halos_train_0.tfrecord"]


def test_wrong_dtype_and_wrong_count_of_records(tmp_path):
    """float64 is refused, and so is a folder with fewer records than the task needs."""
    data = cosmology._put_tensor([1., 2.]).replace(b"\x08\x01", b"\x08\x02", 1)
    with pytest.raises(ValueError, match="expected dtype float32, found float64"):
        cosmology.parse_tensor(data)
    cosmology.write_halo_file(tmp_path / "halos_val_0.tfrecord", [record()])
    with pytest.raises(ValueError, match="split 'val': expected 512 records, found 1 in 1 files"):
        cosmology.convert_halos(tmp_path, tmp_path / "out.h5", dict(val=512))
    with pytest.raises(ValueError, match="expected 5000 values"):
        cosmology.convert_halos(tmp_path, tmp_path / "out.h5", dict(val=1))


def test_conversion_keeps_rows_order_and_origin(tmp_path):
    """Mass rank is the row number: no row moves. Files come in the order of names, counts and sums go with the data."""
    for i in (9, 10, 1):
        cosmology.write_halo_file(tmp_path / f"halos_train_{i}.tfrecord", [record(10 * i + j) for j in range(2)])
    cosmology.write_halo_file(tmp_path / "halos_test_0.tfrecord", [record(999)])
    out = cosmology.convert_halos(tmp_path, tmp_path / "out.h5", dict(train=3, test=None), n_points=4)
    store = CloudStore(out)
    assert store.ids == ["halos_train_1_0000", "halos_train_1_0001", "halos_train_10_0000", "halos_test_0_0000"]
    assert store.names.tolist() == ["train"] * 3 + ["test"]
    for c, seed in zip(store, (10, 11, 100, 999)):
        want = record(seed)
        assert np.array_equal(c.pos, np.stack([want[k] for k in "xyz"], 1).astype(np.float32))
        assert np.array_equal(c.target, np.stack([want[k] for k in KEYS[3:]], 1).astype(np.float32))
    about = store.attrs["parameters"]["halos_train_10.tfrecord"]
    assert about == dict(split="train", records=1, sha256=hashlib.sha256((tmp_path / "halos_train_10.tfrecord").read_bytes()).hexdigest())
    assert store.attrs["units"] == dict(pos="Mpc/h", target="km/s", box="Mpc/h") and HaloScale(**store.attrs["scale"]) == HaloScale.published()


# ---- units

@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_standard_numbers_and_back(kind):
    """Constants to all printed digits; dtype and library stay; a box of 1000 has its own length on each axis."""
    scale, rng = HaloScale.published(), np.random.default_rng(0)
    v = rng.normal(0, 344, (1000, 3)).astype(np.float32)
    given = torch.tensor(v) if kind == "torch" else v
    got = scale.encode_vel(given)
    assert got.dtype == given.dtype
    by_hand = (v.astype(np.float64) - [-.0512854365234889, -.01263126442198149, -.06458034372345466]) / [344.0231468131901, 343.9333673335964, 344.071876710777]
    assert np.abs(np.asarray(got) - by_hand).max() < 1e-6 and np.abs(np.asarray(scale.decode_vel(got)) - v).max() < 1e-3
    low, high = scale.encode_pos(np.zeros(3)), scale.encode_pos(np.full(3, 1000.))
    assert np.allclose(scale.encode_box(1000.), high - low) and np.abs(np.abs([low, high]) - 3 ** .5).max() < 2e-3


def test_errors_convert_both_ways():
    """Three errors convert exactly; one number within the spread of the axes; predicting zero costs the variance."""
    scale, rng = HaloScale.published(), np.random.default_rng(1)
    true, guess = rng.normal(0, 344, (2, 5000, 3))
    physical = ((guess - true) ** 2).mean(0)
    standard = ((scale.encode_vel(guess) - scale.encode_vel(true)) ** 2).mean(0)
    assert np.isclose(cosmology.mse_to_physical(standard, scale), physical.mean(), rtol=1e-12)
    assert np.isclose(cosmology.mse_to_standard(physical, scale), standard.mean(), rtol=1e-12)
    assert np.isclose(cosmology.mse_to_physical(standard.mean(), scale), physical.mean(), rtol=1e-3)
    assert abs((scale.encode_vel(true) ** 2).mean() - 1) < .05
    assert abs(cosmology.mse_to_physical(.60, scale) ** .5 - 266.5) < .1 and abs(cosmology.mse_to_physical(.0060, scale) ** .5 - 26.6) < .1
    with pytest.raises(ValueError, match="none below 0"):
        cosmology.mse_to_standard(-1., scale)


# ---- catalogues

def test_minimum_image_is_the_nearest_of_27():
    """Against a loop over all images, with points outside the box too."""
    rng = np.random.default_rng(0)
    pos, centre = rng.uniform(-10, 20, (50, 3)), rng.uniform(0, 10, 3)
    got = np.linalg.norm(cosmology.wrap_around(pos, centre, 10.), axis=1)
    images = np.array([pos + 10. * np.array(s) for s in np.ndindex(7, 7, 7)]) - 30 - centre
    assert np.allclose(got, np.linalg.norm(images, axis=2).min(0))


@pytest.mark.parametrize("suffix", ["npz", "h5"])
def test_damaged_catalogues(tmp_path, suffix):
    """Cut anywhere, the file is refused by name or, where only padding is lost, read whole."""
    rng = np.random.default_rng(0)
    path, cut = tmp_path / f"a.{suffix}", tmp_path / f"cut.{suffix}"
    tables = dict(pos=rng.uniform(0, 1, (50, 3)), vel=rng.normal(size=(50, 3)))
    if suffix == "npz":
        np.savez(path, **tables)
    else:
        import h5py
        with h5py.File(path, "w") as f:
            f.update(tables)
    whole = path.read_bytes()
    for n in range(0, len(whole), 97):
        cut.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=f"cut.{suffix}"):
            cosmology.read_catalogue(cut)
    with pytest.raises(ValueError, match=f"a.{suffix}: key 'v': expected tables pos, v, found"):
        cosmology.read_catalogue(path, vel="v")


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("side", [None, 4.])
def test_no_leak_between_regions_of_the_real_box(abacus, axis, side):
    """Points of different splits are a gap apart, also around the box, and no cloud holds a point twice."""
    gap, clouds = 1., {}
    for s, r in cosmology.split_regions(abacus, gap=gap, axis=axis).items():
        clouds[s] = cosmology.catalogue_clouds(abacus, r, 3, 500, seed=5, side=side)
    places = {s: np.concatenate([np.mod(c.pos + c.constants["centre"], 32) for c in cs]) % 32 for s, cs in clouds.items()}
    for a in places:
        assert all(len(np.unique(c.pos, axis=0)) == 500 for c in clouds[a])
        for b in set(places) - {a}:
            assert cKDTree(places[a], boxsize=32).query(places[b])[0].min() >= gap - 1e-5
    if side is not None:
        assert all(np.abs(c.pos).max() <= side / 2 for cs in clouds.values() for c in cs)


def test_clouds_of_the_real_box_are_samples_to_learn_from(abacus):
    """5000 points of the training region: units, wrapping, determinism, and neighbours that move alike."""
    region = cosmology.split_regions(abacus)["train"]
    a, b = (cosmology.catalogue_clouds(abacus, region, 2, 5000, seed=0) for _ in range(2))
    assert all(np.array_equal(c.pos, d.pos) and np.array_equal(c.target, d.target) for c, d in zip(a, b))
    assert not np.array_equal(a[0].pos, a[1].pos)
    with np.load(cosmology.find_catalogue()) as z:
        d, row = cKDTree(np.mod(z["pos"].astype(np.float64), 32) % 32, boxsize=32).query(a[0].pos)
        assert d.max() < 1e-5 and np.abs(z["vel"][row] - a[0].target).max() < 1e-3
    _, near = cKDTree(a[0].pos).query(a[0].pos, 2)
    assert min(np.corrcoef(a[0].target[near[:, 1], i], a[0].target[:, i])[0, 1] for i in range(3)) > .3


def test_open_catalogues_have_no_wrapping(tmp_path):
    """Without a box positions stay as they are, negative ones too, and cubes stay inside."""
    rng = np.random.default_rng(0)
    pos, vel = rng.uniform(-7, 3, (5000, 3)), rng.normal(size=(5000, 3))
    np.savez(tmp_path / "a.npz", pos=pos, vel=vel)
    table = cosmology.read_catalogue(tmp_path / "a.npz")
    assert np.array_equal(table.pos, pos.astype(np.float32))
    for r in cosmology.split_regions(table).values():
        for c in cosmology.catalogue_clouds(table, r, 4, 10, side=1.9):
            assert cKDTree(table.pos).query(c.pos + c.constants["centre"])[0].max() < 1e-5
            assert "box" not in c.constants


def test_cubes_are_whole():
    """A cube near the edge of its slab is not cut off by it: points reach all six faces."""
    rng = np.random.default_rng(0)
    table = cosmology.Catalogue("u", rng.uniform(0, 10, (100_000, 3)).astype(np.float32), np.zeros((100_000, 3), np.float32), 10.)
    for r in cosmology.split_regions(table, axis=1).values():
        for c in cosmology.catalogue_clouds(table, r, 6, 500, side=1.9):
            assert (c.pos.min(0) < -.9).all() and (c.pos.max(0) > .9).all() and np.abs(c.pos).max() <= .95


# ---- the generator

def test_spectrum_of_many_fields_is_the_input(power):
    """Over 12 seeds the deviations, in units of cosmic variance, have mean 0 and variance 1."""
    off = []
    for seed in range(12):
        m = density.measure_spectrum(density.gaussian_field(power, 32, 400., np.random.default_rng(seed)), 400., 12, power)
        off.append(((m["power"] / m["model"] - 1) / np.sqrt(2 / m["modes"]))[3:])    # the first shells are few waves, far from normal
    off = np.array(off)
    assert abs(off.mean()) < 4 / off.size ** .5 and .7 < (off ** 2).mean() < 1.4 and np.abs(off).max() < 5


@pytest.mark.parametrize("grid", [16, 17])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_wave_moves_as_on_paper(grid, axis):
    """-A sin(kx) / k along its own axis and nothing else, on even and odd grids."""
    x = np.moveaxis(np.broadcast_to(2 * np.pi * 2 * np.arange(grid) / grid, (grid,) * 3), 2, axis)
    first, second = density.displacement(.3 * np.cos(x), 50.)
    want = np.zeros((3, *x.shape))
    want[axis] = -.3 * np.sin(x) * 50 / (4 * np.pi)
    assert np.abs(first - want).max() < 1e-10 and np.abs(second).max() < 1e-10


def test_source_is_the_one_of_real_space(power):
    """The second-order source against derivatives of the potential by finite differences."""
    box, n = 400., 48
    delta = density.smooth(density.gaussian_field(power, n, box, np.random.default_rng(0), np.float64), box, 40.)
    k = density._waves(n, box, np.float64)
    phi = density.fft.irfftn(density.fft.rfftn(delta) / -density._square(k), s=delta.shape)
    d = lambda a, i: (8 * (np.roll(a, -1, i) - np.roll(a, 1, i)) - np.roll(a, -2, i) + np.roll(a, 2, i)) * n / box / 12
    h = [[d(d(phi, i), j) for j in range(3)] for i in range(3)]
    want = sum(h[i][i] * h[j][j] - h[i][j] ** 2 for i, j in ((0, 1), (1, 2), (2, 0)))
    got = density.second_order_source(delta, box)
    assert np.abs(got - want).max() < 5e-3 * np.abs(want).max()


@pytest.mark.parametrize("omega_m", [.1, .3175, .5])
def test_growth_agrees_with_colossus_and_with_fits(omega_m):
    colossus = pytest.importorskip("colossus.cosmology.cosmology", reason="colossus is not installed")
    theirs = colossus.Cosmology(name="t", flat=True, H0=70., Om0=omega_m, Ob0=.05, sigma8=.8, ns=1., relspecies=False, persistence="")
    for z in (0., .5, 3.):
        g, step = density.growth(Cosmology(omega_m=omega_m), z), 1e-3
        assert np.isclose(g.d1, theirs.growthFactor(z), rtol=5e-4)
        f = -(1 + z) * theirs.growthFactor(z, derivative=1) / theirs.growthFactor(z)
        assert np.isclose(g.f1, f, rtol=2e-3)
        up, down = (density.growth(Cosmology(omega_m=omega_m), (1 + z + .1) * np.exp(s) - 1.) for s in (step, -step))
        middle = density.growth(Cosmology(omega_m=omega_m), z + .1)
        assert np.isclose(middle.f2, -np.log(up.d2 / down.d2) / (2 * step), rtol=1e-4)
        omega = omega_m * (1 + z) ** 3 / g.hubble ** 2
        assert np.isclose(g.d2 / g.d1 ** 2, -3 / 7 * omega ** (-1 / 143), rtol=2e-3) and np.isclose(g.f2, 2 * omega ** (6 / 11), rtol=2e-2)


def test_velocity_dispersion_is_the_integral_of_the_spectrum(power):
    """First order: mean square velocity an axis = (a H f)^2 / (6 pi^2) int P dk over the waves of the box, within its variance."""
    config = BoxConfig(box=1000., grid=48, smoothing=10., order=1)
    k = np.geomspace(.7 * 2 * np.pi / 1000, np.pi * 48 / 1000, 4000)
    want = density.growth().velocity(1) * np.sqrt(trapezoid(power(k) * np.exp(-(10 * k) ** 2), k) / (6 * np.pi ** 2))
    got = [density.make_universe(s, config, power).tracers(np.arange(48 ** 3))[1].std() for s in range(6)]
    assert abs(np.mean(got) / want - 1) < .05


def test_a_spectrum_table_is_enough(power, monkeypatch):
    """Without Colossus the message names the package and the way out, and a table makes the same cloud."""
    config = BoxConfig(box=300., grid=32, smoothing=6.)
    want = density.make_cosmology(3, 50, config)
    for name in [m for m in sys.modules if m.split(".")[0] == "colossus"] + ["colossus"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'erwin_nsa\[cosmology\].*power=sample_power\(\)'):
        density.make_cosmology(3, 50, config)
    got = density.make_cosmology(3, 50, config, density.sample_power())
    assert np.abs(got.pos - want.pos).max() < 1e-3 and np.abs(got.target - want.target).max() < 1e-2


def test_colossus_leaves_nothing_behind(tmp_path):
    """No cache in the home folder."""
    pytest.importorskip("colossus", reason="colossus is not installed")
    import subprocess
    subprocess.run([sys.executable, "-c", "from erwin_nsa.data.density import linear_power; linear_power()"], check=True, env=dict(os.environ, HOME=str(tmp_path)), cwd=Path(__file__).parents[1])
    assert not [p for p in tmp_path.rglob("*") if "colossus" in p.name.lower()]


def test_clouds_differ_by_seed_and_agree_by_seed(power):
    """Bit for bit; also the constants and the settings reach the cloud."""
    config = BoxConfig(Cosmology(omega_m=.25, h=.7), box=300., grid=32, smoothing=6., redshift=1.)
    other = density.linear_power(config.cosmology)
    a, b = density.generate_cosmology(2, 60, 4, config=config, power=other)
    again = density.make_cosmology((4, 1), 60, config)
    assert np.array_equal(again.pos, b.pos) and np.array_equal(again.target, b.target) and again.id == b.id
    assert not np.isclose(a.pos, b.pos).all(1).any()
    assert float(a.constants["Omega_m"]) == .25 and float(a.constants["redshift"]) == 1 and float(a.constants["box"]) == 300
    young = density.make_cosmology((4, 1), 60, BoxConfig(Cosmology(omega_m=.25, h=.7), box=300., grid=32, smoothing=6., redshift=9.), other)
    assert young.target.std() < .75 * b.target.std()


@pytest.mark.parametrize("n", [1, 1000, 32 ** 3])
def test_particles_in_any_number(power, n):
    """No cell twice; all of them give the grid in order."""
    c = density.make_cosmology(0, n, BoxConfig(box=300., grid=32, smoothing=6., tracers="particles"), power)
    assert len(c) == n == len(np.unique(c.pos, axis=0)) and c.pos.min() >= 0 and c.pos.max() < 300


def test_linear_velocity_moves_with_the_cloud(power):
    """A shift around the box by whole cells changes nothing; more bias never means faster matter."""
    c, g = density.make_cosmology(0, 200, BoxConfig(box=400., grid=32, smoothing=8.), power), density.growth()
    here = density.linear_velocity(c.pos, 400., power, g, 3., 16)
    there = density.linear_velocity(np.mod(c.pos.astype(np.float64) + [25, 375, 200], 400), 400., power, g, 3., 16)
    assert np.abs(here - there).max() < .05 and np.abs(here).max() > 10
    assert density.linear_velocity(c.pos, 400., power, g, 30., 16).std() < here.std()


# ---- the sample

def test_sample_has_its_origin_and_no_shared_universe():
    """Six attributes, units, a spectrum; splits by seed; positions inside the box, velocities as expected of haloes."""
    store = CloudStore(density.find_sample("cosmology.h5"))
    assert store.attrs["generator"].startswith("erwin_nsa.data.density") and store.attrs["licence"] == "Apache-2.0"
    assert store.attrs["units"] == dict(pos="Mpc/h", target="km/s", box="Mpc/h") and store.attrs["version"]
    assert store.attrs["parameters"]["cosmology"]["omega_m"] == .3175 and store.attrs["seed"] == dict(train=0, val=1, test=2)
    assert store.path.stat().st_size < 3e6
    clouds = {s: density.load_cosmology(s) for s in ("train", "val", "test")}
    assert [len(c) for c in clouds.values()] == [16, 4, 4] and len({c.id for cs in clouds.values() for c in cs}) == 24
    first = [tuple(c.pos[0]) for cs in clouds.values() for c in cs]
    assert len(set(first)) == 24
    for c in read_clouds(store.path):
        assert len(c) == 5000 and c.pos.min() >= 0 and c.pos.max() < 1000 and 220 < c.target.std() < 360
        assert np.abs(c.target.mean(0)).max() < 60


def test_sample_is_what_the_generator_makes():
    """The last test cloud, made again from seed and stored spectrum; rounding may swap two peaks of one height."""
    want = density.load_cosmology("test")[-1]
    got = density.make_cosmology((2, 3), power=density.sample_power())
    near, row = cKDTree(got.pos, boxsize=1000).query(want.pos)
    assert got.id == want.id and (near < .01).mean() > .999 and (np.abs(got.target[row] - want.target).max(1) < 1).mean() > .999
