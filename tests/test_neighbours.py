"""Neighbour graphs: random clouds against a plain loop over pairs, and the cases that go wrong elsewhere."""
import warnings

import pytest
import torch

from erwin_nsa.geometry.neighbours import knn_graph, radius_graph

METHODS = ["kdtree", "torch"]


def random_case(seed: int) -> tuple:
    """A batch of 1 to 6 clouds of 1 to 60 points, its ids, a box or None."""
    g = torch.Generator().manual_seed(seed)
    D = 2 + seed % 2
    sizes = torch.randint(1, 61, (int(torch.randint(1, 7, (1,), generator=g)),), generator=g)
    batch = torch.arange(len(sizes)).repeat_interleave(sizes)
    pos = torch.rand(len(batch), D, generator=g, dtype=torch.float64) * 3 - 1
    box = [None, 1.0, [1.0, 1.5, 2.0][:D]][seed % 3]
    return pos, batch, box


def distances(pos, batch, box) -> torch.Tensor:
    """(N, N) distance of source (row) and target (column); infinite across clouds."""
    diff = pos[:, None] - pos[None]
    if box is not None:
        length = torch.as_tensor(box, dtype=pos.dtype).expand(pos.shape[1])
        diff = diff - length * torch.round(diff / length)
    dist = diff.norm(dim=2)
    return torch.where(batch[:, None] == batch[None], dist, torch.inf)


def as_set(edge_index) -> set:
    return set(map(tuple, edge_index.T.tolist()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(24))
def test_radius_graph_is_the_plain_loop(seed, method):
    pos, batch, box = random_case(seed)
    radius = 0.1 + 0.3 * ((seed * 7) % 10) / 10
    dist = distances(pos, batch, box)
    wanted = (dist <= radius) & ~torch.eye(len(pos), dtype=torch.bool)
    edges = radius_graph(pos, radius, batch, box=box, method=method)
    assert as_set(edges) == as_set(wanted.nonzero().T)
    assert edges.shape[1] == len(as_set(edges)) and edges.dtype == torch.int64
    key = edges[1] * len(pos) + edges[0]
    assert (key[1:] > key[:-1]).all(), "sorted by target, then source"
    assert as_set(edges) == as_set(edges.flip(0)), "symmetric"
    looped = radius_graph(pos, radius, batch, loop=True, box=box, method=method)
    assert as_set(looped) == as_set(edges) | {(i, i) for i in range(len(pos))}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(24))
def test_knn_graph_is_the_plain_loop(seed, method):
    pos, batch, box = random_case(seed)
    k = 1 + seed % 9
    dist = distances(pos, batch, box).fill_diagonal_(torch.inf)
    edges = knn_graph(pos, k, batch, box=box, method=method)
    for j in range(len(pos)):
        available = int((batch == batch[j]).sum()) - 1
        nearest = dist[:, j].argsort(stable=True)[: min(k, available)]
        assert edges[0, edges[1] == j].tolist() == nearest.tolist(), "nearest first"
    assert (edges[1].diff() >= 0).all()
    looped = knn_graph(pos, k, batch, loop=True, box=box, method=method)
    fewer = knn_graph(pos, k - 1, batch, box=box, method=method) if k > 1 else edges[:, :0]
    assert as_set(looped) == as_set(fewer) | {(i, i) for i in range(len(pos))}
    assert (looped[0][looped[1].diff(prepend=torch.tensor([-1])) > 0] == torch.arange(len(pos))).all(), "itself first"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(6))
