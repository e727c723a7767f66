"""The qualification run: proves the GPU kernels exact on the GPU at hand, times them there, and says so on record.

    make qualify                              every part
    make qualify PARTS=exact,determinism      some of them
    python -m benchmarks.qualify --dry-run    every part but the sanitizer's on the CPU, interpreted and tiny

It takes torch with Triton and nothing else: attncap need not be installed nor its C++ extension built.
"""
