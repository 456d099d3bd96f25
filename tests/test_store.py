"""Stores of clouds: every bit back, damage named, workers that share nothing, batches that do not mix, an order that resumes."""
import json
import os
import pickle
import warnings

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from erwin_nsa.data import store as module
from erwin_nsa.data.store import (BatchOrder, CloudLoader, CloudSample, CloudStore, Geometry, GeometryCache, PreparedClouds, collate, read_clouds,
                                  surface_cloud, write_clouds)
from erwin_nsa.data.surfaces import SurfaceSample
from erwin_nsa.geometry.balltree import BallTree
from erwin_nsa.geometry.neighbours import knn_graph
from erwin_nsa.geometry.partitions import OF_BONDS, PARTITIONS, partition_tree
from erwin_nsa.geometry.points import PointBatch

ABOUT = dict(generator="tests", parameters=dict(n=[1, 2]), seed=0, units=dict(pos="m"), licence="Apache-2.0")
FIELDS = ("pos", "x", "target", "kind", "edge_index")


def cloud(i, n, D=3, full=True):
    rng = np.random.default_rng(i)
    edges = rng.integers(0, n, size=(2, rng.integers(0, 2 * n)))
    more = dict(kind=rng.integers(0, 4, size=n), edge_index=edges, constants=dict(h=rng.normal(), box=rng.normal(size=3))) if full else {}
    return CloudSample(rng.normal(size=(n, D)), rng.normal(size=(n, 5)) if full else None, rng.normal(size=n), f"cloud {i}", **more)


def clouds(sizes=(5, 1, 40, 17, 8, 5, 23), **how):
    return [cloud(i, n, **how) for i, n in enumerate(sizes)]


def assert_same(a, b):
    assert a.id == b.id and set(a.constants) == set(b.constants)
    for k in FIELDS:
        u, v = getattr(a, k), getattr(b, k)
        assert (u is None and v is None) or (u.dtype == v.dtype and u.shape == v.shape and np.array_equal(u, v)), k
    assert all(np.array_equal(a.constants[k], b.constants[k]) for k in a.constants)


@pytest.fixture
def file(tmp_path):
    return write_clouds(tmp_path / "a.h5", clouds(), attributes=ABOUT)


# ---- files

@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("D, full", [(2, True), (3, True), (3, False)])
def test_round_trip_keeps_every_bit(tmp_path, D, full, compression):
    """Clouds of one point and up, with and without optional fields, from a list and from a generator, in any order of reading."""
    given = clouds(D=D, full=full)
    given[0].pos[0] = np.finfo(np.float32).tiny
    store = CloudStore(write_clouds(tmp_path / "a.h5", iter(given), attributes=ABOUT, compression=compression))
    for i in (3, 0, 6, 1, 2, 5, 4, -1):
        assert_same(store[i], given[i])
    assert store.sizes.tolist() == [len(c) for c in given] and store.attrs["units"] == {"pos": "m"}
    assert store.attrs["parameters"] == {"n": [1, 2]} and store.attrs["seed"] == 0 and store.attrs["version"]


def test_clouds_are_written_as_they_come(tmp_path):
    """A generator is never ahead of the file by more than one cloud, so a set larger than memory can be written."""
    import weakref
    alive = []

    def stream():
        for i in range(20):
            c = cloud(i, 10)
            alive.append(weakref.ref(c))
            yield c
            del c
            assert sum(r() is not None for r in alive) <= 2
    assert len(CloudStore(write_clouds(tmp_path / "a.h5", stream(), attributes=ABOUT))) == 20


def test_chunks_hold_whole_clouds_and_stay_below_a_megabyte(tmp_path):
    with h5py.File(write_clouds(tmp_path / "a.h5", [cloud(i, 3586, full=False) for i in range(3)], attributes=ABOUT)) as f:
        assert f["pos"].chunks == (3586, 3) and f["pos"].dtype == np.float32 and f["target"].dtype == np.float32
    with h5py.File(write_clouds(tmp_path / "b.h5", [cloud(0, 100_000, full=False)], attributes=ABOUT)) as f:
        assert np.prod(f["pos"].chunks) * 4 <= 2**20


