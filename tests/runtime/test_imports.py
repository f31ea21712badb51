"""The garbage collector at rest during imports, in a driver and in a process of Ray's."""

from __future__ import annotations

import gc
import sys

import pytest

from ray_tracking.runtime.imports import uncollected


def test_in_a_users_process_it_is_as_it_was_and_all_is_still_looked_through() -> None:
    frozen = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_collects_again_but_not_what_was_imported() -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        def start(self) -> tuple[bool, bool, int]:
            from ray_tracking.runtime import worker

            worker.imports.import_what_training_needs()
            return "torch._dynamo" in sys.modules, gc.isenabled(), gc.get_freeze_count()

    actor = Worker.remote()
    imported, collects, frozen = ray.get(actor.start.remote())
    ray.kill(actor)
    assert (imported, collects) == (True, True)
    assert frozen > 500_000