def test_turning_and_moving_change_nothing(seed, method):
    pos, batch, _ = random_case(seed)
    turn, _ = torch.linalg.qr(torch.randn(pos.shape[1], pos.shape[1], dtype=pos.dtype, generator=torch.Generator().manual_seed(seed)))
    moved = pos @ turn.T + 1e3
    assert torch.equal(radius_graph(pos, 0.4, batch, method=method), radius_graph(moved, 0.4, batch, method=method))
    assert torch.equal(knn_graph(pos, 5, batch, method=method), knn_graph(moved, 5, batch, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_box_origin_does_not_matter(method):
    pos, batch, _ = random_case(4)
    for shift in (0.37, -5.0, 1e3):
        assert torch.equal(radius_graph(pos, 0.3, batch, box=1.0, method=method),
                           radius_graph(pos + shift, 0.3, batch, box=1.0, method=method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_no_cap_at_34_points(method, spread):
    pos = torch.rand(34, 3) * spread
    assert torch.bincount(radius_graph(pos, 1.0, method=method)[1]).tolist() == [33] * 34
    assert torch.bincount(radius_graph(pos, 1.0, loop=True, method=method)[1]).tolist() == [34] * 34


@pytest.mark.parametrize("method", METHODS)
def test_cap_says_what_it_drops_and_keeps_the_nearest(method):
    pos = torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"dropped 2000 of 2450 edges: 50 of 50 points have more than max_neighbours=9"):
        capped = radius_graph(pos, 2.0, max_neighbours=9, method=method)
    assert as_set(capped) == as_set(knn_graph(pos, 9, method=method))
    with pytest.warns(UserWarning, match="dropped 2050 of 2500"):
        own = radius_graph(pos, 2.0, loop=True, max_neighbours=9, method=method)
    assert as_set(own) == as_set(knn_graph(pos, 9, loop=True, method=method))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        radius_graph(pos, 2.0, max_neighbours=49, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [2, 3, 17, 200])
def test_twins_leave_out_exactly_the_point_itself(method, n):
    pos = torch.ones(n, 3)
    for k in (1, 5, 16):
        edges = knn_graph(pos, k, method=method)
        assert (edges[0] != edges[1]).all()
        assert torch.bincount(edges[1]).tolist() == [min(k, n - 1)] * n
        assert len(as_set(edges)) == edges.shape[1]
        looped = knn_graph(pos, k, loop=True, method=method)
        assert torch.bincount(looped[1]).tolist() == [min(k, n)] * n
        assert (looped[0] == looped[1]).sum() == n


@pytest.mark.parametrize("method", METHODS)
def test_batch_is_its_clouds(method):
    sizes = [1, 40, 3, 200, 2]
    clouds = [torch.rand(n, 3, generator=torch.Generator().manual_seed(n)) for n in sizes]
    batch = torch.tensor([0, 1, 3, 4, 9]).repeat_interleave(torch.tensor(sizes))     # ids may skip: those clouds are empty
    starts = torch.tensor([0] + sizes[:-1]).cumsum(0)
    for graph in (lambda p, b=None: knn_graph(p, 4, b, method=method), lambda p, b=None: radius_graph(p, 0.3, b, method=method)):
        assert torch.equal(graph(torch.cat(clouds), batch), torch.cat([graph(c) + s for c, s in zip(clouds, starts)], 1))


def test_small_blocks_give_the_same_edges(monkeypatch):
    from erwin_nsa.geometry import neighbours
    pos, batch, box = random_case(7)
    whole = neighbours._by_torch(pos, neighbours._cloud_counts(pos, batch), radius=0.5)
    parts = neighbours._by_torch(pos, neighbours._cloud_counts(pos, batch), radius=0.5, budget=64)
    assert as_set(torch.stack(whole[:2])) == as_set(torch.stack(parts[:2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_agree_between_methods(dtype):
    pos = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert as_set(radius_graph(pos, 0.2, method="kdtree")) == as_set(radius_graph(pos, 0.2, method="torch"))


def test_gradient_is_not_needed_and_inputs_stay():
    pos = torch.rand(20, 3, requires_grad=True)
    before = pos.detach().clone()
    knn_graph(pos, 3, box=0.5)
    radius_graph(pos, 0.2, box=0.5)
    assert torch.equal(pos.detach(), before)


@pytest.mark.parametrize("call, said", [
    (lambda p: knn_graph(p, 0), "k=0"),
    (lambda p: knn_graph(p, 2.5), "k=2.5"),
    (lambda p: knn_graph(p[:, 0], 2), r"\(N, D\)"),
    (lambda p: knn_graph(p.numpy(), 2), "torch tensor"),
    (lambda p: knn_graph(p.long(), 2), "floating-point"),
    (lambda p: knn_graph(p / 0, 2), "NaN or inf"),
    (lambda p: knn_graph(p, 2, torch.tensor([1, 0, 0, 0])), "unsorted"),
    (lambda p: knn_graph(p, 2, torch.tensor([-1, 0, 0, 0])), "negative"),
    (lambda p: knn_graph(p, 2, torch.zeros(4)), "int64"),
    (lambda p: knn_graph(p, 2, torch.zeros(3).long()), r"\(4,\)"),
    (lambda p: knn_graph(p, 2, box=0.0), "above 0"),
    (lambda p: knn_graph(p, 2, box=[1.0, 1.0, 1.0, 1.0]), "1 or 3 lengths"),
    (lambda p: knn_graph(p, 2, box=float("inf")), "finite lengths"),
    (lambda p: knn_graph(p, 2, method="gpu"), "method='gpu'"),
    (lambda p: radius_graph(p, -1.0), "radius=-1.0"),
    (lambda p: radius_graph(p, float("inf")), "radius=inf"),
    (lambda p: radius_graph(p, 0.5, box=1.0), "half the box"),
    (lambda p: radius_graph(p, 0.5, max_neighbours=0), "max_neighbours=0"),
])
def test_errors_say_given_needed_do(call, said):
    with pytest.raises(ValueError, match=said) as error:
        call(torch.rand(4, 3))
    assert all(word in str(error.value) for word in ("given: ", "needed: ", "do: "))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(6))
def test_cuda_gives_the_edges_of_the_cpu(seed):
    pos, batch, box = random_case(seed)
    for graph in (lambda p, b: knn_graph(p, 6, b, box=box), lambda p, b: radius_graph(p, 0.3, b, box=box)):
        on_gpu = graph(pos.cuda(), batch.cuda())
        assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), graph(pos, batch))
