"""Whether the versions on the cluster are those that a run was submitted with. Pure.

The working directory brings the code, so that Python and torch may differ where that is harmless; it is said. Ray and
ray-tracking must be of one release, because the config and the run's directory are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray_tracking.errors import UsageError

_SAME_RELEASE = ("ray", "ray-tracking")
_SAID = ("python", "torch")


def check_release(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """What differs without harm, in words. Raises UsageError where the releases (1.2 of 1.2.3) must be the same."""
    for package in _SAME_RELEASE:
        here, there = ours.get(package), theirs.get(package)
        if here and there and _release(here) != _release(there):
            raise UsageError(
                f"The cluster has {package} {there}, the run was submitted with {here}.",
                hint=f"Install the same release on both sides: pip install '{package}=={there}' here, or {here} there.",
            )
    return [
        f"{package} is {there} on the cluster, {here} where the run was submitted"
        for package in (*_SAID, *_SAME_RELEASE)
        if (here := ours.get(package)) and (there := theirs.get(package)) and here != there
    ]


def _release(version: str) -> list[str]:
    return version.split(".")[:2]
