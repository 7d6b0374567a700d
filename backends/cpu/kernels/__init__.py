"""The CPU backend's kernels."""
