"""What the writer process costs to start, which is when training has just begun, or begun again after a failure."""

from __future__ import annotations

import subprocess
import sys


def test_it_loads_neither_torch_nor_the_configuration() -> None:
    code = (
        "import sys; import ray_tracking.checkpoint.writer_process; "
        "print(*sorted({'torch', 'ray', 'pydantic', 'yaml', 'cryptography'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == []
