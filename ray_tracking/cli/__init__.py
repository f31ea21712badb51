"""The command line `ray-tracking`: one file per command group.

In: arguments. Out: what the packages below answer, as text or JSON, and an exit status.
May import everything;
at module top only typer, rich and the light modules (errors, options), so that `--help` stays quick.
"""