def test_same_clouds_give_the_same_bytes(tmp_path):
    one, two = (write_clouds(tmp_path / n, clouds(), attributes=ABOUT, split="train", compression="gzip").read_bytes() for n in ("a.h5", "b.h5"))
    assert one == two


def test_a_failing_write_leaves_the_old_file(tmp_path, file):
    """An error while clouds come leaves the destination whole and no temporary file."""
    before = file.read_bytes()

    def stream():
        yield cloud(0, 5)
        raise OSError("no space left on device")
    with pytest.raises(OSError, match="no space left"):
        write_clouds(file, stream(), attributes=ABOUT)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("lost", module.ATTRIBUTES)
def test_a_file_without_origin_is_refused(tmp_path, lost):
    about = {k: v for k, v in (ABOUT | {"version": "1"}).items() if k != lost}
    if lost == "version":
        assert CloudStore(write_clouds(tmp_path / "a.h5", clouds(), attributes=about)).attrs["version"]
        return
    with pytest.raises(ValueError, match=f"needed also \\['{lost}'\\]"):
        write_clouds(tmp_path / "a.h5", clouds(), attributes=about)
    assert not list(tmp_path.iterdir())


def test_every_truncation_is_reported(tmp_path, file):
    whole, cut = file.read_bytes(), tmp_path / "cut.h5"
    for part in np.linspace(0, len(whole) - 1, 12).astype(int):
        cut.write_bytes(whole[:part])
        with pytest.raises(ValueError, match="cut.h5.*expected an HDF5 file"):
            CloudStore(cut)


def test_damaged_block_names_cloud_and_key(tmp_path):
    file = write_clouds(tmp_path / "a.h5", [cloud(i, 4096) for i in range(2)], attributes=ABOUT, compression="gzip")
    with h5py.File(file) as f:
        chunk = f["target"].id.get_chunk_info(1)
    data = bytearray(file.read_bytes())
    data[chunk.byte_offset:chunk.byte_offset + 64] = bytes(64)
    file.write_bytes(data)
    store = CloudStore(file)
    assert_same(store[0], cloud(0, 4096))
    with pytest.raises(ValueError, match="a.h5: 'cloud 1': key 'target': expected readable data, found a damaged block"):
        store[1]


@pytest.mark.parametrize("key, value, message", [
    ("pos", None, r"found none of \['pos'\]"),
    ("ids", None, r"found none of \['ids'\]"),
    ("pos", np.zeros((98, 3), np.float32), "key 'pos': expected 99 rows"),
    ("pos", np.zeros((99, 3), int), "key 'pos': expected 99 rows of type 'f'"),
    ("pos", np.full((99, 3), np.nan, np.float32), "cloud 0: pos: given 15 NaN"),
    ("pos", np.zeros((99, 4), np.float32), "given 4 coordinates, needed 2 or 3"),
    ("target", np.zeros((100, 1), np.float32), "key 'target': expected 99 rows"),
    ("kind", np.zeros(99, np.float32), "key 'kind': expected 99 rows of type 'i'"),
    ("edges", np.full((10**4, 2), 7, np.int32), "key 'edges': expected"),
    ("offsets", np.array([0, 5, 5, 99]), "key 'offsets': expected growing integers"),
    ("constants/box", np.zeros((3, 3)), "key 'constants/box': expected 7 rows"),
])
def test_malformed_file_names_file_key_expected_found(file, key, value, message):
    with h5py.File(file, "r+") as f:
        del f[key]
        if value is not None:
            f[key] = value
    with pytest.raises(ValueError, match=message) as e:
        read_clouds(file)
    assert str(file) in str(e.value)


