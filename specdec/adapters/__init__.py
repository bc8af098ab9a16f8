"""`specdec.generate` as other libraries call it. Nothing here is imported before it is asked for by its full name."""
