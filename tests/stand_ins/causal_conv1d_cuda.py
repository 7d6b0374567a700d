"""Stands in for the compiled part of causal_conv1d."""
