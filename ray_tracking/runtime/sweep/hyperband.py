"""HyperBand for Ray Tune: trials wait, off their workers, until those that they are compared with have come as far.

Ray Tune's own wants all of a bracket's trials as its actors at once; here no more of them hold workers than may run at
a time. Runs in the driver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from ray_tracking.config.sweep import SchedulerConfig
from ray_tracking.runtime.sweep.bohb import BUDGET
from ray_tracking.runtime.sweep.brackets import Bracket, plan
from ray_tracking.runtime.sweep.reporting import REPORTS

Arrived = Callable[[str, int, float], None]
"""Ray Tune's id, the milestone in reports, the value there."""
_BUSY = (Trial.PENDING, Trial.RUNNING)


class HyperBand(FIFOScheduler):
    """`reasons`: by Ray Tune's id, why a trial was ended. `total`: trials of this session. `arrived` hears of each
    trial that has come to a milestone.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        metric: str,
        mode: str,
        reasons: dict[str, str],
        *,
        total: int,
        at_once: int,
        arrived: Arrived,
    ) -> None:
        super().__init__()
        self._key = metric
        self._reasons = reasons
        self._at_once = at_once
        self._arrived = arrived
        sign = 1.0 if mode == "min" else -1.0
        planned = plan(total, config.max_reports or 1, config.reduction_factor or 3)
        self._brackets = [Bracket[Any](size, rungs, sign) for size, rungs in planned]
        self._of: dict[Any, Bracket[Any]] = {}
        self._ready: list[Any] = []
        """Trials that go on as soon as there is room."""
        self._tune: Any = None

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True  # it has them

    def may_start(self) -> bool:
        """Whether there is room for a new trial, those that wait to go on first."""
        return self._busy() + len(self._ready) < self._at_once

    def _busy(self) -> int:
        return 0 if self._tune is None else sum(trial.status in _BUSY for trial in self._tune.get_trials())

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._tune = tune_controller
        bracket = next((each for each in self._brackets if not each.is_full), self._brackets[-1])
        bracket.add(trial)
        self._of[trial] = bracket

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        bracket = self._of[trial]
        result[BUDGET] = {}
        if result.get("done") or result[REPORTS] < bracket.milestone:
            return str(TrialScheduler.CONTINUE)
        self._arrived(trial.trial_id, bracket.milestone, result[self._key])
        bracket.arrive(trial, result[self._key])
        decided = bracket.compare()
        if decided is None:
            return str(TrialScheduler.PAUSE)
        self._part(tune_controller, decided, current=trial, reports=result[REPORTS])
        return str(TrialScheduler.CONTINUE if trial in decided[0] else TrialScheduler.STOP)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        bracket = self._of.pop(trial, None)
        if trial in self._ready:
            self._ready.remove(trial)
        if bracket is None:
            return
        bracket.leave(trial)
        decided = bracket.compare()
        if decided is not None:
            self._part(tune_controller, decided)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.on_trial_remove(tune_controller, trial)

    def _part(self, tune_controller: Any, decided: Any, current: Any = None, reports: int | None = None) -> None:
        good, bad = decided
        self._ready += [trial for trial in good if trial is not current]
        for trial in bad:
            made = reports or (trial.last_result or {}).get(REPORTS, 0)
            self._reasons[trial.trial_id] = f"stopped by hyperband after {made} report{'s' * (made != 1)}"
            del self._of[trial]
            if trial is not current:
                tune_controller.stop_trial(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        self._tune = tune_controller
        pending = next((trial for trial in tune_controller.get_trials() if trial.status == Trial.PENDING), None)
        if pending is not None:
            return pending
        waiting = next((trial for trial in self._ready if trial.status == Trial.PAUSED), None)
        if waiting is None or self._busy() >= self._at_once:
            return None
        self._ready.remove(waiting)
        return waiting

    def debug_string(self) -> str:
        return "HyperBand"
