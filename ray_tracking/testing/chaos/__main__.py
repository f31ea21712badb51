"""The command line: see the package's docstring, which is its help."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.errors import RayTrackingError, UsageError
from ray_tracking.extras import require
from ray_tracking.runs.store import RunStore, new_run_id
from ray_tracking.storage import Storage
from ray_tracking.testing import chaos
from ray_tracking.testing.chaos.campaign import OUTAGE_SECONDS, Campaign
from ray_tracking.testing.chaos.command import EXAMPLE, TrainCommand, child_environment
from ray_tracking.testing.chaos.comparing import gather, last_step
from ray_tracking.testing.chaos.evidence import TIMES, Evidence, Ignored
from ray_tracking.testing.chaos.plan import BY_DEFAULT, GROUPS, Part, draw
from ray_tracking.testing.chaos.possible import choose, parts_of
from ray_tracking.testing.chaos.processes import check_system
from ray_tracking.testing.chaos.report import as_json, as_text
from ray_tracking.testing.chaos.scene import DISK_FOLDER, Scene

_LONGEST_SECONDS = 86_400.0
_PATIENCE_SECONDS = 300.0
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    options = _parser().parse_args(arguments)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # its reader tells of every resume
    try:
        evidence = _run(options)
    except RayTrackingError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("Interrupted; the run was ended.")
        return _INTERRUPTED
    text = json.dumps(as_json(evidence), indent=2) if options.json else as_text(evidence)
    sys.stdout.write(text + "\n")
    return 1 if evidence.shortcomings else 0


def _parser() -> argparse.ArgumentParser:
    described, _, _ = (chaos.__doc__ or "").partition("\n\nIn: ")
    parser = argparse.ArgumentParser(
        prog="python -m ray_tracking.testing.chaos",
        description=described,
        epilog="Exit status: 0 all equal, 1 not equal or not shown, 2 wrong usage or config, 3 can't be struck here.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("target", nargs="?", metavar="TARGET", help=f"module:function or path/file.py:function (default: {EXAMPLE})")
    add("--target", dest="target_option", metavar="TARGET", help="the same, as an option")
    add("-c", "--config", metavar="FILE", help="a YAML file over the defaults")
    add("--env", metavar="NAME", help="development, production or testing")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one config value, for both runs; repeatable")
    by_default = ",".join(BY_DEFAULT)
    kinds = f"what is struck, with commas between: {', '.join((*Part, *GROUPS))} (default: {by_default})"
    add("--kinds", default=by_default, metavar="KINDS", help=kinds)
    add("--times", type=_count, default=10, metavar="N", help="faults in all (default: 10)")
    add("--seed", type=int, default=0, metavar="N", help="of the random moments (default: 0)")
    away = f"for how long at most what is not killed is away (default: {OUTAGE_SECONDS:.0f})"
    add("--outage", type=_seconds, default=OUTAGE_SECONDS, metavar="SECONDS", help=away)
    add("--storage", metavar="URI", help="where both runs stay (default: a temporary folder, kept if they differ)")
    ignored = f"a metric whose values may differ, as a shell pattern; repeatable. Always: {', '.join(TIMES)}"
    add("--ignore", action="append", default=[], metavar="KEY", help=ignored)
    patience = f"for a run to log something new (default: {_PATIENCE_SECONDS:.0f})"
    add("--patience", type=_seconds, default=_PATIENCE_SECONDS, metavar="SECONDS", help=patience)
    add("--json", action="store_true", help="the evidence as JSON on standard output")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < _LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _run(options: argparse.Namespace) -> Evidence:
    """Both runs and what they show. Their output (and they themselves, without --storage) stays if all is not well."""
    check_system()
    require("ray", "ray", "torch")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started and mounted is to be gone then too
    if options.target is not None and options.target_option not in (None, options.target):
        raise UsageError("Two targets are given.", hint="Give TARGET once, alone or with --target.")
    scratch = Path(tempfile.mkdtemp(prefix="ray-tracking-chaos-"))
    evidence = None
    try:
        evidence = _runs(options, scratch)
    finally:
        left = list(scratch.glob("*.log"))
        if left and (evidence is None or evidence.shortcomings):
            _say(f"What the runs printed is kept in {scratch}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    return evidence


def _runs(options: argparse.Namespace, scratch: Path) -> Evidence:
    named, grouped = parts_of(options.kinds)
    wants_disk = Part.DISK in (*named, *grouped) and options.storage is None
    uri = options.storage or str(scratch / (DISK_FOLDER if wants_disk else "runs"))
    command = TrainCommand.of(
        options.target or options.target_option,
        options.config,
        options.env,
        options.set,
        storage=uri,
        times=options.times,
    )
    config = command.config()
    storage = Storage.open(config.storage)
    parts, left_out = choose(named, grouped, config, storage, own_storage=options.storage is None)
    for part, why in left_out.items():
        _say(f"left out: {part.value}: {why}")
    keyring = Keyring.from_config(config.training.default.encryption)
    _say(f"{options.times} faults of: {', '.join(parts)}; seed {options.seed}")
    with Scene(command, config, parts, child_environment(os.environ), scratch) as scene:
        storage.probe()
        try:
            evidence = _compare(options, parts, scene, storage, keyring, new_run_id(config.name), scratch)
        except BaseException:
            scene.keep(scratch / "runs")
            raise
        if evidence.shortcomings:
            scene.keep(scratch / "runs")
    return evidence


def _compare(
    options: argparse.Namespace,
    parts: Sequence[Part],
    scene: Scene,
    storage: Storage,
    keyring: Keyring | None,
    name: str,
    logs: Path,
) -> Evidence:
    campaign = Campaign(scene, storage, logs, _say, patience=options.patience, away=options.outage, keyring=keyring)
    undisturbed, killed = f"{name}-undisturbed", f"{name}-killed"
    campaign.run(undisturbed)
    runs = RunStore(storage)
    steps = last_step(runs.directory(undisturbed))
    hits = campaign.run(killed, draw(parts, options.times, steps, options.seed))
    return gather(
        runs,
        undisturbed,
        killed,
        hits,
        wanted=options.times,
        seed=options.seed,
        ignored=Ignored((*TIMES, *options.ignore)),
        keyring=keyring,
        synced=campaign.synced,
    )


def _say(text: str) -> None:
    """Progress and errors, on stderr: what is shown stands alone on stdout."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
