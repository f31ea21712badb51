"""Sweeps on Ray Tune: many runs of one training function.

In: a config with a `sweep` section, a training function. Out: a run per trial, below the sweep's own; a SweepResult.
The driver proposes params and keeps the records; one actor, the hub, tracks all trials; each trial is a Tune function
that runs the same worker body as `train`.
"""
