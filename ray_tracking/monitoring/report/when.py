"""Moments as a page shows them: in the time zone of whoever made it, which is named. Pure but for the zone."""

from __future__ import annotations

from datetime import datetime


def moment(seconds: float) -> str:
    """`2026-11-25 02:14 UTC`."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")
