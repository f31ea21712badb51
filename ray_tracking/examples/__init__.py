"""Training functions to start from; each runs as it stands with `ray-tracking train`."""