def test_splits_select_and_unknown_ones_are_named(tmp_path):
    names = ["train", "val", "train", "test", "train", "val", "test"]
    file = write_clouds(tmp_path / "a.h5", clouds(), attributes=ABOUT, split=names)
    assert [[c.id for c in CloudStore(file, s)] for s in ("val", "test")] == [["cloud 1", "cloud 5"], ["cloud 3", "cloud 6"]]
    with pytest.raises(ValueError, match="found \\['test', 'train', 'val'\\]"):
        CloudStore(file, "dev")
    with pytest.raises(ValueError, match="given 2 entries, needed one for each of 7"):
        write_clouds(tmp_path / "b.h5", clouds(), attributes=ABOUT, split=["train", "val"])
    with pytest.raises(ValueError, match="found no splits"):
        CloudStore(write_clouds(tmp_path / "c.h5", clouds(), attributes=ABOUT), "train")


# ---- processes

def test_store_leaves_its_handle_behind(file):
    """A pickled store carries no open file, works after the journey, and after `close`."""
    store = CloudStore(file)
    assert store._file is not None
    other = pickle.loads(pickle.dumps(store))
    assert other._file is None and other._pid is None
    assert_same(other[2], store[2])
    store.close()
    assert_same(store[2], other[2])
    data = PreparedClouds(store, Geometry(k=2))
    data[0]
    assert len(pickle.loads(pickle.dumps(data)).cache.kept) == 0


class Owners(torch.utils.data.Dataset):
    "Which process reads, and which one opened the file."
    def __init__(self, store): self.store = store
    def __len__(self): return 4

    def __getitem__(self, i):
        self.store[i]
        return os.getpid(), self.store._pid


def test_each_worker_opens_the_file_itself(file):
    store = CloudStore(file)
    store[0]
    seen = [pair for batch in DataLoader(Owners(store), num_workers=2, batch_size=1, collate_fn=lambda b: b, multiprocessing_context="fork") for pair in batch]
    assert all(reader == opener for reader, opener in seen) and len({reader for reader, _ in seen} - {os.getpid()}) == 2
    assert store._pid == os.getpid()
    assert_same(store[1], cloud(1, 1))


def jitter(c, rng):
    return CloudSample(c.pos + rng.normal(size=c.pos.shape), c.x, c.target, c.id, c.kind, c.edge_index, c.constants)


def tensors(batch):
    t = batch.tree
    return [batch.points.pos, batch.points.x, batch.target, batch.kind, batch.edge_index, t.order, t.inverse, t.perm, t.perm_inverse, t.mask, *batch.constants.values()]


def test_workers_change_nothing(file):
    """Two epochs with 0 and with 2 workers: the same clouds, noise, graphs and trees, bit by bit; noise differs between epochs."""
    def epochs(workers):
        data = PreparedClouds(CloudStore(file), Geometry(k=3, ball_sizes=(8, 4)), jitter, seed=5)
        loader = CloudLoader(data, BatchOrder(7, 3, seed=1), workers=workers, context="fork")
        return [list(loader) for _ in range(2)]
    alone, helped = epochs(0), epochs(2)
    for a, b in zip(sum(alone, []), sum(helped, [])):
        assert a.ids == b.ids and all(torch.equal(u, v) for u, v in zip(tensors(a), tensors(b)))
    first, second = ({name: pos for b in epoch for name, pos in zip(b.ids, b.points.split(b.points.pos))} for epoch in alone)
    assert len(first) == 7 and all((first[name] != second[name]).all() for name in first)


def test_trees_from_workers_share_masks(file):
    """Masks are cached by shape; a tree that was pickled must find them again and not fill memory with copies."""
    data = PreparedClouds(CloudStore(file), Geometry(ball_sizes=(8, 4)))
    a, b = (pickle.loads(pickle.dumps(collate([data[2], data[3]]))) for _ in range(2))
    assert a.tree.slots is b.tree.slots and a.tree.mask is b.tree.mask


# ---- graph and tree

def test_geometry_is_built_once_for_a_cloud(file):
    built = []

    def build(pos):
        built.append(len(pos))
        return Geometry(k=2)(pos)
    data = PreparedClouds(CloudStore(file))
    data.cache = GeometryCache(build)
    first = [data[i][1] for i in range(7)]
    assert [data[i][1] for i in range(7)] == first and len(built) == 7 and data.cache.hits == 7


