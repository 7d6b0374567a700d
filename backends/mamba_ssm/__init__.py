"""The kernels of mamba_ssm and causal_conv1d in refmamba's own block: fast on a CUDA device, and not exact (docs/GPU.md)."""
