"""Runs on a cluster elsewhere, through Ray's Jobs API: submitted, followed, looked up and stopped.

In: a resolved config, a target, a directory with the code. Out: a job whose driver trains the run, and its log.
May import what `runtime` may; the command line puts it together.
"""
