"""When trials and the sweep end early: Ray Tune's schedulers, our own rules, and the reason kept for people."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune import Stopper
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from ray_tracking.config.sweep import POPULATIONS, StopConfig, SweepConfig
from ray_tracking.runtime.sweep.hyperband import Arrived, HyperBand
from ray_tracking.runtime.sweep.population import Exploited, ModelledPopulation, Population
from ray_tracking.runtime.sweep.reporting import REPORTS

_NO_LIMIT = 1_000_000


class Reasons:
    """Why trials were ended before their time, by Tune's id; and why the sweep was, None if it was not."""

    def __init__(self) -> None:
        self.trials: dict[str, str] = {}
        self.sweep: str | None = None


def make_scheduler(
    search: SweepConfig,
    metric: str,
    mode: str,
    reasons: Reasons,
    *,
    seed: int,
    exploited: Exploited,
    total: int,
    at_once: int,
    arrived: Arrived,
) -> TrialScheduler:
    """The scheduler, which notes in `reasons` whom it ends. `exploited`: see `population`; `arrived`: see `hyperband`.
    `total`: trials of this session.
    """
    config = search.scheduler
    scheduler: TrialScheduler
    if config.name in POPULATIONS:
        kind = Population if config.name == "pbt" else ModelledPopulation
        return kind(config, search.tree(), metric, mode, seed, exploited)
    if config.name == "hyperband":
        return HyperBand(config, metric, mode, reasons.trials, total=total, at_once=at_once, arrived=arrived)
    if config.name == "asha":
        scheduler = AsyncHyperBandScheduler(
            time_attr=REPORTS,
            metric=metric,
            mode=mode,
            max_t=config.max_reports or _NO_LIMIT,
            grace_period=config.grace_reports or 1,
            reduction_factor=config.reduction_factor or 3,
        )
    elif config.name == "median":
        scheduler = MedianStoppingRule(
            time_attr=REPORTS,
            metric=metric,
            mode=mode,
            grace_period=config.grace_reports or 1,
            min_samples_required=3,
            # It would pause trials in favour of waiting ones. (Annotated int, used in a comparison alone.)
            min_time_slice=float("inf"),  # type: ignore[arg-type]
        )
    else:
        return FIFOScheduler()
    decide: Callable[..., str] = scheduler.on_trial_result

    def on_trial_result(controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = decide(controller, trial, result)
        if decision == TrialScheduler.STOP and not result.get("done"):
            reports = result.get(REPORTS, 0)
            reasons.trials[trial.trial_id] = f"stopped by {config.name} after {reports} report{'s' * (reports != 1)}"
        return decision

    scheduler.on_trial_result = on_trial_result  # type: ignore[method-assign, assignment]
    return scheduler


class StopRules(Stopper):
    """`sweep.stop`. `since_gain` gives the number of trials that have ended since the last new best."""

    def __init__(
        self, config: StopConfig, metric: str, mode: str, reasons: Reasons, since_gain: Callable[[], int]
    ) -> None:
        self._config = config
        self._metric = metric
        self._sign = 1.0 if mode == "min" else -1.0
        self._reasons = reasons
        self._since_gain = since_gain
        self._end = None if config.seconds is None else time.monotonic() + config.seconds
        self._best: dict[str, tuple[float, int]] = {}
        """By trial: the best value so far, sign turned so that less is better, and at which report."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        value, reports = result.get(self._metric), result.get(REPORTS)
        if value is None or reports is None or result.get("done"):
            return False
        reason = self._of_trial(trial_id, self._sign * value, reports)
        if reason:
            self._reasons.trials[trial_id] = reason
        return reason is not None

    def _of_trial(self, trial_id: str, value: float, reports: int) -> str | None:
        if self._config.reports is not None and reports >= self._config.reports:
            return f"stopped after {reports} reports, as sweep.stop.reports says"
        patience = self._config.plateau_reports
        if patience is None:
            return None
        best, at = self._best.get(trial_id, (float("inf"), reports))
        if value < best - self._config.plateau_min_delta:
            best, at = value, reports
        self._best[trial_id] = best, at
        return f"stopped: no better in {reports - at} reports" if reports - at >= patience else None

    def stop_all(self) -> bool:
        if self._reasons.sweep is None:
            self._reasons.sweep = self._of_sweep()
        return self._reasons.sweep is not None

    def _of_sweep(self) -> str | None:
        if self._end is not None and time.monotonic() >= self._end:
            return f"the sweep's {self._config.seconds:g} s are over"
        limit = self._config.trials_without_gain
        if limit is not None and self._since_gain() >= limit:
            return f"no new best in {limit} trials"
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {}
