"""Settings shared by all tests: one thread, real data where it lies beside the project, memory that starts as NaN."""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch: small operations lose more to waiting threads than they gain

import pytest
import torch

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")   # before anything imports triton

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ROOT.parent / "shared" / "data"
if BESIDE.is_dir():
    os.environ.setdefault("ERWIN_NSA_DATA", str(BESIDE))

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def nan_empty(monkeypatch):
    """`torch.empty` and relatives hand out NaN (the largest value for integers), so that an entry nobody wrote is seen."""
    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.dtype == torch.bool or out.requires_grad:
                return out
            fill = float("nan") if out.is_floating_point() or out.is_complex() else torch.iinfo(out.dtype).max
            with torch.no_grad():
                return out.fill_(fill)
        return wrapper
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
