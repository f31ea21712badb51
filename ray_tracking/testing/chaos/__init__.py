"""Chaos as a command: kill a run again and again, and show that it ends like one that was never killed.

    python -m ray_tracking.testing.chaos [TARGET] [-c CONFIG] [--set k=v ...] [--kill PART ...] [--times N] [--json]

runs TARGET (default: the tiny GPT of the examples) twice with the same settings, through `ray-tracking train`, each
time on a private Ray cluster of this machine. The first run is left alone. In the second one, parts get SIGKILL at
random moments of the training:

    worker    a worker process, whichever; Ray starts the group again
    tracker   the tracker actor, which journals and fills the backends; Ray starts it again
    writer    the process that writes a worker's checkpoints; the worker starts it again
    driver    the command and its whole private cluster at once; the same command is started again

Then the two are compared, bit for bit: every tensor and value of the last checkpoint of every rank, every record of
the effective history, and what each backend shows, read by its own client. The exit status is 0 only if every kill
hit while training went on and all is equal.

For your own function the steps must be repeatable: seeds from `run.config.seed`, no time in what is computed, and
everything that training changes given to `run.restore`. What measures time is named with `--ignore 'KEY'`.

In: a target and settings, as `ray-tracking train` takes them. Out: the evidence, as tables or JSON. Needs /proc.
May import everything below `runtime`; Ray runs only in the child processes.
"""
