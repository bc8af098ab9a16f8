"""Fitting drafters to a target."""
