"""The fast CPU backend: numba kernels on packed codes."""
