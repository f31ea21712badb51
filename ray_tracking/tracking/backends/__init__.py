"""The backends: each shows the journal's records in one foreign system, through that system's own client.

In: records in journal order (base.py). Out: event files, W&B rows, MLflow metrics.
May import records, errors and storage; a client library is imported by its own file, when the backend opens.
"""
