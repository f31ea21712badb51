"""Python's garbage collector in a tracker process: kept from looking again and again at what stays for good."""

from __future__ import annotations

import gc


def settle() -> None:
    """To be called once something large has been set up: an imported client, an open backend.

    All there is now is left out of later collections: one over MLflow's and W&B's modules takes 0.2 s, in which no
    batch is acknowledged. And records, which make no cycles, come too fast for a look at every seven hundred.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
