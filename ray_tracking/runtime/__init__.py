"""Training on Ray: worker groups, the tracker actor, and the `run` that training functions get.

In: a config and a training function. Out: a `RunResult`, a run directory. The only package that imports ray;
may import everything below it.
"""
