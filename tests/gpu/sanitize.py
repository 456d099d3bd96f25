"""Every kernel once, forward and backward, on small odd sizes, for a memory checker:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
"""
import torch

from erwin_nsa.geometry.balltree import BallTree
from erwin_nsa.geometry.points import PointBatch
from erwin_nsa.nn.compressed import SelectionRule, ball_windows, compressed_attention, select_balls
from erwin_nsa.nn.local import local_attention
from erwin_nsa.nn.mpnn import MPNNLayer, edge_lists, mpnn_step
from erwin_nsa.nn.selected import selected_attention

DEVICE = torch.device("cuda", 0)


def case(sizes, m, b, k, H, H_kv, d, dtype):
    draw = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()
    points = PointBatch(torch.randn(sum(sizes), 3, device=DEVICE), sizes)
    tree = BallTree.build(points, (m, b), impl="triton")
    S, mask, windows = len(tree.slots), tree.mask, ball_windows(tree.slots, b, b)
    q, key, value, kc, vc, sigma = draw(S, H, d), draw(S, H_kv, d), draw(S, H_kv, d), draw(len(windows), H_kv, d), draw(len(windows), H_kv, d), draw(H)
    memory = draw(H_kv, d), draw(H_kv, d)
    pos = tree.to_slots(points.pos)
    outs = [local_attention(q, key, value, pos, sigma, mask, m, "triton"), compressed_attention(q, kc, vc, windows, memory, "triton")]
    for per in ("point", "ball"):
        for rule in ("mean_logits", "sum_probabilities"):
            picks = select_balls(q, kc, windows, SelectionRule(k, rule, per, exclude_own=True), memory[0], "triton")
            outs.append(selected_attention(q, key, value, picks, mask, b, False, "triton"))
    torch.autograd.grad(sum(o.float().sum() for o in outs), (q, key, value, kc, vc, sigma, *memory))


def edges(N, c):
    h = torch.randn(N, c, device=DEVICE, requires_grad=True)
    pairs = torch.randint(0, N, (2, 5 * N), device=DEVICE)
    params = MPNNLayer(c).to(DEVICE).params
    torch.autograd.grad(mpnn_step(h, torch.randn(N, 3, device=DEVICE), edge_lists(pairs, N), params, impl="triton").sum(), [h, *params])


for dtype in (torch.float32, torch.bfloat16):
    case((33, 1, 70), 32, 8, 3, 4, 2, 20, dtype)
    case((507,), 128, 32, 16, 2, 1, 16, dtype)
edges(31, 20)
edges(507, 64)
torch.cuda.synchronize()
print("all kernels ran")
