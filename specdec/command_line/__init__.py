"""`python -m specdec`: `specdec.tune` and `specdec.generate` for those who do not want to write Python."""
