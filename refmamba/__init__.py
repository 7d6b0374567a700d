"""Mamba inference with bit-exact integer quantization: a NumPy specification, and backends that give the same bits."""

SPEC_VERSION = "1.0"  # of docs/SPEC.md; any change of output bits changes it
__version__ = "0.1.0"
