"""The specification of every op in plain torch: what the fast kernels are tested against, and what runs on CPU."""
