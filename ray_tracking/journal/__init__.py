"""The journal: a run's one durable, append-only history; every backend and report is a reader of it.

In: records from one writer. Out: the same records, in order from any offset, or as the effective history over
all attempts. Durable before it is acknowledged. May import `records`, `errors` and `storage`.
"""

from __future__ import annotations

from ray_tracking.journal.lineage import resumes
from ray_tracking.journal.reader import JournalReader
from ray_tracking.journal.writer import JournalWriter

__all__ = ["JournalReader", "JournalWriter", "resumes"]
