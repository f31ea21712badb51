"""Runs on the storage: their identity (`run.json`), their summary, and where they lie.

In: a storage root. Out: `RunRecord`s and the directories of runs. May import records, errors, storage, config, journal.
"""
