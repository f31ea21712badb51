"""Chaos as a command: break a run again and again, and show that it ends like one that was left alone.

    python -m ray_tracking.testing.chaos [TARGET] [-c CONFIG] [--set k=v ...] [--kinds A,B ...] [--times N] [--seed N]

trains TARGET (default: the tiny GPT of the examples) twice with the same settings, through `ray-tracking train`. The
first run is left alone. In the second one, faults come at random moments of the training, drawn from the seed.
What --kinds can name; these get SIGKILL:

    worker       a worker process, whichever; Ray starts the group again
    tracker      the tracker actor, which journals and fills the backends; Ray starts it again
    writer       the process that writes a worker's checkpoints; the worker starts it again
    driver       the command itself (and its private cluster); the same command is started again
    node         a Ray node with a worker on it, all its processes at once; the run goes on with the nodes left
    head         the whole cluster at once, head, nodes and command; `ray-tracking resume` goes on on a new one

These are taken away, until the run feels it or for --outage seconds, and then given back:

    mlflow       MLflow's real server is killed and started again
    tensorboard  the folder of its event files is away, a file stands in its place
    wandb        the same with W&B's folder, and its service is killed
    disk         no space is left on the disk that holds the runs (a tmpfs of their own; needs root)

`backend` stands for those of the three backends that the run uses, `all` for everything that can be struck here; what
can't is said. Asked for by its own name, it is refused. Default: worker,tracker,driver,writer.

Each run has a private Ray cluster of this machine; with node or head it is one of several nodes: a head without CPUs,
one node per worker, and one to spare.

Then the two runs are compared, bit for bit: every tensor and value of the last checkpoint of every rank, every record
of the effective history, and what each backend shows, read by its own client. The exit status is 0 only if every fault
hit while training went on, each outage was felt, and all is equal.

For your own function (`mine.py:train -c mine.yaml`) the steps must be repeatable: seeds from `run.config.seed`, no time
in what is computed, and everything that training changes given to `run.restore`. What measures time is named with
`--ignore 'KEY'`.

In: a target and settings, as `ray-tracking train` takes them. Out: the evidence, as tables or JSON. Needs /proc.
May import everything below `runtime`; Ray runs only in the child processes.
"""
