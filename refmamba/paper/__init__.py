"""The tables and figures of Mamba-PTQ (Pierro and Abreu, arXiv 2407.12397)."""
