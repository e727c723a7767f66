"""The gate without a GPU: kernels are compiled ahead of time, and their machine code is held to budgets.

    python -m benchmarks.gate            the whole table, some 20 minutes on two cores
    python -m benchmarks.gate --help     parts of it, JSON, and how budgets are renewed

Compiling goes through the real launcher, with a driver that names a GPU and has none: what is judged is what a call
would run.
"""
