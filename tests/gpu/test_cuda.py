"""The same package on a CUDA device: trees, branches and the model against the CPU, in float64 and within the float32 error of plain torch.

Needs torch, numpy, scipy, h5py and pytest, nothing else. Run: `python -m pytest tests/gpu -rA`.
"""
import contextlib
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")        # lets cuBLAS be deterministic; read when CUDA starts

import pytest
import torch

from erwin_nsa.geometry.balltree import BallTree, balls, slot_layout
from erwin_nsa.geometry.neighbours import knn_graph
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.compressed import BallCompression, SelectionRule, ball_windows, compressed_attention, select_balls
from erwin_nsa.nn.config import ErwinNSAConfig, as_published
from erwin_nsa.nn.local import local_attention
from erwin_nsa.nn.model import ErwinNSA
from erwin_nsa.nn.oracle import compressed_visibility, dense_attention, local_visibility, selected_visibility
from erwin_nsa.nn.selected import selected_attention

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: these tests compare it with the CPU"),
              pytest.mark.usefixtures("exact_float32")]
CUDA = torch.device("cuda")
SETTINGS = {"paper": ((128, 32, 16, 4, 2, 16), (507, 1, 300)), "odd": ((12, 4, 3, 3, 1, 5), (50, 1, 29)),
            "wide": ((16, 48, 3, 4, 2, 7), (150, 1, 49)), "large": ((128, 32, 16, 4, 1, 16), (5000,))}
