"""Kernels for one token."""
