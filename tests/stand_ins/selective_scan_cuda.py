"""Stands in for the compiled part of mamba_ssm."""
