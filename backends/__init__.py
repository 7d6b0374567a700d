"""Fast implementations of the specification, one file each; they import the specification and never each other."""
