from __future__ import annotations

import subprocess
import sys


def test_the_hub_needs_no_torch():
    """It would cost each sweep a second and 200 MB, and everything the hub does at that moment waits."""
    code = "import sys, ray_tracking.runtime.sweep.hub; print([n for n in ('torch', 'ray.data') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
