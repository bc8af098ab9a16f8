"""Bridges to transformers' `model.generate`: its configurations, processors, stopping criteria and calls."""