settings = pytest.mark.parametrize("setting, sizes", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def exact_float32():
    """No TF32: its error is a choice of speed, not of the package."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def no_host_sync():
    """Any operation that makes the host wait for the device raises, with the line in the traceback."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: yield
    finally: torch.cuda.set_sync_debug_mode("default")


# ---- trees

def clouds(sizes, D=3, seed=0, lattice=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    draw = (lambda n: torch.randint(0, 9, (n, D), generator=g).to(dtype)) if lattice else \
        (lambda n: torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype))
    return PointBatch.from_clouds([draw(n) for n in sizes])


def ball_sets(tree, size, view):
    return tree.points_of(view).cpu().view(-1, size).sort(dim=1).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("D", [2, 3])
@pytest.mark.parametrize("sizes", [(1,), (2,), (33,), (507,), (5000,), (3586, 1, 890, 5000, 2), (100_000,)], ids=str)
@pytest.mark.parametrize("layout", ["full", "erwin"])
def test_tree_on_the_device_is_the_tree_on_the_host(layout, sizes, D, dtype):
    """Ball sets of both views, exactly; slots and masks."""
    batch = clouds(sizes, D, dtype=dtype)
    here, there = (BallTree.build(b, (128, 32), layout=layout) for b in (batch, batch.to(CUDA)))
    assert torch.equal(here.mask, there.mask.cpu())
    for view in range(2):
        for size in (128, 32) if view == 0 or layout == "full" else (128,):
            a, b = ball_sets(here, size, view), ball_sets(there, size, view)
            different = (a != b).any(1).sum().item()
            assert different == 0, f"view {view}: {different} of {len(a)} balls of {size} differ"
    N = len(batch.pos)
    assert torch.equal(there.order[there.inverse].cpu(), torch.arange(N))
    assert torch.equal(there.perm.gather(1, there.perm_inverse).cpu(), torch.arange(len(there.slots)).expand(2, -1))
    if layout == "erwin":
        copies = there.mask.cpu().index_fill(0, there.inverse.cpu(), False)
        assert (copies.nonzero().flatten() % 2 == 1).all(), "the first slot of a leaf is the point, the second its copy"


@pytest.mark.parametrize("ball_sizes", [(96, 24, 8), (12, 4), (7,), (32, 8)], ids=str)
def test_ties_and_odd_balls(ball_sizes):
    """A lattice with duplicates: the main view by coordinates, since copies of a point may change places."""
    batch = clouds((500, 3, 90), lattice=True)
    here, there = (BallTree.build(b, ball_sizes) for b in (batch, batch.to(CUDA)))
    label = torch.unique(batch.pos, dim=0, return_inverse=True)[1]
    for size in ball_sizes:
        sets = [torch.where(t >= 0, label[t.clamp(min=0)], -1).view(-1, size).sort(1).values
                for t in (tree.points_of(0).cpu() for tree in (here, there))]
        assert torch.equal(*sets)


def test_tree_is_the_same_every_time():
    batch = clouds((3586, 1, 890)).to(CUDA)
    for layout in ("full", "erwin"):
        a, b = (BallTree.build(batch, (128, 32), layout=layout) for _ in range(2))
        for name in ("order", "inverse", "perm", "perm_inverse"): assert torch.equal(getattr(a, name), getattr(b, name)), (layout, name)


def test_balls_on_the_device():
    batch = clouds((3586, 1, 890))
    for view in range(2):
        a, b = (balls(BallTree.build(p, (128, 32)), p.pos, size=32, view=view) for p in (batch, batch.to(CUDA)))
        for name in ("count", "centre", "radius"): assert torch.allclose(getattr(a, name), getattr(b, name).cpu(), atol=1e-6), name


@pytest.mark.parametrize("layout", ["full", "erwin"])
def test_tree_is_built_without_waiting_for_the_device(layout):
    """Sizes known, caches warm: the second build issues work and never asks for a result."""
    sizes = (3586, 1, 890)
    batch = clouds(sizes).to(CUDA)
    BallTree.build(PointBatch(batch.pos, sizes), (128, 32), layout=layout)
    with no_host_sync():
        tree = BallTree.build(PointBatch(batch.pos, sizes), (128, 32), layout=layout)
    assert torch.equal(tree.order[tree.inverse], torch.arange(len(batch.pos), device=CUDA))


# ---- branches

def branch_inputs(setting, sizes, seed=0):
    """Named float64 tensors on the CPU."""
    m, b, k, H, H_kv, d = setting
    slots = slot_layout(sizes, tuple(sorted({m, b}, reverse=True)))
    S, W, g = len(slots), len(slots) // b, torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    picks = draw(H_kv, S, W).argsort(-1)[..., :min(k, W)]
    picks = picks.masked_fill(torch.rand(picks.shape, generator=g) < 0.2, -1)
    return dict(q=draw(S, H, d), k=draw(S, H_kv, d), v=draw(S, H_kv, d), pos=draw(S, 3), sigma=-1 + 0.5 * draw(H),
                kc=draw(W, H_kv, d), vc=draw(W, H_kv, d), mk=draw(H_kv, d), mv=draw(H_kv, d)), picks


def branches(setting, sizes, picks, device):
    """name -> (input names, operator, dense torch) on a device."""
    m, b = setting[:2]
    slots = slot_layout(sizes, tuple(sorted({m, b}, reverse=True)), device=device)
    windows, mask, picks = ball_windows(slots, b, b), slots.mask, picks.to(device)

    def dense_local(q, k, v, pos, sigma):
        pos = pos.masked_fill(~mask[:, None], 0)
        apart = torch.cdist(pos, pos, compute_mode="donot_use_mm_for_euclid_dist")
        return dense_attention(q, k, v, local_visibility(slots, m), sigma[:, None, None] * apart)[0]

    def dense_compressed(q, kc, vc, mk, mv):
        visible = torch.cat([compressed_visibility(slots, windows.table), mask[:, None]], 1)
        return dense_attention(q, torch.cat([kc, mk[None]]), torch.cat([vc, mv[None]]), visible)[0]
    out = {"local": ("q k v pos sigma", lambda *t: local_attention(*t, mask, m), dense_local),
           "compressed": ("q kc vc mk mv", lambda q, kc, vc, *mem: compressed_attention(q, kc, vc, windows, mem), dense_compressed)}
    for per, i in (("point", picks), ("ball", picks[:, ::b])):
        visible, times = selected_visibility(slots, i, b)
        out[f"selected by {per}"] = ("q k v", lambda *t, i=i: selected_attention(*t, i, mask, b),
                                     lambda *t, visible=visible, times=times: dense_attention(*t, visible, times=times)[0])
    return out


def run(op, names, tensors, device, dtype):
    """Output and all gradients, as float64 on the CPU."""
    leaves = [tensors[n].to(device, dtype).clone().requires_grad_() for n in names.split()]
    out = op(*leaves)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device, dtype)
    return [t.detach().double().cpu() for t in (out, *torch.autograd.grad((out * pull).sum(), leaves))]


def rms(a, e): return ((a - e).square().mean().sqrt() / e.square().mean().sqrt().clamp(min=1e-30)).item()


@settings
def test_branches_in_float64(setting, sizes, nan_empty):
    """The device does what the host does, forward and all gradients."""
    tensors, picks = branch_inputs(setting, sizes)
    here, there = (branches(setting, sizes, picks, torch.device(d)) for d in ("cpu", "cuda"))
    for name, (names, op, _) in here.items():
        for part, e, a in zip(["output", *names.split()], run(op, names, tensors, "cpu", torch.float64),
                              run(there[name][1], names, tensors, CUDA, torch.float64)):
            assert (a - e).abs().max() <= 1e-10 * max(1.0, e.abs().max()), f"{name}, {part}: {(a - e).abs().max():.1e}"


