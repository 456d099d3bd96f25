"""What the tests of several kernels share about number formats."""
import torch


def cut(t):
    """Float32 rounded to the 10 bits of TF32."""
    return ((t.view(torch.int32) + 4096) & -8192).view(torch.float32)
