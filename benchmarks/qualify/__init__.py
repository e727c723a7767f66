"""The qualification run: proves the GPU kernels exact on the GPU at hand, times them there, and says so on record.

    make qualify                              every part
    make qualify PARTS=exact,determinism      some of them
    make qualify IMPL=cuda                    of one implementation; of both without it
    python -m benchmarks.qualify --dry-run    every part but the sanitizer's on the CPU, tiny

It takes torch with Triton: attncap need not be installed. For the CUDA kernels its extension is built in place, which
takes nvcc, a C++ compiler, setuptools and pybind11, and CuTe's headers; `python -m building.carry build/carry` puts all
but the compilers where the run finds them on a machine without a network.
"""
