"""`ray-tracking doctor`: what is wrong with this machine's set-up, and how to put it right."""

from __future__ import annotations

import typer

from ray_tracking.cli.options import (
    Address,
    ConfigFile,
    Debug,
    Environment,
    Json,
    Settings,
    StorageUri,
    load_config,
    overrides_of,
)


def doctor(
    config: ConfigFile = None,
    env: Environment = None,
    settings: Settings = None,
    storage: StorageUri = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check versions, backends, logins, storage, Ray, permissions.

    Each finding comes with its fix. Exit status 1 if there is a problem.
    """
    from ray_tracking.cli import output
    from ray_tracking.monitoring.doctor import examine

    resolved = load_config(config, env, overrides_of(settings, storage))
    findings = examine(resolved, address=address, config_file=config)
    problems = sum(finding.level == "problem" for finding in findings)
    if as_json:
        output.print_json([finding.to_json() for finding in findings])
    else:
        screen = output.console()
        rows = [(finding.level, finding.check, finding.found) for finding in findings]
        screen.print(output.table("", ("", "check", "found"), rows))
        for finding in findings:
            if finding.fix:
                screen.print()
                screen.print(output.cell(f"{finding.level}: {finding.check}"))
                screen.print(output.cell(f"  {finding.fix}"))
        warnings = sum(finding.level == "warning" for finding in findings)
        screen.print()
        screen.print(output.cell(f"{problems} problems, {warnings} warnings, {len(findings)} checks."))
    if problems:
        raise typer.Exit(1)
