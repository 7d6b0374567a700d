"""Does a backend give the specification's bits? Vectors, comparison, whole models, the first difference."""
