"""Distributed training on Ray: one run that survives anything, tracked everywhere."""
