"""Optional dependencies: the one place that says which extra is missing."""

from __future__ import annotations

from importlib.util import find_spec

from ray_tracking.errors import MissingExtraError


def require(extra: str, *packages: str) -> None:
    """Raise MissingExtraError naming `extra` if one of `packages` can't be imported. Imports nothing itself."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"This needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            hint=f'Install with: pip install "ray-tracking[{extra}]"',
        )
