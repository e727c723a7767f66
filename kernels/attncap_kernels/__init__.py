"""Triton kernels of attncap; `launch` runs them."""
