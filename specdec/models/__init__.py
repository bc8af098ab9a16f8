"""What runs a Hugging Face model over trees: targets, caches, attention, and what is found out about a model first."""
