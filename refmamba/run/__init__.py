"""From words to a running model, and what it is run for: text, perplexity, timing."""
