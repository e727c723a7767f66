"""Triton's kernels are interpreted in the tests, on the CPU; Triton must know before it is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
