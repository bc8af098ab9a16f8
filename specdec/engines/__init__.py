"""How the stages of a step are run: as they stand, or captured as CUDA graphs."""
