"""`python -m ray_tracking`: the same as `ray-tracking`."""

from ray_tracking.cli.app import main

if __name__ == "__main__":
    main()
