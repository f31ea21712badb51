"""The command line: see the package's docstring, which is its help."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.errors import RayTrackingError
from ray_tracking.extras import require
from ray_tracking.runs.store import RunStore, new_run_id
from ray_tracking.storage import Storage
from ray_tracking.testing import chaos
from ray_tracking.testing.chaos.campaign import Campaign
from ray_tracking.testing.chaos.command import EXAMPLE, TrainCommand
from ray_tracking.testing.chaos.comparing import gather, last_step
from ray_tracking.testing.chaos.evidence import TIMES, Evidence, Ignored
from ray_tracking.testing.chaos.plan import Part, draw
from ray_tracking.testing.chaos.processes import check_system
from ray_tracking.testing.chaos.report import as_json, as_text

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
        epilog="Exit status: 0 all equal, 1 not equal or not shown, 2 wrong usage or config.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("target", nargs="?", metavar="TARGET", help=f"module:function or path/file.py:function (default: {EXAMPLE})")
    add("-c", "--config", metavar="FILE", help="a YAML file over the defaults")
    add("--env", metavar="NAME", help="development, production or testing")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one config value, for both runs; repeatable")
    parts = ", ".join(Part)
    add("--kill", action="append", type=_part, metavar="PART", help=f"{parts}; repeatable (default: all of them)")
    add("--times", type=_count, default=10, metavar="N", help="kills in all (default: 10)")
    add("--seed", type=int, default=0, metavar="N", help="of the random moments (default: 0)")
    add("--storage", metavar="URI", help="where both runs stay (default: a temporary folder, kept if they differ)")
    ignored = f"a metric whose values may differ, as a shell pattern; repeatable. Always: {', '.join(TIMES)}"
    add("--ignore", action="append", default=[], metavar="KEY", help=ignored)
    patience = f"for a run to log something new (default: {_PATIENCE_SECONDS:.0f})"
    add("--patience", type=float, default=_PATIENCE_SECONDS, metavar="SECONDS", help=patience)
    add("--json", action="store_true", help="the evidence as JSON on standard output")
    return parser


def _part(text: str) -> Part:
    if text not in list(Part):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(Part)}")
    return Part(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _run(options: argparse.Namespace) -> Evidence:
    """Both runs and what they show. Their output (and they themselves, without --storage) stays if all is not well."""
    check_system()
    require("ray", "ray", "torch")
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
    uri = options.storage or str(scratch / "runs")
    command = TrainCommand.of(
        options.target, options.config, options.env, options.set, storage=uri, times=options.times
    )
    config = command.config()
    storage = Storage.open(config.storage)
    storage.probe()
    keyring = Keyring.from_config(config.training.default.encryption)
    campaign = Campaign(command.start, storage, scratch, _say, patience=options.patience, keyring=keyring)

    name = new_run_id(config.name)
    undisturbed, killed = f"{name}-undisturbed", f"{name}-killed"
    campaign.run(undisturbed)
    runs = RunStore(storage)
    steps = last_step(runs.directory(undisturbed))
    strikes = draw(options.kill or list(Part), options.times, steps, options.seed)
    hits = campaign.run(killed, strikes)
    return gather(
        runs,
        undisturbed,
        killed,
        hits,
        wanted=options.times,
        seed=options.seed,
        ignored=Ignored((*TIMES, *options.ignore)),
        keyring=keyring,
    )


def _say(text: str) -> None:
    """Progress and errors, on stderr: what is shown stands alone on stdout."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
