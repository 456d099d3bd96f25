"""Polymer chains: damaged files, window arithmetic, noise, losses, the interval of the frames, and the physics of the generator."""
import importlib.util
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch.utils.data import DataLoader

from erwin_nsa.data import chains as generator
from erwin_nsa.data.chains import ChainPhysics, bond_distribution, bond_energy, bond_lengths, bond_moments, build_start, center_of_mass
from erwin_nsa.data.chains import chain_sequence, drift_variance, generate_chains, load_chains, load_windows, make_chain
from erwin_nsa.data.chains import open_simulation, pack_chains, pair_energy, simulate
from erwin_nsa.data.polymers import LAYOUT, NOISE_STD, PUBLISHED, Chain, ChainErrors, ChainScale, ChainWindows, PositionNoise
from erwin_nsa.data.polymers import acceleration_mse, advance, bond_graph, check_interval, gaussian_head, gaussian_nll, measure_scale
from erwin_nsa.data.polymers import open_published, physical_nll, read_about, read_chain, read_chains
from erwin_nsa.data.polymers import validation_subset, window_features, window_starts, write_chain, write_chains
from erwin_nsa.data.store import Geometry, PreparedClouds, collate

ROOT = Path(__file__).resolve().parents[1]
UNIT = ChainScale((1, 1, 1), (1, 1, 1), (1, 1, 1))
ABOUT = dict(generator="tests", parameters={}, seed=0, units="none", licence="Apache-2.0")
needs_openmm = pytest.mark.skipif(importlib.util.find_spec("openmm") is None, reason="openmm is not installed: pip install openmm")


def walk(name="walk", T=40, n=6, step=1.28, **kw):
    """A chain of independent random walkers: displacements have the standard deviation `step`, successive ones are independent."""
    rng = np.random.default_rng(sum(map(ord, name)))
    return Chain(name, step * rng.normal(size=(T, n, 3)).cumsum(0), rng.integers(0, 4, n), [[i, i + 1] for i in range(n - 1)], **kw)


# ---- files

@pytest.mark.parametrize("key, value, found", [
    ("position", None, "expected a dataset of floating numbers, found none"),
    ("particle_type", None, "expected a dataset of integers, found none"),
    ("bond_indices", None, "expected a dataset of numbers, found none"),
    ("position", np.zeros((40, 6, 3), int), "expected floating numbers in 3 dimensions, found int64"),
    ("position", np.zeros((40, 18), np.float32), r"found float32 of shape \(40, 18\)"),
    ("position", np.zeros((40, 6, 2), np.float32), r"expected shape \(frames, beads, 3\), found \(40, 6, 2\)"),
    ("position", np.full((40, 6, 3), np.inf, np.float32), "expected finite coordinates, found 18 NaN or infinite in frame 0"),
    ("particle_type", np.zeros(6), "expected integers in 1 dimension, found float64"),
    ("particle_type", np.zeros(5, int), r"expected 6 bead types, one a bead of 'position', found shape \(5,\)"),
    ("particle_type", np.full(6, 4), "expected integers 0 to 3, found int64 from 4 to 4"),
    ("bond_indices", np.zeros((4, 2)), r"expected shape \(5, 2\) for 6 beads, found \(4, 2\)"),
    ("bond_indices", np.array([[i, i + 1.] for i in range(1, 6)]), "expected bead numbers 0 to 5, found 1 to 6"),
    ("bond_indices", np.array([[0, 1], [0, 1], [0, 1], [0, 1], [0, 1.]]), "expected 1 connected piece, found 5"),
    ("bond_indices", np.array([[0, np.nan]] * 5), "expected whole bead numbers, found nan"),
    ("time", np.arange(39.), r"expected 40 finite values, one a frame, found shape \(39,\)"),
])
def test_a_malformed_chain_names_file_key_expected_and_found(tmp_path, key, value, found):
    """In the published folder and in a set of one file alike."""
    folder = write_chain(tmp_path / "poly", walk(time=np.arange(40.)))
    with h5py.File(folder / LAYOUT[key], "w") as f:
        if value is not None:
            f[key] = value
    with pytest.raises(ValueError, match=f"key '{key}': .*{found}") as e:
        read_chain(folder)
    wrong = str(e.value)
    other = {"position": "ptype.h5"}.get(key, LAYOUT[key])       # a count of beads is told by the file that disagrees
    assert str(folder / LAYOUT[key]) in wrong or str(folder / other) in wrong
    path = write_chains(tmp_path / "set.h5", [walk(time=np.arange(40.))], ["train"], ABOUT)
    with h5py.File(path, "r+") as f:
        del f["walk"][key]
        if value is not None:
            f["walk"][key] = value
    with pytest.raises(ValueError, match=found) as e:
        read_chains(path)
    assert str(path) in str(e.value) and "walk" in str(e.value)


