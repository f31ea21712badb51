"""From log calls to the journal and on to the backends.

In: events of senders (`sender`, `transport`). Out: a durable journal and filled backends (`service`, `delivery`).
May import records, errors, storage, log, config, journal and runs; never ray.
"""
