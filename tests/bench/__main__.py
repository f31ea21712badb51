"""`python -m tests.bench [--only P1] [--quick]`: exit status 0 if every goal is met, 1 if one is missed."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.bench import machine, report
from tests.bench.measures import Measurement, Setup
from tests.bench.registry import Figure, chosen, figures


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    known = figures()
    try:
        wanted = chosen(known, options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    found: list[Measurement] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ray-tracking-bench-", ignore_cleanup_errors=True) as scratch:
        machine.isolate(Path(scratch, "home"))
        for figure in wanted:
            print(f"{figure.name}  {figure.title}", file=sys.stderr, flush=True)
            try:
                found += _measure(figure, Setup(Path(scratch, figure.name), options.quick), options.output)
            except Exception:  # a figure that breaks is missed; the others are still wanted
                traceback.print_exc()
                failed.append(figure.name)
    print(report.table(found))
    for name in failed:
        print(f"{name} could not be measured: MISSED")
    print(f"JSON with all samples: {os.path.relpath(options.output)}")
    return 0 if not failed and all(measurement.is_met for measurement in found) else 1


def _measure(figure: Figure, setup: Setup, output: Path) -> list[Measurement]:
    state = machine.machine()
    setup.folder.mkdir()
    began = time.monotonic()
    measurements = figure.load()(setup)
    seconds = time.monotonic() - began
    report.write(
        output, report.document(figure.name, figure.title, measurements, state, quick=setup.quick, seconds=seconds)
    )
    return measurements


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure the figures of the design.")
    parser.add_argument("--only", action="append", default=[], metavar="P1", help="one figure; may be repeated")
    parser.add_argument("--quick", action="store_true", help="the short form: fewer blocks, wider spread")
    parser.add_argument("--output", type=Path, default=machine.ROOT / "bench-results", help="folder for the JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
