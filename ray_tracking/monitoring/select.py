"""Which run a person means: a full id, the unambiguous beginning of one, or `latest`.

In: what was typed and the runs of a storage. Out: one run id, or a UsageError that names the candidates.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ray_tracking.errors import UsageError
from ray_tracking.runs.store import RunStore, sweep_of

LATEST = "latest"
_HINT = "List the runs with `ray-tracking runs ls`; another place with --storage or RAY_TRACKING_STORAGE."


def select_run(store: RunStore, wanted: str) -> str:
    """The id of the run that `wanted` means. Raises UsageError."""
    from ray_tracking.monitoring.listing import newest

    if wanted == LATEST:
        run_id = newest(store)
        if run_id is None:
            raise UsageError(f"There are no runs in {store.storage.uri}.", hint="Start one with `ray-tracking demo`.")
        return run_id
    if sweep_of(wanted) is not None and store.exists(wanted):
        return wanted
    return match(wanted, list(store.ids()), store.storage.uri)


def match(wanted: str, ids: Sequence[str], place: str) -> str:
    """The one of `ids` that equals `wanted` or alone begins with it. Raises UsageError naming `place`."""
    if wanted in ids:
        return wanted
    candidates = [run_id for run_id in ids if wanted and run_id.startswith(wanted)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        shown = ", ".join(candidates[:5]) + (", ..." if len(candidates) > 5 else "")
        raise UsageError(f"{wanted!r} may be any of {len(candidates)} runs: {shown}.", hint="Give more of the id.")
    close = difflib.get_close_matches(wanted, ids, n=3, cutoff=0.4)
    known = f"Did you mean {' or '.join(close)}? " if close else ""
    raise UsageError(f"No run {wanted!r} in {place} ({len(ids)} runs there).", hint=known + _HINT)
