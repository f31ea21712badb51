"""The evidence as text for people and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ray_tracking.testing.chaos.evidence import Difference, Evidence, Recovery

_FAULTS = ("fault", "of", "after step", "restored", "repeated", "new step after", "checkpoints")
_RIGHT = frozenset({"fault", "after step", "restored", "repeated", "new step after", "compared"})


def as_text(evidence: Evidence) -> str:
    """Two short tables and a verdict."""
    faults = [_fault(recovery) for recovery in evidence.recoveries]
    lines = [
        f"Faults: {evidence.hits} of {evidence.wanted} while training went on "
        f"({evidence.steps} steps, {evidence.attempts} attempts, seed {evidence.seed})",
        *table(_FAULTS, faults),
        "",
        "Against the run that was left alone",
        *table(("what", "compared", "", "lost", "doubled", "changed"), [_difference(e) for e in evidence.differences]),
    ]
    if evidence.ignored:
        lines += ["", f"Values not compared, as they measure time: {', '.join(evidence.ignored)}"]
    if evidence.synced:
        lines += ["", f"Not complete when the run ended, filled by `ray-tracking sync`: {', '.join(evidence.synced)}"]
    shortcomings = evidence.shortcomings
    lines += ["", *(f"- {shortcoming}" for shortcoming in shortcomings)]
    lines.append("NOT SHOWN to be equal." if shortcomings else _verdict(evidence))
    return "\n".join(lines)


def as_json(evidence: Evidence) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "equal": not evidence.shortcomings,
        "shortcomings": evidence.shortcomings,
        "run_id": evidence.run_id,
        "undisturbed": evidence.undisturbed,
        "seed": evidence.seed,
        "faults": {"wanted": evidence.wanted, "while_training": evidence.hits},
        "steps": evidence.steps,
        "attempts": evidence.attempts,
        "steps_repeated": sum(recovery.repeated for recovery in evidence.recoveries),
        "recoveries": [asdict(each) | {"while_training": each.while_training} for each in evidence.recoveries],
        "compared": [asdict(each) | {"equal": each.is_equal} for each in evidence.differences],
        "ignored": list(evidence.ignored),
        "synced": list(evidence.synced),
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the names first."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    right = [name in _RIGHT or name in ("lost", "doubled", "changed") for name in columns]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in (columns, *rows)
    ]


def _fault(recovery: Recovery) -> tuple[str, ...]:
    restarted = recovery.restored is not None
    if recovery.problems:
        checkpoints = f"{recovery.complete} complete, {len(recovery.problems)} problems"
    else:
        checkpoints = f"{recovery.complete} complete, all verify"
    away = None if recovery.outage is None else f"away {recovery.outage:.0f} s"
    more = [text for text in (recovery.victim, away, recovery.noticed) if text]
    return (
        str(recovery.number),
        f"{recovery.part} ({', '.join(more)})" if more else recovery.part,
        str(recovery.step),
        str(recovery.restored) if restarted else "-",
        str(recovery.repeated) if restarted else "-",
        "never" if recovery.seconds is None else f"{recovery.seconds:.1f} s",
        checkpoints,
    )


def _difference(difference: Difference) -> tuple[str, ...]:
    if difference.skipped is not None:
        return difference.what, "-", f"not read back: {difference.skipped}", "-", "-", "-"
    unit = difference.unit + (f", {difference.size:,} bytes" if difference.size is not None else "")
    counts = (difference.lost, difference.doubled, difference.changed)
    return difference.what, f"{difference.compared:,}", unit, *map(str, counts)


def _verdict(evidence: Evidence) -> str:
    tensors = sum(each.compared for each in evidence.differences if each.unit == "tensors")
    size = sum(each.size or 0 for each in evidence.differences)
    repeated = sum(recovery.repeated for recovery in evidence.recoveries)
    return (
        f"Equal bit for bit: {tensors} tensors ({size:,} bytes) and all records; "
        f"none lost, none doubled; {repeated} steps repeated."
    )
