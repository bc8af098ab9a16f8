"""Hugging Face models over trees: targets, caches, attention, and the probe that finds out what a model supports."""
