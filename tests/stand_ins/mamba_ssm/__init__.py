"""Stands in for mamba_ssm (tests/stand_ins/README.md)."""