@pytest.mark.parametrize("part", [0, .3, .7, .95])
def test_a_truncated_file_is_refused(tmp_path, part):
    folder = write_chain(tmp_path / "poly", walk(T=200))
    data = (folder / "position.h5").read_bytes()
    (folder / "position.h5").write_bytes(data[:int(part * len(data))])
    for keep in ("memory", "disk"):
        with pytest.raises(ValueError, match="position.h5.*expected an HDF5 file, found one that cannot be opened"):
            read_chain(folder, keep=keep)


def test_a_damaged_block_is_refused(tmp_path):
    path = write_chains(tmp_path / "set.h5", [walk(T=300)], ["train"], ABOUT)
    with h5py.File(path) as f:
        chunk = f["walk/position"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset:chunk.byte_offset + 64] = bytes(64)
    path.write_bytes(data)
    for keep in ("memory", "disk"):
        with pytest.raises(ValueError, match="set.h5: key 'walk/position': expected readable data, found a damaged block"):
            read_chains(path, keep=keep)


def test_the_published_files_read_as_published(tmp_path):
    """Written here as the original scripts did: float bonds, int64 types, no times, box and radius of gyration unused."""
    x = np.random.default_rng(0).normal(size=(30, 4, 3)).astype(np.float32)
    data = dict(position=x, particle_type=np.array([0, 2, 1, 3]), bond_indices=np.array([[0., 1], [0, 2], [2, 3]]), lattice=np.ones((30, 3)), rgs=np.ones(30))
    (tmp_path / "poly00001").mkdir()
    for key, value in data.items():
        with h5py.File(tmp_path / "poly00001" / LAYOUT[key], "w") as f:
            f.create_dataset(key, data=value)
    chain = read_chain(tmp_path / "poly00001")
    assert chain.name == "poly00001" and chain.time is None and chain.bonds.dtype == np.int64 and chain.bonds.tolist() == [[0, 1], [0, 2], [2, 3]]
    assert np.array_equal(chain.position, x) and chain.kind.tolist() == [0, 2, 1, 3]
    for name in ("lattice.h5", "rgs.h5"):
        (tmp_path / "poly00001" / name).unlink()
    assert len(read_chain(tmp_path / "poly00001")) == 30


def test_a_set_is_deterministic_and_survives_a_failing_write(tmp_path, monkeypatch):
    path = write_chains(tmp_path / "a.h5", [walk(), walk("b")], ["train", "val"], ABOUT)
    before = path.read_bytes()
    assert write_chains(tmp_path / "b.h5", [walk(), walk("b")], ["train", "val"], ABOUT).read_bytes() == before
    from erwin_nsa.data import polymers

    def full(*_):
        raise OSError("no space left on device")
    monkeypatch.setattr(polymers, "_datasets", full)
    with pytest.raises(OSError, match="no space left"):
        write_chains(path, [walk()], ["train"], ABOUT)
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "b.h5"]


# ---- windows

def test_counts_are_the_published_ones():
    assert [chains * len(window_starts(T)) for chains, T in ((90, 10_000), (10, 10_000), (40, 1000))] == [898_560, 99_840, 39_360]


@pytest.mark.parametrize("T, seq_len", [(17, 16), (18, 16), (60, 16), (60, 2), (60, 59)])
def test_windows_cover_every_frame_and_no_more(T, seq_len):
    starts = window_starts(T, seq_len=seq_len)
    assert len(starts) == T - seq_len and starts[0] == 0 and starts[-1] + seq_len == T - 1
    assert len(window_starts(seq_len, seq_len=seq_len)) == 0


def test_no_window_crosses_a_chain_or_a_gap():
    """Each frame carries its chain and its time as coordinates; within every window the first is constant and the second grows by one."""
    stamps = {"a": np.arange(40.), "b": np.concatenate([np.arange(25.), 30. + np.arange(20), 90 + np.arange(5)])}
    made = [Chain(k, np.repeat(np.stack([0 * t + 1000 * i, t, 0 * t], 1)[:, None], 2, 1), [0, 1], [[0, 1]], time=t) for i, (k, t) in enumerate(stamps.items())]
    windows = ChainWindows(made, UNIT)
    assert len(windows) == 24 + 9 + 4
    for i in range(len(windows)):
        v = windows[i].x.reshape(2, 15, 3)
        assert (v[:, :, 0] == 0).all() and (v[:, :, 1] == 1).all() and (windows[i].target == 0).all()
    assert [windows[i].id for i in (0, 23, 24, 32, 33, -1)] == ["a:0", "a:23", "b:0", "b:8", "b:25", "b:28"]


