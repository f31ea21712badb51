"""Numbers, times and sizes as people read them. Pure."""

from __future__ import annotations

import json
import math
from typing import Any


def number(value: float | None) -> str:
    """Five significant digits; whole numbers below a million as they are."""
    if value is None:
        return "-"
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.5g}"


def duration(seconds: float) -> str:
    """`45s`, `3m 20s`, `2h 05m`, `3d 4h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def size(count: float) -> str:
    """Bytes in decimal units: `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def value(of_param: Any) -> str:
    """A param's value: numbers as above, text as it is, anything else as JSON."""
    if isinstance(of_param, str):
        return of_param
    if isinstance(of_param, float):
        return number(of_param)
    return json.dumps(of_param, default=str)
