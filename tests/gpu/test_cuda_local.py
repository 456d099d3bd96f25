"""Local ball attention by Triton kernels on a CUDA device: within three times the error of plain torch in the same format, against float64.

Run: `python -m pytest tests/gpu/test_cuda_local.py -rA`, with `-n 14` where pytest-xdist is there: nearly all of the time goes into compiling.
"""
import pytest
import torch
from formats import cut

if not torch.cuda.is_available(): pytest.skip("no CUDA device here: tests/test_kernels_local.py runs the interpreter", allow_module_level=True)

from erwin_nsa.geometry.balltree import slot_layout
from erwin_nsa.kernels import local
from erwin_nsa.kernels.local import local_attention_triton, local_reference

NAMES = "q k v pos sigma".split()
FORMATS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# m, H, H_kv, d, D, sizes
CASES = [(128, 16, 1, 16, 3, (3586,)), (128, 8, 8, 32, 3, (5000,)), (256, 8, 8, 32, 3, (3586, 1, 33)), (256, 4, 2, 64, 3, (507, 1)),
         (64, 6, 2, 48, 2, (507, 31)), (32, 4, 4, 20, 3, (33, 1, 890)), (4, 2, 1, 5, 3, (31, 1)), (7, 1, 1, 16, 2, (50,)), (12, 3, 3, 128, 3, (100,)),
         (96, 6, 3, 20, 3, (1,)), (100, 4, 1, 64, 3, (333, 2)), (128, 4, 2, 128, 3, (300,)), (300, 2, 1, 48, 3, (890,)), (192, 4, 4, 16, 1, (507,)),
         (512, 4, 2, 32, 3, (1500,)), (1024, 2, 2, 16, 3, (3000, 5)), (1024, 1, 1, 128, 3, (1500,)), (16, 16, 4, 8, 3, (5000, 1))]
IDS = ["m{}H{}kv{}d{}D{}-n{}".format(*c[:5], "_".join(map(str, c[5]))) for c in CASES]


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def inputs(case, dtype, seed=0):
    m, H, H_kv, d, D, sizes = case
    mask = slot_layout(sizes, (m,), device=torch.device("cuda")).mask
    S, g = len(mask), torch.Generator("cuda").manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, device="cuda")
    return [draw(S, H, d).to(dtype), draw(S, H_kv, d).to(dtype), draw(S, H_kv, d).to(dtype), draw(S, D), -1 + 0.5 * draw(H)], mask


def run(op, tensors, mask, m, double=False, with_pos=True, pull_seed=1):
    """Output and gradients of q, k, v, pos, sigma for a random gradient of the output."""
    leaves = [(t.double() if double else t.clone()).requires_grad_(with_pos or i != 3) for i, t in enumerate(tensors)]
    out = op(*leaves, mask, m)
    pull = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(pull_seed), device="cuda").to(tensors[0].dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t.requires_grad], pull)]


def rms(t): return t.double().square().mean().sqrt().item()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_error_budget(case, form, nan_empty):
    torch.backends.cuda.matmul.allow_tf32 = form == "tf32"
    tensors, mask = inputs(case, FORMATS[form])
    tf32 = form == "tf32"                                     # torch uses TF32 as it sees fit: there the yardstick is float64 on inputs of that format
    plain = [cut(t) for t in tensors[:3]] + tensors[3:] if tf32 else tensors
    pulls = [[run(local_attention_triton, tensors, mask, case[0], pull_seed=seed), run(local_reference, plain, mask, case[0], tf32, pull_seed=seed),
              run(local_reference, tensors, mask, case[0], True, pull_seed=seed)] for seed in range(1, 9)]
    floor = {"fp32": 5e-7, "tf32": 5e-4, "fp16": 2.5e-4, "bf16": 2e-3}[form]      # tf32: Triton cuts operands where cuBLAS rounds them
    assert (pulls[0][0][0][~mask] == 0).all()
    for i, name in enumerate(["output", *NAMES]):
        many = slice(None) if name == "sigma" else slice(1)   # few numbers, each a sum that cancels: one draw would compare two coin tosses
        a, p, e = (torch.stack([runs[j][i].double() for runs in pulls[many]]) for j in range(3))
        error, allowed = rms(a - e), 3 * rms(p - e) + floor * max(1, rms(e))
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e} at a size of {rms(e):.2e}"


@pytest.mark.parametrize("case", CASES[:8], ids=IDS[:8])
def test_masked_slots_may_hold_anything(case, nan_empty):
    tensors, mask = inputs(case, torch.bfloat16)
    clean = run(local_attention_triton, tensors, mask, case[0])
    dirty = [t.masked_fill(~mask.view(-1, *[1] * (t.ndim - 1)), float("nan")) if len(t) == len(mask) else t for t in tensors]
    for name, a, b in zip(["output", *NAMES], run(local_attention_triton, dirty, mask, case[0]), clean): assert torch.equal(a, b), name


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_same_bits_twice(case, nan_empty):
    tensors, mask = inputs(case, torch.bfloat16)
    a, b = (run(local_attention_triton, tensors, mask, case[0], with_pos=False) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_slices_of_one_projection():
    """Strided q, k, v give the same bits as copies."""
    mask, g = slot_layout((507,), (128,), device=torch.device("cuda")).mask, torch.Generator("cuda").manual_seed(0)
    fused, pos = torch.randn(len(mask), 8, 32, generator=g, device="cuda", dtype=torch.bfloat16), torch.randn(len(mask), 3, generator=g, device="cuda")
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    sigma = torch.full((4,), -1., device="cuda")
    a, b = (run(local_attention_triton, t, mask, 128) for t in ([q, k, v, pos, sigma], [q.contiguous(), k.contiguous(), v.contiguous(), pos, sigma]))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[12]], ids=[IDS[1], IDS[3], IDS[12]])
def test_registration(case):
    tensors, mask = inputs((*case[:5], (400,)), torch.float16)
    out, lse = local.local_fwd(*tensors, mask, case[0])
    torch.library.opcheck(local.local_fwd, (*[t.requires_grad_() for t in tensors], mask, case[0]))
    tensors = [t.detach() for t in tensors]
    for with_pos in (False, True): torch.library.opcheck(local.local_bwd, (torch.randn_like(out), *tensors, mask, out, lse, case[0], with_pos))


def test_compiles_as_one_graph():
    case = CASES[1]
    tensors, mask = inputs(case, torch.bfloat16)
    compiled = torch.compile(lambda *t: local_attention_triton(*t) * 2, fullgraph=True)
    for a, b in zip(run(compiled, tensors, mask, case[0]), run(lambda *t: local_attention_triton(*t) * 2, tensors, mask, case[0])): assert torch.equal(a, b)


def test_a_captured_graph_replays():
    case = CASES[0]
    tensors, mask = inputs(case, torch.bfloat16)
    want = run(local_attention_triton, tensors, mask, case[0], with_pos=False)
    leaves = [t.clone().requires_grad_(i != 3) for i, t in enumerate(tensors)]
    pull = torch.randn(want[0].shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(torch.bfloat16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        with torch.cuda.graph(graph, stream=stream):
            out = local_attention_triton(*leaves, mask, case[0])
            grads = torch.autograd.grad(out, [t for t in leaves if t.requires_grad], pull)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip([out, *grads], want))
