"""Files: checkpoints, calibrations, tokenizers, texts, the hub."""
