"""Triton kernels of erwin_nsa, exported from `nbs/kernels`. Import them as `erwin_nsa.kernels`."""
