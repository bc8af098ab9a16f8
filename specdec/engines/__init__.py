"""How the stages of a step are run: called directly, or captured as CUDA graphs."""
