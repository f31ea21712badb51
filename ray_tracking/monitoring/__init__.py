"""Looking at runs: overviews, comparisons, exports, and whether this machine is set up.

In: run directories on the storage. Out: plain data for the command line (and later reports, alerts,
watchers).
May import records, errors, storage, config, journal, runs, tracking, checkpoint; needs neither ray nor torch.
"""