@pytest.mark.parametrize("name", ["paper", "odd", "wide"])
def test_branches_in_float32(name, nan_empty):
    """Root mean square error against CPU float64, at most 3 times that of dense float32 torch on the device, over five draws."""
    setting, sizes = SETTINGS[name]
    sums = {}
    for seed in range(5):
        tensors, picks = branch_inputs(setting, sizes, seed)
        here, there = (branches(setting, sizes, picks, torch.device(d)) for d in ("cpu", "cuda"))
        for branch, (names, op, dense) in there.items():
            exact = run(here[branch][2], names, tensors, "cpu", torch.float64)
            mine, plain = (run(f, names, tensors, CUDA, torch.float32) for f in (op, dense))
            for part, a, p, e in zip(["output", *names.split()], mine, plain, exact):
                sums.setdefault((branch, part), []).append((rms(a, e), rms(p, e)))
    errors = {key: torch.tensor(pairs).square().mean(0).sqrt().tolist() for key, pairs in sums.items()}
    over = {f"{b}, {p}": f"{a:.1e} against {e:.1e}" for (b, p), (a, e) in errors.items() if a > 3 * e + 1e-8}
    assert not over, over


@settings
def test_selection_on_the_device(setting, sizes):
    """Float64 votes rank alike on both sides, for every rule."""
    tensors, _ = branch_inputs(setting, sizes)
    m, b, k = setting[:3]
    for rule in ("mean_logits", "sum_probabilities"):
        for per in ("point", "ball"):
            for stride in {b, b // 2 if b % 2 == 0 else b}:
                chosen = []
                for device in ("cpu", "cuda"):
                    windows = ball_windows(slot_layout(sizes, tuple(sorted({m, b}, reverse=True)), device=torch.device(device)), b, stride)
                    kc = tensors["kc"].repeat_interleave(b // stride, 0) * torch.linspace(0.5, 1.5, len(windows), dtype=torch.float64)[:, None, None]
                    chosen.append(select_balls(tensors["q"].to(device), kc.to(device), windows, SelectionRule(k, rule, per, True),
                                               tensors["mk"].to(device)).cpu())
                assert torch.equal(*chosen), (rule, per, stride)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_masked_slots_may_hold_anything(poison):
    setting, sizes = SETTINGS["paper"]
    tensors, picks = branch_inputs(setting, sizes)
    mask = slot_layout(sizes, (128, 32)).mask
    dirty = {n: t.masked_fill(~mask.view(-1, *[1] * (t.ndim - 1)), poison) if len(t) == len(mask) else t for n, t in tensors.items()}
    for name, (names, op, _) in branches(setting, sizes, picks, CUDA).items():
        with torch.no_grad():
            a, e = (op(*(t[n].to(CUDA, torch.float32) for n in names.split())) for t in (dirty, tensors))
        assert torch.equal(a, e), name


def test_forward_is_the_same_every_time():
    tensors, picks = branch_inputs(*SETTINGS["paper"])
    for name, (names, op, _) in branches(*SETTINGS["paper"], picks, CUDA).items():
        a, b = (op(*(tensors[n].to(CUDA, torch.float32) for n in names.split())) for _ in range(2))
        assert torch.equal(a, b), name


def test_gradients_are_the_same_every_time_when_asked():
    """Under `torch.use_deterministic_algorithms`; without it `index_add_` adds in the order of arrival."""
    tensors, picks = branch_inputs(*SETTINGS["paper"])
    torch.use_deterministic_algorithms(True)
    try:
        for name, (names, op, _) in branches(*SETTINGS["paper"], picks, CUDA).items():
            a, b = (run(op, names, tensors, CUDA, torch.float32) for _ in range(2))
            assert all(torch.equal(x, y) for x, y in zip(a, b)), name
    finally: torch.use_deterministic_algorithms(False)


# ---- the model

MODELS = {"point": {}, "ball": dict(selection="ball", score="sum_probabilities", phi="attention"), "ball_mean": dict(selection="ball"),
          "overlap": dict(compressed_stride=16, exclude_own=True), "recompute": dict(recompute=True)}


def make(sizes=(507, 1, 300), reference=False, **options):
    """Model and data on the CPU in float64."""
    torch.manual_seed(0)
    cfg = ErwinNSAConfig(c_in=5, c_hidden=16, depth=2, num_heads=4, num_kv_heads=2, head_dim=8, num_selected_balls=4, mp_steps=2, **options)
    model = ErwinNSA(as_published(cfg) if reference else cfg).double()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
    batch = clouds(sizes, dtype=torch.float64)
    return model, (torch.randn(sum(sizes), 5, dtype=torch.float64), batch.pos, batch.batch, knn_graph(batch.pos, 6, batch.batch, loop=True))


def step(model, data, device, dtype):
    """Output and gradients of x and all parameters, float64 on the CPU."""
    model = model.to(device, dtype)
    x, pos, batch, edges = (t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in data)
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    out = model(x, pos, batch, edges)
    out.square().mean().backward()
    grads = {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}
    return out.detach().double().cpu(), {n: g.double().cpu().clone() for n, g in grads.items()}


@pytest.mark.parametrize("options", [*MODELS.values(), dict(reference=True)], ids=[*MODELS, "reference"])
def test_model_in_float64(options):
    model, data = make(**options)
    (a, ga), (e, ge) = step(model, data, CUDA, torch.float64), step(model, data, "cpu", torch.float64)
    assert (a - e).abs().max() <= 1e-9 * e.abs().max()
    for name in ge: assert (ga[name] - ge[name]).abs().max() <= 1e-8 * max(1e-3, ge[name].abs().max()), name


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_model_in_float32(options):
    """Within 3 times the error of the CPU in float32, leaving out the worst hundredth of points: a near tie may select another ball."""
    model, data = make(**options)
    exact = step(model, data, "cpu", torch.float64)[0]
    data = [t.float() if t.is_floating_point() else t for t in data]
    error = lambda out: (out - exact).norm(dim=1).sort().values[:-(len(exact) // 100)].mean() / exact.norm(dim=1).mean()
    here, there = (error(step(model, data, d, torch.float32)[0]) for d in ("cpu", CUDA))
    assert there <= 3 * here, f"{there:.1e} on the device, {here:.1e} on the CPU"


def test_batch_mates_change_nothing_on_the_device():
    model, (x, pos, batch, edges) = make()
    together = model.to(CUDA)(*(t.to(CUDA) for t in (x, pos, batch, edges)))
    own = batch == 2
    alone = model(*(t.to(CUDA) for t in (x[own], pos[own])), edge_index=(edges[:, own[edges[0]]] - 508).to(CUDA))
    assert (alone - together[own.to(CUDA)]).abs().max() <= 1e-11 * together.abs().max()


def test_cached_tree_gives_the_same_numbers():
    model, data = make()
    x, pos, batch, edges = (t.to(CUDA) for t in data)
    model = model.to(CUDA)
    tree = model.build_tree(PointBatch.from_tensors(pos, batch))
    a, b = model(x, pos, batch, edges), model(x, pos, batch, edges, tree=tree)
    assert (a - b).abs().max() <= 1e-12 * a.abs().max()                # sums over edges arrive in any order


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_step_with_a_cached_tree_never_waits_for_the_device(options):
    model, data = make(**options)
    x, pos, batch, edges = (t.to(CUDA, torch.float32) if t.is_floating_point() else t.to(CUDA) for t in data)
    model = model.to(CUDA, torch.float32)
    tree = model.build_tree(PointBatch.from_tensors(pos, batch))
    for warm in (True, False):
        with contextlib.nullcontext() if warm else no_host_sync():
            model(x, pos, edge_index=edges, tree=tree).square().mean().backward()


def test_tensors_on_two_devices_are_refused():
    model, (x, pos, batch, edges) = make()
    tree = model.build_tree(PointBatch.from_tensors(pos, batch))
    model = model.to(CUDA)
    with pytest.raises(ValueError, match="on cpu; needed.*on cuda"): model(x.to(CUDA), pos.to(CUDA), edge_index=edges.to(CUDA), tree=tree)
    with pytest.raises(ValueError, match="on cpu"): model(x.to(CUDA), pos.to(CUDA), batch.to(CUDA), edges)


def test_compression_modules_on_the_device():
    for phi in ("mlp", "attention", "mean"):
        torch.manual_seed(0)
        compress, t = BallCompression(32, 8, phi).double(), torch.randn(896, 2, 8, dtype=torch.float64)
        out = []
        for device in ("cpu", "cuda"):
            table = ball_windows(slot_layout((507, 1, 200), (128, 32), device=torch.device(device)), 32, 16).table
            used = (table >= 0).any(1)
            out.append(compress.to(device)(t.to(device), table)[used].detach().cpu())
        assert torch.allclose(*out, atol=1e-12), phi


def test_published_tree_and_balls_agree_in_shape():
    """Without the compiled package to compare with: as many leaves, and as many copies, as the published rule gives."""
    tree = BallTree.build(clouds((5000,)).to(CUDA), (128,), layout="erwin")
    pairs = tree.order[tree.mask].view(-1, 2)
    assert len(pairs) == 4096 and (pairs[:, 0] == pairs[:, 1]).sum() == 8192 - 5000
