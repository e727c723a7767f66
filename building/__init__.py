"""What the build of the C++ and CUDA kernels takes besides setuptools; used by setup.py and by tests that compile."""
