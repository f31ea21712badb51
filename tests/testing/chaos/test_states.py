from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.comparing import compare_checkpoints
from ray_tracking.testing.chaos.evidence import Difference
from ray_tracking.testing.chaos.states import compare_states, same_tensor
from tests.checkpoint import by_hand


def objects() -> dict[str, Any]:
    return {
        "model": {"w": torch.tensor([1.0, math.nan, -0.0]), "b": torch.arange(4)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    }


def loaders() -> list[Any]:
    return [{"epoch": 1, "order": np.arange(5), "rank": rank} for rank in range(2)]


def compared(root: Path, now: dict[str, Any], own: dict[str, Any] | None = None) -> list[Difference]:
    opened = []
    for name, state, private in (("was", objects(), {"loader": loaders()}), ("now", now, own or {"loader": loaders()})):
        (root / name).mkdir()
        info = by_hand.write(root / name, state, own=private, world_size=2)
        opened.append(OpenCheckpoint(Storage.open(root / name), info))
    with opened[0], opened[1]:
        return compare_states(*opened)


def test_equal_checkpoints_are_counted_tensor_by_tensor(tmp_path: Path) -> None:
    assert compared(tmp_path, objects()) == [
        Difference("loader of rank 0", 1, "tensors", size=40),
        Difference("model", 2, "tensors", size=3 * 4 + 4 * 8),
        Difference("optimizer", 1, "tensors", size=8),
        Difference("loader of rank 1", 1, "tensors", size=40),
    ]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("model", "w"), torch.tensor([1.0, math.nan, 0.0]), "model.w differs"),
        (("model", "b"), torch.arange(4).float(), "model.b differs"),
        (("optimizer", "groups"), [{"lr": math.nextafter(0.1, 1), "betas": (0.9, 0.99)}], "groups[0].lr is 0.1000"),
        (("optimizer", "groups"), [{"lr": 0.1, "betas": [0.9, 0.99]}], "betas is list instead of tuple"),
        (("optimizer", "groups"), [], "has 0 items instead of 1"),
        (("optimizer", "state"), {1: {"exp_avg": torch.ones(2)}}, "optimizer.state has other keys"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, path: tuple[str, str], value: Any, said: str) -> None:
    now = objects()
    now[path[0]][path[1]] = value
    differing = [difference for difference in compared(tmp_path, now) if not difference.is_equal]
    assert [difference.what for difference in differing] == [path[0]]
    assert said in differing[0].examples[0]


def test_one_rank_alone_may_differ(tmp_path: Path) -> None:
    private = loaders()
    private[1]["order"][4] = 9
    differing = [each for each in compared(tmp_path, objects(), {"loader": private}) if not each.is_equal]
    assert [(each.what, each.examples) for each in differing] == [("loader of rank 1", ("loader.order differs",))]


def test_an_object_that_is_missing_differs(tmp_path: Path) -> None:
    now = objects()
    del now["optimizer"]
    differing = [each for each in compared(tmp_path, now) if not each.is_equal]
    assert [(each.what, each.examples) for each in differing] == [("optimizer", ("the killed run did not save it",))]


def test_runs_without_a_checkpoint_or_with_one_of_another_step_differ(tmp_path: Path) -> None:
    for name, step in (("a", 5), ("b", 6)):
        (tmp_path / name).mkdir()
        by_hand.write(tmp_path / name, objects(), step=step)
    a, b, empty = (Storage.open(tmp_path / name) for name in ("a", "b", "empty"))
    assert "no complete checkpoint" in compare_checkpoints(a, empty, None)[0].examples[0]
    assert "of step 5, epoch" in compare_checkpoints(a, b, None)[0].examples[0]
    assert all(difference.is_equal for difference in compare_checkpoints(a, a, None))


def test_tensors_are_compared_by_their_bits() -> None:
    assert same_tensor(torch.tensor(math.nan), torch.tensor(math.nan))
    assert not same_tensor(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same_tensor(torch.zeros(2), torch.zeros(2, 1))
    assert not same_tensor(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert same_tensor(torch.eye(3).t()[1:], torch.eye(3)[1:].clone())
    assert same_tensor(torch.tensor([True, False]), torch.tensor([True, False]))
    assert same_tensor(torch.zeros(0), torch.zeros(0))