def test_cache_never_returns_a_stale_graph():
    """Scaled, shuffled or slightly moved positions are other positions."""
    cache, pos = GeometryCache(Geometry(k=3, ball_sizes=(4, 2))), np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    moved = pos.copy()
    moved[7, 1] = np.nextafter(moved[7, 1], 9)
    for p in (pos, pos * 2, pos[::-1], moved, pos.astype(np.float64)):
        made = cache(p)
        assert torch.equal(made.edge_index, knn_graph(torch.from_numpy(np.ascontiguousarray(p)), 3))
    assert (cache.hits, cache.misses) == (0, 5)


@pytest.mark.parametrize("limit", [dict(max_bytes=2500), dict(max_count=3)])
def test_cache_forgets_the_least_recent(limit):
    cache = GeometryCache(lambda p: module.Prepared(torch.zeros(2, 50, dtype=torch.long), None), **limit) # 800 bytes each
    a, b, c, d = (np.full((1, 3), v, np.float32) for v in range(4))
    for p in (a, b, c, a, d):
        cache(p)
    assert cache.nbytes == 2400 and len(cache.kept) == 3
    hits = cache.hits
    for p in (a, c, d):
        cache(p)
    assert cache.hits == hits + 3
    cache(b)
    assert cache.hits == hits + 3
    off = GeometryCache(Geometry(k=1), max_bytes=0)
    off(a)
    off(a)
    assert len(off.kept) == off.nbytes == off.hits == 0


def with_bonds(i, n):
    """A cloud that is a chain, numbered out of order."""
    order = np.random.default_rng(i).permutation(n)
    return CloudSample(cloud(i, n, full=False).pos, None, None, f"chain {i}", edge_index=np.stack([order[:-1], order[1:]]))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_trees_of_every_partition_come_from_the_loader(partition, workers):
    """The joined trees are that partition of each cloud, bit by bit, read here or by a worker."""
    chains = [with_bonds(i, n) for i, n in enumerate((40, 17))]
    data = PreparedClouds(chains, Geometry(ball_sizes=(8, 4), partition=partition))
    batch, = CloudLoader(data, BatchOrder(2, 2, shuffle=False), workers=workers)
    points = PointBatch.from_clouds([c.pos for c in chains])
    tree = partition_tree(points, partition, (8, 4), **dict(edge_index=batch.edge_index) if partition in OF_BONDS else {})
    for key in ("order", "inverse", "perm", "perm_inverse", "mask"):
        assert torch.equal(getattr(batch.tree, key), getattr(tree, key)), key
    if partition == "ball_tree":
        plain = BallTree.build(points, (8, 4))
        assert torch.equal(batch.tree.perm, plain.perm) and torch.equal(batch.tree.order, plain.order)


def test_bonds_are_part_of_the_key_where_they_are_read():
    pos, bonds = cloud(0, 20, full=False).pos, with_bonds(1, 20).edge_index
    for partition, misses in (("hilbert", 1), ("segments", 2)):
        cache = GeometryCache(Geometry(ball_sizes=(4, 2), partition=partition))
        a, b = cache(pos, bonds), cache(pos, bonds[:, :9])
        assert cache.misses == misses and (a is b) == (misses == 1)


@pytest.mark.parametrize("how, says", [(dict(partition="hilberd"), "one of ball_tree, hilbert"), (dict(partition="hilbert", layout="erwin"), "layout='full'"),
                                       (dict(partition="morton", ball_sizes=None), "without ball_sizes")])
def test_partitions_that_do_not_fit_are_refused(how, says):
    with pytest.raises(ValueError, match=says): Geometry(**{"ball_sizes": (4, 2), **how})
    for partition in OF_BONDS:
        with pytest.raises(ValueError, match="a cloud without bonds"): PreparedClouds([cloud(0, 9, full=False)], Geometry(ball_sizes=(4, 2), partition=partition))[0]


def test_loader_hands_each_batch_to_a_function(file):
    loader = CloudLoader(PreparedClouds(CloudStore(file)), BatchOrder(7, 3), then=lambda batch: len(batch))
    assert list(loader) == [3, 3, 1] and loader.order.epoch == 1


# ---- batches

