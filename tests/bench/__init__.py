"""The figures the package must reach, measured: `python -m tests.bench` (or `make bench`).

One file per figure, `p<number>_<subject>.py`, found by its name: its docstring's first line is its title, and
`measure(setup) -> list[Measurement]` takes both sides of each ratio in turns, in one run. The runner prints the results
beside their goals and writes JSON.
"""
