"""transformers' own call, `model.generate`, decoded here."""
