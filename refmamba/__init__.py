"""Mamba inference with bit-exact integer quantization: a NumPy specification, and backends that give the same bits."""

__version__ = "0.1.0"
