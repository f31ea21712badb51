"""Data loaders sharded by rank that resume inside an epoch.

In: datasets of any kind, or ready-made DataLoaders. Out: this rank's batches, and a position for checkpoints.
Imports torch; of the package only errors, log and runtime's `collective`.
"""
