"""The specification in eager PyTorch."""