def test_features_and_target_are_what_the_frames_say():
    """Against a plain loop over beads and frames, with the published constants."""
    chain = walk(T=25, n=5)
    windows = ChainWindows([chain])
    x, mean = chain.position.astype(np.float64), chain.position.astype(np.float64).mean((0, 1))
    for start in (0, 3, 8):
        w = windows[start]
        assert w.x.shape == (5, 45) and w.pos.shape == w.target.shape == (5, 3) and (w.kind == chain.kind).all()
        for bead in range(5):
            for axis in range(3):
                for i in range(15):
                    v = x[start + i + 1, bead, axis] - x[start + i, bead, axis]
                    assert w.x[bead, 3 * i + axis] == pytest.approx(v / PUBLISHED.vel_std[axis], abs=1e-5)
                assert w.pos[bead, axis] == pytest.approx((x[start + 15, bead, axis] - mean[axis]) / PUBLISHED.pos_std[axis], abs=1e-6)
                a = x[start + 16, bead, axis] - 2 * x[start + 15, bead, axis] + x[start + 14, bead, axis]
                assert w.target[bead, axis] == pytest.approx(a / PUBLISHED.acc_std[axis], abs=1e-5)


def test_one_constant_center_of_the_frames_that_were_loaded(tmp_path):
    """A drifting chain keeps its drift: the center is neither that of a frame nor that of frames beyond the limit."""
    x = np.zeros((60, 2, 3)) + np.arange(60)[:, None, None]
    folder = write_chain(tmp_path / "p", Chain("p", x, [0, 1], [[0, 1]]))
    for keep in ("memory", "disk"):
        chain = read_chain(folder, frames=20, keep=keep)
        assert np.allclose(chain.center, 9.5) and len(ChainWindows([chain])) == 4
        pos = [w.pos * PUBLISHED.pos_std for w in ChainWindows([chain])]
        assert np.allclose(pos[0], 15 - 9.5) and np.allclose(pos[1] - pos[0], 1, atol=1e-5)
        with pytest.raises(ValueError, match="expected at least 61 frames, found 60"):
            read_chain(folder, frames=61, keep=keep)


def test_advance_undoes_the_target():
    chain = walk(T=20)
    x = torch.as_tensor(chain.position)
    for i, w in enumerate(ChainWindows([chain])):
        assert torch.allclose(advance(x[i + 14], x[i + 15], torch.as_tensor(w.target)), x[i + 16], atol=1e-4)


def test_bonds_go_both_ways_once_and_stay_in_their_cloud():
    chains = [walk("a", n=4), walk("b", n=7), walk("c", n=2)]
    windows = ChainWindows(chains)
    batch = collate([windows[0], windows[30], windows[-1]])
    source, target = batch.edge_index
    assert (source != target).all() and len(set(zip(source.tolist(), target.tolist()))) == len(source) == 2 * (3 + 6 + 1)
    assert (batch.points.batch[source] == batch.points.batch[target]).all()
    want = {(a + s, b + s) for c, s in zip(chains, (0, 4, 11)) for i, j in c.bonds for a, b in ((i, j), (j, i))}
    assert set(zip(source.tolist(), target.tolist())) == want
    assert (bond_graph(chains[0].bonds)[1][1:] >= bond_graph(chains[0].bonds)[1][:-1]).all()


def test_the_radius_graph_measures_true_distances():
    """In simulation units at the last visible frame, not in the stretched space of the geometry."""
    chain = walk(T=20, n=12)
    d = cdist(chain.position[17], chain.position[17])
    edges = ChainWindows([chain], radius=6.)[2].edge_index
    assert set(map(tuple, edges.T)) == set(zip(*np.nonzero((d <= 6) & (d > 0)))) and 0 < edges.shape[1] < 12 * 11


def test_disk_memory_and_other_processes_read_the_same(tmp_path):
    chains = [walk("a", T=30), walk("b", T=24)]
    path = write_chains(tmp_path / "set.h5", chains, ["train"] * 2, ABOUT)
    lazy, here = ChainWindows(read_chains(path, keep="disk")), ChainWindows(chains)
    assert np.array_equal(lazy[-1].x, here[-1].x)                       # opens the file in this process first
    passed = pickle.loads(pickle.dumps(lazy))
    for a, b in zip(DataLoader(lazy, batch_size=4, num_workers=2, collate_fn=collate), DataLoader(here, batch_size=4, collate_fn=collate)):
        assert a.ids == b.ids and torch.equal(a.points.x, b.points.x) and torch.equal(a.points.pos, b.points.pos) and torch.equal(a.target, b.target)
    assert np.array_equal(passed[3].target, here[3].target)


