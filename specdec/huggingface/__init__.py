"""What lies between transformers' `model.generate` and this library: its configurations, processors, criteria and calls."""