@pytest.mark.parametrize("layout", ["full", "erwin"])
@pytest.mark.parametrize("seed", range(4))
def test_joined_batch_equals_one_built_at_once(seed, layout):
    """Points, edges and both views of the tree: preparing clouds one by one loses nothing and mixes nothing."""
    rng = np.random.default_rng(seed)
    parts = [cloud(i, int(n), full=False) for i, n in enumerate(rng.integers(2, 90, size=5))]
    batch = collate([PreparedClouds(parts, Geometry(k=4, loop=True, ball_sizes=(16, 4), layout=layout))[i] for i in range(5)])
    points = PointBatch.from_clouds([c.pos for c in parts])
    tree = BallTree.build(points, (16, 4), 45., layout)
    assert torch.equal(batch.points.pos, points.pos) and batch.points.sizes == points.sizes
    assert torch.equal(batch.edge_index, knn_graph(points.pos, 4, points.batch, loop=True))
    for key in ("order", "inverse", "perm", "perm_inverse", "mask"):
        assert torch.equal(getattr(batch.tree, key), getattr(tree, key)), key
    assert (batch.points.batch[batch.edge_index[0]] == batch.points.batch[batch.edge_index[1]]).all()


def test_edges_of_the_data_are_kept_and_shifted(file):
    """Without a geometry the graph is the one in the file, such as bonds; a geometry replaces it."""
    store = CloudStore(file)
    batch = collate([store[2], store[3]])
    expected = np.concatenate([store[2].edge_index, store[3].edge_index + 40], axis=1)
    assert np.array_equal(batch.edge_index.numpy(), expected) and batch.tree is None
    assert batch.kind.dtype == torch.int64 and batch.constants["box"].shape == (2, 3) and batch.ids == ("cloud 2", "cloud 3")
    data = PreparedClouds(store, Geometry(k=1))
    assert collate([data[2], data[3]]).edge_index.shape == (2, 57)


def test_a_point_alone_and_clouds_smaller_than_k():
    parts = [cloud(0, 1, full=False), cloud(1, 3, full=False)]
    batch = collate([PreparedClouds(parts, Geometry(k=8, loop=True, ball_sizes=(128, 32)))[i] for i in range(2)])
    assert batch.edge_index[1].bincount().tolist() == [1, 3, 3, 3]
    assert batch.tree.slots.per_cloud == (128, 128)      # each cloud has a ball of its own


def test_clouds_that_differ_in_kind_are_not_batched():
    with pytest.raises(ValueError, match="x for 1 of 2 clouds"):
        collate([CloudSample(np.zeros((2, 3)), np.zeros(2), None, "a"), CloudSample(np.zeros((2, 3)), None, None, "b")])
    with pytest.raises(ValueError, match="edges for some clouds"):
        collate([CloudSample(np.zeros((2, 3)), None, None, "a", edge_index=[[0], [1]]), CloudSample(np.zeros((2, 3)), None, None, "b")])


def test_moving_a_batch_moves_every_tensor(file):
    data = PreparedClouds(CloudStore(file), Geometry(k=3, ball_sizes=(8, 4)))
    batch = collate([data[2], data[4]])
    old = {t.data_ptr() for t in tensors(batch)[:9]}
    moved = batch.map(torch.clone)
    assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(moved))) and not old & {t.data_ptr() for t in tensors(moved)[:9]}
    meta = batch.to("meta")
    assert all(t.device.type == "meta" for t in tensors(meta)[:9]) and meta.tree.slots.device.type == "meta" and meta.ids == batch.ids


