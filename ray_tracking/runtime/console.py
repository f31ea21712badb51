"""What of a cluster's output reaches the driver's terminal: the user's lines and ours, not Ray's housekeeping."""

from __future__ import annotations

import re
import sys
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._private.worker import print_to_stdstream

from ray_tracking.log import get_logger

log = get_logger()

_HANDLER = "ray_print_logs"
_OURS = "TrackerActor"
_HOUSEKEEPING = frozenset({"PlacementGroupCleaner", "TrainController", "SynchronizationActor", "TrainStateActor"})
_HOUSEKEEPING_LINE = re.compile(
    # Of a sweep whose trials wait for each other: what Ray Tune keeps is a pointer to a checkpoint of ours.
    r"Checkpoint successfully created at: Checkpoint\("
    r"|Restored on \S+ from checkpoint: Checkpoint\("
    # Of any job that has more workers than the node has cores.
    r"|WARNING: \d+ PYTHON worker processes have been started on node:"
)


def quieten() -> None:
    """Take the place of Ray's printing of worker output in this process.

    Ray has no public way to choose by source, so this uses the dispatcher that `ray.init(log_to_driver=True)` fills.
    """
    global_worker_stdstream_dispatcher.remove_handler(_HANDLER)
    global_worker_stdstream_dispatcher.add_handler(_HANDLER, _show)


def _show(data: dict[str, Any]) -> None:
    actor = data.get("actor_name")
    housekeeping = [line for line in data["lines"] if actor in _HOUSEKEEPING or _HOUSEKEEPING_LINE.search(line)]
    for line in housekeeping:
        log.debug("ray", actor=actor, line=line)
    if housekeeping:
        data = {**data, "lines": [line for line in data["lines"] if line not in housekeeping]}
    if not data["lines"]:
        return
    if actor == _OURS:
        # Already events with run and attempt in them; Ray's prefix would say less.
        for line in data["lines"]:
            print(line, file=sys.stderr, flush=True)  # noqa: T201
    else:
        print_to_stdstream(data, False)