# ---- noise

@pytest.mark.parametrize("where", ["input", "all"])
def test_noise_on_features_is_noise_on_frames(where):
    """The same shifts added to the frames give the same window; with 'input' the target frame stays true."""
    chain = walk(T=20)
    w, noise = ChainWindows([chain])[1], PositionNoise(where)
    got = noise(w, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    shift = rng.choice(NOISE_STD) * rng.standard_normal((17, chain.n, 3))
    if where == "input":
        shift[-1] = 0
    velocity, geometry, target = window_features(chain.position[1:18] + shift, chain.center)
    for a, b in ((got.x, velocity), (got.pos, geometry), (got.target, target)):
        assert np.allclose(a, b, atol=1e-5)
    x = chain.position[1:18] + shift
    end = advance(torch.as_tensor(x[14]), torch.as_tensor(x[15]), torch.as_tensor(got.target).double())
    assert np.allclose(end, chain.position[17] + shift[16], atol=1e-4) and np.allclose(end, chain.position[17], atol=1e-4) == (where == "input")


def test_noise_runs_when_asked_and_only_then(tmp_path):
    """Through the loader of a split that is read by the path of a file: fresh each epoch, the same from any number of processes."""
    path = write_chains(tmp_path / "train.h5", [walk()], ["train"], ABOUT)
    windows = ChainWindows(read_chains(path, "train"))
    plain, noisy = PreparedClouds(windows), PreparedClouds(windows, Geometry(), PositionNoise("input"), cache_bytes=0)
    assert np.array_equal(plain[0, 3][0].x, plain[5, 3][0].x) and np.array_equal(plain[3][0].x, windows[3].x)
    shift = noisy[0, 3][0].pos - windows[3].pos
    assert np.abs(shift).max() > 1e-4 and not np.allclose(noisy[0, 3][0].x, noisy[1, 3][0].x)
    batches = [[(0, i) for i in range(8)]]
    one, two = (next(iter(DataLoader(noisy, batch_sampler=batches, num_workers=k, collate_fn=collate))) for k in (0, 2))
    assert torch.equal(one.points.x, two.points.x) and not torch.allclose(one.points.x[:6], torch.as_tensor(windows[0].x))


def test_noise_levels_are_ten_between_a_tenth_and_a_hundredth():
    assert len(NOISE_STD) == 10 and NOISE_STD[0] == pytest.approx(.1) and NOISE_STD[-1] == pytest.approx(.01)
    assert np.allclose(np.diff(np.log(NOISE_STD)), np.log(.1) / 9)
    still = ChainWindows([Chain("s", np.zeros((17, 3000, 3)), np.zeros(3000, int), [[i, i + 1] for i in range(2999)])], UNIT)[0]
    seen = {int(np.abs(PositionNoise("all", UNIT)(still, np.random.default_rng(s)).pos.std() / np.array(NOISE_STD) - 1).argmin()) for s in range(40)}
    assert len(seen) >= 8                                                # one a window, and all of them in time


# ---- loss and averages

def test_loss_of_a_constant_prediction_is_known():
    a = torch.randn(3000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a = a / (a ** 2).mean().sqrt()
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    nll = float(gaussian_nll(zero, one, a))
    assert nll == pytest.approx(.5 + .5 * math.log(2 * math.pi), abs=1e-9) and round(nll, 3) == 1.419
    assert float(acceleration_mse(zero, a)) == pytest.approx(1) and physical_nll(0.) == pytest.approx(.552, abs=5e-4)
    std, acc = torch.rand_like(a) + .1, torch.tensor(PUBLISHED.acc_std, dtype=torch.float64)
    assert torch.allclose(gaussian_nll(zero, std, a), torch.nn.functional.gaussian_nll_loss(zero, a, std ** 2, full=True, eps=0))
    physical = -torch.distributions.Normal(zero, std * acc).log_prob(a * acc).mean()
    assert float(physical_nll(gaussian_nll(zero, std, a))) == pytest.approx(float(physical), abs=1e-9)


def test_head_keeps_widths_above_the_floor_and_gradients_finite():
    raw = torch.tensor([[0., 1, 2, -200, 0, 200]], requires_grad=True)
    mean, std = gaussian_head(raw)
    assert mean.tolist() == [[0, 1, 2]] and std.tolist()[0] == pytest.approx([1e-6, math.log(2) + 1e-6, 200], rel=1e-5)
    gaussian_nll(mean, std, torch.zeros(1, 3)).backward()
    assert torch.isfinite(raw.grad).all()
    for bad in (torch.zeros(6), torch.zeros(4, 3)):
        with pytest.raises(ValueError, match=r"needed \(N, 6\)"):
            gaussian_head(bad)
    with pytest.raises(ValueError, match="nothing is broadcast"):
        gaussian_nll(torch.zeros(4, 3), torch.ones(4, 3), torch.zeros(4))


def test_bead_and_cloud_averages_do_not_depend_on_batches_but_the_published_one_does():
    g = torch.Generator().manual_seed(0)
    sizes = [30, 10, 50, 10]
    raw, target = torch.randn(100, 6, generator=g), torch.randn(100, 3, generator=g)

    def score(weight, cuts):
        e, start = ChainErrors(weight), 0
        for cut in cuts:
            stop = start + sum(cut)
            e.add(raw[start:stop], target[start:stop], cut)
            start = stop
        return e.result()
    ways = ([sizes], [[30, 10], [50, 10]], [[s] for s in sizes])
    for weight in ("bead", "cloud", "batch"):
        nll = [score(weight, cuts)["nll"] for cuts in ways]
        assert (np.ptp(nll) < 1e-12) == (weight != "batch")
    mean, std = gaussian_head(raw)
    assert score("bead", ways[1])["nll"] == pytest.approx(float(gaussian_nll(mean, std, target)), rel=1e-5)
    each = [float(((a - b) ** 2).mean()) for a, b in zip(mean.split(sizes), target.split(sizes))]
    assert score("cloud", ways[0])["mse"] == pytest.approx(np.mean(each), rel=1e-5)
    assert score("bead", ways[0])["mse_physical"] == pytest.approx(float((((mean - target) * torch.tensor(PUBLISHED.acc_std)) ** 2).mean()), rel=1e-5)


# ---- protocol

@pytest.fixture
def published(tmp_path):
    """A tiny folder in the distributed layout: (root, splits)."""
    (tmp_path / "splits").mkdir()
    for file, names in (("train.txt", "poly00951\npoly00025\n"), ("val.txt", "poly00007\n"), ("test_class2.txt", "rand001\n")):
        (tmp_path / "splits" / file).write_text(names)
    for name in ("poly00951", "poly00025", "poly00007"):
        write_chain(tmp_path / "polymer_train" / name, walk(name, 50, 30))
    write_chain(tmp_path / "polymer_test" / "rand001", walk("rand001", 30, 30))
    return tmp_path, dict(train=("polymer_train", "train.txt", 2, 40), val=("polymer_train", "val.txt", 1, 40), test=("polymer_test", "test_class2.txt", 1, 30))


def test_published_splits_open_in_the_order_of_their_lists(published):
    root, splits = published
    train = open_published(root, "train", splits=splits)
    assert [c.name for c in train.chains] == ["poly00951", "poly00025"] and len(train) == 2 * 24 and train[0].id == "poly00951:0"
    assert train.scale == PUBLISHED and len(open_published(root, "test", "memory", splits=splits)) == 14


def test_published_splits_refuse_what_does_not_add_up(published):
    root, splits = published
    with pytest.raises(ValueError, match="train.txt: expected 90 names, found 2"):
        open_published(root, "train")
    (root / "splits" / "val.txt").write_text("poly00951")
    with pytest.raises(ValueError, match=r"expected separate splits, found \['poly00951'\] in val and train"):
        open_published(root, "val", splits=splits)
    (root / "splits" / "val.txt").write_text("poly00007\npoly00007")
    with pytest.raises(ValueError, match="expected every chain once"):
        open_published(root, "val", splits=splits)
    (root / "splits" / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="val.txt: expected a list of chains"):
        open_published(root, "train", splits=splits)


@pytest.mark.parametrize("factor, odd", [(1, False), (1.4, False), (1 / 1.4, False), (1.7, True), (10, True), (.5, True), (0, True)])
def test_frames_at_another_interval_are_refused(published, factor, odd):
    """Displacements of `factor` times those of training: 10 is what a random walk gives for 500 tau instead of 5."""
    root, splits = published
    shutil.rmtree(root / "polymer_test")
    write_chain(root / "polymer_test" / "rand001", walk("rand001", 30, 30, 1.28 * factor))
    if not odd:
        assert open_published(root, "test", splits=splits)
        return
    with pytest.raises(ValueError, match="rand001.position.h5: key 'position': expected displacements between frames near 1.278, as over 5 tau, found"):
        open_published(root, "test", splits=splits)
    with pytest.warns(UserWarning, match="evaluate on held-out chains"):
        assert len(open_published(root, "test", action="warn", splits=splits)) == 14
    found = check_interval([read_chain(root / "polymer_test" / "rand001")], action="report")
    assert found.odd == ("rand001",) and found.ratio[0] == pytest.approx(factor, rel=.1)


def test_the_validation_subset_is_fixed():
    pick = validation_subset(99_840)
    torch.manual_seed(0)
    assert torch.equal(pick, torch.randperm(99_840)[:5000]) and len(set(pick.tolist())) == 5000 and not torch.equal(pick, validation_subset(99_840, seed=1))


def test_a_measured_scale_makes_unit_variance():
    chains = [walk("a", T=700, n=3), walk("b", T=20, n=9)]                # longer than the block the measurement works in
    scale = measure_scale(chains, 5.)
    for key, order in (("vel_std", 1), ("acc_std", 2)):
        d = np.concatenate([np.diff(c.position.astype(np.float64), n=order, axis=0).reshape(-1, 3) for c in chains])
        assert np.allclose(getattr(scale, key), np.sqrt((d ** 2).mean(0)))
    d = np.concatenate([(c.position - c.center).reshape(-1, 3) for c in chains])
    assert np.allclose(scale.pos_std, np.sqrt((d ** 2).mean(0)))


# ---- the committed sample; needs no OpenMM

@pytest.fixture(scope="module")
def sample():
    return load_chains()


def test_sample_is_split_small_and_says_where_it_is_from(sample):
    path = ROOT / "data" / "samples" / "chains.h5"
    about = read_about(path)
    assert path.stat().st_size < 3e6 and (about["licence"], about["units"]["position"], about["parameters"]["platform"]) == ("Apache-2.0", "sigma", "Reference")
    names = {k: {c.name for c in load_chains(k)} for k in ("train", "val", "test")}
    assert sum(map(len, names.values())) == len(set.union(*names.values())) == len(sample) == 6
    assert {k: len(load_windows(k)) for k in names} == dict(train=324, val=81, test=81)
    assert all(name.startswith("poly") for name in names["train"] | names["val"]) and all(name.startswith("rand") for name in names["test"])
    assert {c.n for c in sample} >= {120, 890} and set(np.concatenate([c.kind for c in load_chains("train")])) == {0, 1, 2, 3}


def test_sample_sequences_follow_from_their_seeds(sample):
    for (split, seed, n, regular), chain in zip(generator.SAMPLE, sample):
        kind, parent = chain_sequence(n, np.random.default_rng((seed, n, int(regular))), regular)
        assert np.array_equal(kind, chain.kind) and np.array_equal(chain.bonds, np.stack([parent[1:], np.arange(1, n)], 1))


def test_sample_is_physical(sample):
    """Temperature, drift of the centre and bonds of every chain within four standard errors of the exact statements."""
    physics, mean, std, _ = ChainPhysics(), *bond_moments(ChainPhysics())
    for c in sample:
        assert np.allclose(np.diff(c.time), 5.)
        assert abs(c.temperature.mean() - 1) < 4 * math.sqrt(2 / (3 * c.n * len(c)))
        drift = np.diff(center_of_mass(c.position, c.kind), axis=0)
        assert abs((drift ** 2).mean() / drift_variance(c.kind, 5.) - 1) < 4 * math.sqrt(2 / drift.size)
        b = bond_lengths(c)
        assert 0 < b.mean() - mean < .004 and abs(b.std() / std - 1) < .04 and b.max() < physics.reach     # crowding lengthens bonds by a thousandth
        x = c.position[len(c) // 2].astype(np.float64)
        d = cdist(x, x) + 9 * np.eye(c.n)
        d[tuple(c.bonds.T)] = d[tuple(c.bonds.T[::-1])] = 9
        assert d.min() > .8                                              # beads do not overlap
    assert not check_interval(sample, load_windows("train").scale).odd


def test_sample_can_be_learned_from(sample):
    """The last velocity alone explains most of the acceleration, and none of it once targets are shuffled among beads."""
    def parts(split):
        w = load_windows(split)
        return [np.concatenate(a) for a in zip(*((w[i].x[:, -3:], w[i].target) for i in range(0, len(w), 9)))]
    (v, a), (vv, aa) = parts("train"), parts("val")
    slope = (v * a).sum() / (v * v).sum()
    error = ((aa - slope * vv) ** 2).mean()
    assert slope < -.5 and .2 < error < .55 < .9 < (aa ** 2).mean() < 1.1
    wrong = aa[np.random.default_rng(0).permutation(len(aa))]
    assert ((wrong - slope * vv) ** 2).mean() > 1.3


def test_a_missing_sample_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ERWIN_NSA_SAMPLES", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="write_chain_sample"):
        load_chains()


# ---- the generator

def test_without_openmm_the_sample_loads_and_the_generator_says_what_to_install():
    program = ("import sys; sys.modules['openmm'] = None\n"
               "from erwin_nsa.data.chains import load_chains, make_chain, generate_chains\n"
               "assert len(load_chains('test')) == 1\n"
               "for f in (lambda: make_chain(0, 5), lambda: generate_chains([0], 5)):\n"
               "    try: f()\n"
               "    except ImportError as e: assert 'pip install openmm' in str(e)\n"
               "    else: raise SystemExit('no error')\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("n", [2, 3, 17, 200])
@pytest.mark.parametrize("regular", [True, False])
def test_a_sequence_is_a_backbone_with_single_side_beads(n, regular):
    kind, parent = chain_sequence(n, np.random.default_rng(n), regular)
    backbone = np.flatnonzero(kind < 2)
    assert parent[backbone].tolist() == [-1, *backbone[:-1]]             # each backbone bead hangs on the one before
    side = np.flatnonzero(kind >= 2)
    assert (parent[side] == side - 1).all() and (kind[side - 1] < 2).all()


def test_the_bond_integral_against_sampling():
    """Mean and spread from a rejection sample of the same density; the energy has its minimum where forces balance."""
    p, rng = ChainPhysics(), np.random.default_rng(0)
    r = rng.uniform(.7, 1.5, 400_000)
    w = r ** 2 * np.exp(-(bond_energy(r, p) - bond_energy(np.array([.96]), p)))
    kept = r[rng.random(len(r)) * w.max() < w]
    mean, std, square = bond_moments(p)
    assert kept.mean() == pytest.approx(mean, abs=4 * std / math.sqrt(len(kept))) and kept.std() == pytest.approx(std, rel=.02)
    assert square == pytest.approx(mean ** 2 + std ** 2) and bond_distribution(p)[1].sum() == pytest.approx(1)


@pytest.mark.parametrize("s", [0., .4, 1.])
def test_pair_energy_is_continuous_and_has_its_depth(s):
    r = np.linspace(.9, 3, 20_001)
    u = pair_energy(r, s)
    assert np.abs(np.diff(u)).max() < .02 and u.min() == pytest.approx(-s, abs=1e-3) and (u[r >= 2.5] == 0).all()


def test_a_phantom_start_is_a_random_walk_and_a_crowded_one_is_larger():
    _, _, square = bond_moments(ChainPhysics())
    line, parent = np.zeros(25, int), np.arange(25) - 1
    r2 = {}
    for excluded, copies in ((False, 200), (True, 60)):
        physics = ChainPhysics(excluded=excluded, sticky=(0, 0, 0, 0))
        ends = [generator.pivot_start(line, parent, physics, np.random.default_rng((7, i)), 4)[[0, -1]] for i in range(copies)]
        r2[excluded] = np.array([((b - a) ** 2).sum() for a, b in ends])
    assert abs(r2[False].mean() - 24 * square) < 4 * r2[False].std() / math.sqrt(200)
    assert r2[True].mean() > 1.6 * 24 * square


@needs_openmm
def test_openmm_computes_the_energy_on_the_page():
    p, start = ChainPhysics(), build_start(50, np.random.default_rng(3), False)
    s = np.sqrt(np.array(p.sticky))[start.kind]
    d = cdist(start.pos, start.pos)
    apart = np.triu(np.ones_like(d, dtype=bool), 1)
    apart[tuple(start.bonds.T)] = False
    want = bond_energy(d[tuple(start.bonds.T)], p).sum() + pair_energy(d[apart], np.outer(s, s)[apart]).sum()
    for platform, rel in (("Reference", 1e-9), ("CPU", 1e-4)):
        assert open_simulation(start, p, 1, platform).getState(energy=True).getPotentialEnergy()._value == pytest.approx(want, rel=rel)


@needs_openmm
@pytest.mark.parametrize("kT", [1., 1.5])
def test_temperature_bonds_and_drift_of_a_phantom_chain(kT):
    """Equipartition for each bead type, mean and spread of the bond length, drift of the centre, end-to-end distance."""
    p = ChainPhysics(kT=kT, excluded=False)
    start = build_start(80, np.random.default_rng(1), False, p)
    run = simulate(start, p, 150, 2)
    kinetic = run.velocity ** 2 * np.array(p.mass)[start.kind][None, :, None] / kT
    for k in range(4):
        own = kinetic[:, start.kind == k]
        assert own.size > 1000 and abs(own.mean() - 1) < 4 * math.sqrt(2 / own.size)
    b = np.linalg.norm(run.position[:, start.parent[1:]] - run.position[:, 1:], axis=2)
    mean, std, square = bond_moments(p)
    assert abs(b.mean() - mean) < 4 * std / math.sqrt(b.size) and b.std() == pytest.approx(std, rel=4 / math.sqrt(b.size))
    drift = np.diff(center_of_mass(run.position, start.kind, p), axis=0)
    assert abs((drift ** 2).mean() / drift_variance(start.kind, 5., p) - 1) < 4 * math.sqrt(2 / drift.size)
    u = np.diff(run.position[:, start.kind < 2][:, :2], axis=1)[:, 0]     # an end bond turns freely: its direction has no mean
    assert (np.abs(u.mean(0)) < 4 * u.std(0) / math.sqrt(len(u) / 4)).all()


@needs_openmm
def test_a_moving_phantom_chain_has_the_size_of_a_random_walk_and_the_drift_of_one_particle():
    """Long enough to tell a friction that is wrong by a sixth."""
    p, n = ChainPhysics(excluded=False, interval=10.), 13
    start = generator.ChainStart(np.zeros(n, int), np.arange(n) - 1, np.cumsum(np.full((n, 3), .56), 0))   # begins as a straight rod
    x = simulate(start, p, 1000, 5).position
    r2 = ((x[:, -1] - x[:, 0]) ** 2).sum(1)
    assert abs(r2.mean() - 12 * bond_moments(p)[2]) < 4 * r2.std() / math.sqrt(1000 / 2)
    drift = np.diff(x.mean(1), axis=0)
    assert abs((drift ** 2).mean() / drift_variance(start.kind, 10., p) - 1) < 4 * math.sqrt(2 / drift.size)
    assert drift_variance(start.kind, 10., ChainPhysics(friction=.5 * 7 / 6)) < (1 - 4 * math.sqrt(2 / drift.size)) * drift_variance(start.kind, 10., p)


@needs_openmm
def test_a_seed_names_a_chain_from_any_process(tmp_path):
    """Alone, after another chain, and from two spawned processes: the same bits; another seed, another chain."""
    settings = dict(frames=3, regular=False)
    a, b = make_chain(4, 24, **settings), make_chain(9, 30, **settings)
    again = make_chain(4, 24, **settings)
    spawned = generate_chains((4, 9), (24, 30), workers=2, **settings)
    for c, d in ((a, again), (a, spawned[0]), (b, spawned[1])):
        assert c.name == d.name and np.array_equal(c.position, d.position) and np.array_equal(c.kind, d.kind) and np.array_equal(c.temperature, d.temperature)
    assert a.name == "rand004" and not np.allclose(make_chain(5, 24, **settings).position, a.position)
    assert np.array_equal(a.position * 4096, np.round(a.position * 4096))


@needs_openmm
def test_a_chain_that_falls_apart_is_reported():
    start = build_start(20, np.random.default_rng(0))
    with pytest.raises(RuntimeError, match="use a step below 0.5 tau"):
        simulate(start, ChainPhysics(step=.5), 5, 1)
    with pytest.raises(ValueError, match="0 would be any"):
        open_simulation(start, ChainPhysics(), 0)


def test_packing_keeps_every_bond_length_and_no_two_copies_meet(sample):
    packed = pack_chains(sample[:2], 1000, frames=3)
    assert packed.n == 1000 and packed.pieces == 6 and len(packed.bonds) == 994      # 120 + 240 + 120 + 240 + 120 + 160 of 240
    lengths = bond_lengths(packed)[0]
    assert .8 < lengths.min() and lengths.max() < 1.2
    piece = np.searchsorted(np.cumsum([120, 240, 120, 240, 120]), np.arange(1000), side="right")
    d = cdist(packed.position[1], packed.position[1])
    assert d[piece[:, None] != piece[None]].min() > 2
    first = packed.position[0, :120].astype(np.float64)
    size = np.sqrt(((first - first.mean(0)) ** 2).sum(1).mean())
    frames = sample[0].position.astype(np.float64)
    assert min(abs(np.sqrt(((f - f.mean(0)) ** 2).sum(1).mean()) - size) for f in frames) < 1e-4    # a rotated frame of the original
    assert np.array_equal(pack_chains(sample[:2], 1000, frames=3).position, packed.position)
