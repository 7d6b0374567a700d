"""Twenty rows a task, written for this package in each data set's own format: a sample, not the benchmark."""
