"""Values as JSON that every parser takes.

In: plain Python values. Out: the same without floats that JSON lacks. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """`value` with NaN and infinities as "NaN", "Infinity", "-Infinity": strings that Python's `float` and
    JavaScript's `Number` turn back, where null would hide a run that diverged."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
