"""The specification: what is here, and nothing else, decides a bit. docs/SPEC.md is its text.

The README has the reading order.
"""

SPEC_VERSION = "1.2"  # of docs/SPEC.md; any change of output bits changes it
