"""A searcher whose proposals are kept, so that a sweep goes on after its driver has died, with what was learnt.

What the searcher knew is found again by asking and telling it the same once more: with the same seed it proposes the
same. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.search import Searcher

from ray_tracking.log import get_logger
from ray_tracking.runs.sweep import TrialRecord
from ray_tracking.runtime.sweep.bohb import BUDGET
from ray_tracking.runtime.sweep.book import Book

log = get_logger()


class RecordedSearcher(Searcher):
    """`expect(tune_id, run_id)` is called before Ray Tune can start a trial; `may_start` says whether it may now,
    `is_closed` that none will any more."""

    def __init__(
        self,
        inner: Searcher,
        book: Book,
        metric: str,
        mode: str,
        expect: Callable[[str, str], None],
        may_start: Callable[[], bool] = lambda: True,
        is_closed: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._inner = inner
        self._book = book
        self._expect = expect
        self._may_start = may_start
        self._is_closed = is_closed
        self._replay()

    def _replay(self) -> None:
        differs = 0
        for event, trial, milestone in self._book.history():
            if event == "suggested":
                found = self._inner.suggest(_name(trial))
                differs += not _same(found, trial.proposed)
            elif milestone is not None:
                self._tell_arrival(_name(trial), milestone.reports, milestone.value)
            else:
                result = None if trial.told_value is None else self._result(trial)
                self._inner.on_trial_complete(_name(trial), result=result, error=trial.told_error)
        if differs:
            log.warning(
                "the searcher does not propose what it did before; it goes on from other random numbers",
                differing_trials=differs,
            )

    def _result(self, trial: TrialRecord) -> dict[str, Any]:
        return {self.metric: trial.told_value, "training_iteration": max(trial.reports, 1), "trial_id": _name(trial)}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True  # it has all of them

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        return bool(self._inner.set_max_concurrency(max_concurrent))

    def suggest(self, trial_id: str) -> Any:
        if self._is_closed():
            return Searcher.FINISHED
        if not self._may_start():
            return None
        trial = self._book.take_unfinished(trial_id)
        if trial is None:
            # Known to it by our own name, which is the same when it is asked again.
            found: Any = self._inner.suggest(f"trial-{self._book.next_number:03d}")
            if found is None or found == Searcher.FINISHED:
                return found
            trial = self._book.propose(found, trial_id)
        self._expect(trial_id, self._book.run_id(trial.number))
        return trial_config(trial)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._inner.on_trial_result(self._name(trial_id), {**result, "trial_id": self._name(trial_id)})

    def arrive(self, trial_id: str, reports: int, value: float) -> None:
        """The trial has come to a milestone of HyperBand's."""
        self._book.arrive(trial_id, reports, value)
        self._tell_arrival(self._name(trial_id), reports, value)

    def _tell_arrival(self, name: str, reports: int, value: float) -> None:
        result = {self.metric: value, "training_iteration": reports, "trial_id": name, BUDGET: {"budget": reports}}
        self._inner.on_trial_result(name, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        name = self._name(trial_id)
        trial = self._book[self._book.number_of(trial_id)]
        if result is None and not error and trial.value is not None:  # stopped while it waited for others
            result = {self.metric: trial.value, "training_iteration": max(trial.reports, 1)}
        value = (result or {}).get(self.metric)
        self._inner.on_trial_complete(name, result={**result, "trial_id": name} if result else None, error=error)
        self._book.tell(trial_id, None if value is None else float(value), error)

    def _name(self, trial_id: str) -> str:
        return f"trial-{self._book.number_of(trial_id):03d}"

    def save(self, checkpoint_path: str) -> None:
        """Not wanted: our own records are what a sweep goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {}


def trial_config(trial: TrialRecord) -> dict[str, Any]:
    """What Ray Tune gives to the trial's function."""
    newest = trial.takeovers[-1] if trial.takeovers else None
    names = ("number", "run_id", "step", "reports")
    return {"params": dict(trial.params), "takeover": newest and {name: newest[name] for name in names}}


def _name(trial: TrialRecord) -> str:
    return f"trial-{trial.number:03d}"


def _same(found: Any, recorded: Mapping[str, Any]) -> bool:
    return json.dumps(found, sort_keys=True, default=str) == json.dumps(recorded, sort_keys=True, default=str)
