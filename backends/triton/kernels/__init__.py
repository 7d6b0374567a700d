"""The kernels, under a few rules that keep their bits: docs/GPU.md has them, tools/compile_kernels.py checks them."""
