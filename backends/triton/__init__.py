"""The specification as Triton kernels, for CUDA devices, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""