def test_pinning_without_a_gpu_is_silent(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = CloudLoader(PreparedClouds(CloudStore(file)), BatchOrder(7, 4), pin_memory=True)
        assert sum(len(b) for b in loader) == 7
    assert loader.loader.pin_memory == torch.cuda.is_available()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_pinned_batches_reach_the_gpu(file):
    """Page-locked as they leave the workers, complete on the device, with a layout that lives there."""
    loader = CloudLoader(PreparedClouds(CloudStore(file), Geometry(k=3, ball_sizes=(8, 4))), BatchOrder(7, 3), workers=2, pin_memory=True)
    for batch in loader:
        assert all(t.is_pinned() for t in tensors(batch)[:9])
        moved = batch.to("cuda", non_blocking=True)
        assert all(t.is_cuda and torch.equal(t.cpu(), u) for t, u in zip(tensors(moved), tensors(batch)))
        assert torch.equal(moved.tree.to_points(moved.tree.to_slots(moved.points.pos)), moved.points.pos)


# ---- order

def test_order_is_fixed_for_ever():
    """These numbers come from the raw bits of PCG64; a new numpy or torch must not change a published run."""
    assert BatchOrder(10, seed=0).clouds().tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert BatchOrder(10, seed=3).clouds().tolist() == [0, 4, 9, 7, 1, 5, 6, 3, 8, 2]


def test_every_epoch_and_seed_has_its_own_order():
    order, seen = BatchOrder(50, 7, seed=2), []
    for _ in range(3):
        batches = [[i for _, i in b] for b in order]
        assert [len(b) for b in batches] == [7] * 7 + [1] and sorted(sum(batches, [])) == list(range(50))
        seen.append(sum(batches, []))
        for b in batches:
            order.advance(len(b))
    assert order.epoch == 3 and order.position == 0
    seen.append(BatchOrder(50, seed=3).clouds().tolist())
    assert len(set(map(tuple, seen))) == 4
    assert BatchOrder(5, shuffle=False).clouds().tolist() == list(range(5))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_run_resumes_with_the_next_batch(file, workers, stop):
    """Stopped after any batch, also in the second epoch, though workers have read ahead; the state survives JSON."""
    def loader():
        return CloudLoader(PreparedClouds(CloudStore(file)), BatchOrder(7, 3, seed=4), workers=workers, context="fork")
    whole = loader()
    expected = [b.ids for _ in range(3) for b in whole]
    run, seen = loader(), []
    while len(seen) < stop:
        for batch in run:
            seen.append(batch.ids)
            if len(seen) == stop:
                assert run.order.epoch * 7 + run.order.position == sum(map(len, seen))
                break
    state = json.loads(json.dumps(run.state_dict()))
    again = loader()
    again.load_state_dict(state)
    later = []
    while len(later) < len(expected) - stop:
        later += [b.ids for b in again]
    assert seen + later == expected
    assert [b.ids for b in run] == [b.ids for b in loader_at(loader(), state)]     # the interrupted loader itself goes on, too


def loader_at(loader, state):
    loader.load_state_dict(state)
    return loader


def test_a_run_resumes_with_another_batch_size(file):
    run = CloudLoader(PreparedClouds(CloudStore(file)), BatchOrder(7, 2, seed=4))
    for seen in run:
        break
    again = loader_at(CloudLoader(PreparedClouds(CloudStore(file)), BatchOrder(7, 5, seed=4)), run.state_dict())
    rest = [b.ids for b in again]
    assert [len(ids) for ids in rest] == [5] and sorted(seen.ids + rest[0]) == [f"cloud {i}" for i in range(7)]
    with pytest.raises(ValueError, match="count: 7 and 8"):
        BatchOrder(8, seed=4).load_state_dict(run.state_dict())


def test_ranks_share_an_epoch():
    """Shuffled: equally many clouds each, none twice. In order: all of them."""
    for count, world in ((10, 3), (9, 3), (5, 4)):
        parts = [BatchOrder(count, 2, seed=1, rank=r, world=world).clouds().tolist() for r in range(world)]
        assert {len(p) for p in parts} == {count // world} and len(set(sum(parts, []))) == count // world * world
        parts = [BatchOrder(count, 2, shuffle=False, rank=r, world=world).clouds().tolist() for r in range(world)]
        assert sorted(sum(parts, [])) == list(range(count))
    with pytest.raises(ValueError, match="2 clouds for 3 processes"):
        BatchOrder(2, rank=0, world=3)


def test_a_surface_is_a_cloud():
    s = SurfaceSample("s", np.eye(3), np.eye(3), [1, 2, 3])
    c = surface_cloud(s)
    assert np.array_equal(c.pos, s.pos) and np.array_equal(c.x, s.normal) and c.target[:, 0].tolist() == [1, 2, 3] and c.id == "s"
