"""Several hosts on one machine: each has its own address, processes, host name, shared memory and Ray folder.

In: how many. Out: `Host`s on which commands run; one can be killed, cut off from the network, healed and booted again.
Made of Linux namespaces, which needs root, iproute2 and util-linux: `why_not()` says what is missing. What all hosts
see of the file system is the machine's own, as it was when the host was booted: shared storage, but for `hide`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

RAY_TRACKING = (sys.executable, "-m", "ray_tracking")
"""How commands of ours begin, on a host and outside."""
PORT = 6379
DASHBOARD_PORT = 8265
_STORE_BYTES = 100_000_000
_TOOLS = ("ip", "unshare", "nsenter", "mount", "env")
_BOOT_SECONDS = 20.0
_RAY_SECONDS = 240.0
_RAY_TRIES = 4
_INTERFACE = "e0"
_INIT = """set -e
hostname "$1"
mount -t tmpfs none /dev/shm
mount -t tmpfs none "$2"
mount --bind "$3" /etc/hosts
for path in $4; do mount -t tmpfs none "$path"; done
echo up
exec sleep infinity"""


class HostError(Exception):
    """Something that must work for the test to mean anything did not."""


class Host:
    """One of the hosts of a `Network`. `folder` takes what its commands print."""

    def __init__(self, network: Network, number: int) -> None:
        self.number = number
        self.address = f"{network.subnet}.{number}"
        self.name = f"{network.prefix}-{number}"
        self.hidden: list[Path] = []
        self.boots = 0
        self._network = network
        self._link = f"{network.prefix}v{number}"
        self._machine: subprocess.Popen[str] | None = None
        self._init = 0
        self._ran = 0

    def boot(self) -> None:
        """Like a machine that is switched on: nothing runs on it, its shared memory and Ray folder are empty."""
        assert self._machine is None, f"{self.name} is up"
        hidden = " ".join(str(path) for path in self.hidden)
        script = ["sh", "-c", _INIT, "sh", self.name, str(self._network.ray_folder), str(self._network.names), hidden]
        namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "--ipc"]
        self._machine = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *namespaces, *script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._machine.stdout is not None
        said = self._machine.stdout.readline()
        if said.strip() != "up":
            said += self._machine.stdout.read()
            raise HostError(f"{self.name} does not come up: {said.strip()}")
        self.boots += 1
        children = Path(f"/proc/{self._machine.pid}/task/{self._machine.pid}/children").read_text().split()
        self._init = int(children[0])

    @property
    def is_up(self) -> bool:
        return self._machine is not None

    def kill(self) -> None:
        """Like the power cord pulled: every process on it is gone at once, without a word."""
        if self._machine is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)  # the first process of its namespace: the kernel ends all others
        self._machine.wait(_BOOT_SECONDS)
        assert self._machine.stdout is not None
        self._machine.stdout.close()
        self._machine = None

    def cut(self) -> None:
        """Off the network: nothing gets through, no connection is told."""
        _ip("link", "set", self._link, "down")

    def heal(self) -> None:
        _ip("link", "set", self._link, "up")

    def hide(self, path: Path) -> None:
        """From its next boot on, this host has an empty folder of its own there."""
        self.hidden.append(path)

    def processes(self) -> list[int]:
        """The ids, as the machine counts them, of what runs on it."""
        done = _ip("netns", "pids", self.name)
        return [int(pid) for pid in done.split()]

    # --- commands -----------------------------------------------------------------------------------------------

    def start(self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Running:
        """Start a command on it. Its output goes to a file: `Running.printed`."""
        assert self._machine is not None, f"{self.name} is down"
        self._ran += 1
        output = self._network.folder / f"{self.name}-{self._ran}.log"
        enter = ["nsenter", "-t", str(self._init), "-n", "-m", "-p", "-u", "-i", "--"]
        place = ["env", "-C", str(cwd or self._network.folder)]
        return Running([*enter, *place, *words], {**self._network.environment, **(env or {})}, output)

    def run(
        self, *words: str, timeout: float = 60.0, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Running:
        """Run a command to its end, whatever its status."""
        return self.start(*words, env=env, cwd=cwd).wait(timeout)

    def start_head(self, *, cpus: int = 0) -> None:
        """Ray's head, with dashboard and Jobs API on its address. The host is booted anew if Ray needs more than 30 s,
        which it gives up after, however busy the machine is.
        """
        self._ray("--head", f"--port={PORT}", f"--dashboard-host={self.address}", f"--num-cpus={cpus}")

    def join(self, head: Host, *, cpus: int = 1) -> None:
        """A Ray node that offers `cpus`. Boots anew as `start_head` does."""
        self._ray(f"--address={head.address}:{PORT}", f"--num-cpus={cpus}")

    def _ray(self, *options: str) -> None:
        own = (f"--node-ip-address={self.address}", f"--object-store-memory={_STORE_BYTES}", "--disable-usage-stats")
        words = (sys.executable, "-m", "ray.scripts.scripts", "start", *own, *options)
        for _ in range(_RAY_TRIES):
            done = self.run(*words, timeout=_RAY_SECONDS)
            if done.status == 0:
                return
            self.kill()
            self.boot()
        raise HostError(f"Ray does not start on {self.name}:\n{done.printed}")

    @property
    def ray_address(self) -> str:
        """For `--address`, if it is the head."""
        return f"{self.address}:{PORT}"

    @property
    def jobs_address(self) -> str:
        """Of the Jobs API, if it is the head."""
        return f"http://{self.address}:{DASHBOARD_PORT}"


class Running:
    """A started command; if it is on a host, killing the host ends it."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
        self._words = words
        self._output = output
        self.seconds = 0.0
        """How long `wait` took."""
        with output.open("wb") as stream:
            self._popen = subprocess.Popen(
                words,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def status(self) -> int | None:
        """None while it runs."""
        return self._popen.poll()

    @property
    def printed(self) -> str:
        return self._output.read_text(errors="replace")

    def wait(self, timeout: float) -> Running:
        """Until it has ended. Raises HostError with what it printed if it does not in time."""
        begun = time.monotonic()
        try:
            self._popen.wait(timeout)
            return self
        except subprocess.TimeoutExpired:
            self.end()
            command = " ".join(self._words)
            raise HostError(f"still running after {timeout:.0f} s: {command}\n{self.printed}") from None
        finally:
            self.seconds = time.monotonic() - begun

    def end(self) -> None:
        """SIGKILL for the command and what is still in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(_BOOT_SECONDS)


class Network:
    """`hosts` on one bridge, with addresses of a subnet that this machine does not use. Use `network()`.

    `environment`: of every command, with Ray's token authentication; the token stands in `token`. `folder` takes what
    commands print.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.prefix = f"rt{secrets.token_hex(3)}"
        self.subnet = _free_subnet()
        self.folder = folder
        self.ray_folder = Path("/tmp") / self.prefix  # short: the paths of Ray's sockets must be
        self.names = folder / "hosts"
        self.token = folder / "token"
        self.hosts = [Host(self, number) for number in range(1, count + 1)]
        self._outside = 0
        kept = ("PATH", "LANG", "PYTHONPATH", "VIRTUAL_ENV")
        self.environment = {
            **{name: os.environ[name] for name in kept if name in os.environ},
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONUNBUFFERED"), "1"),
            # what S3 servers of tests need, in Ray's own processes on every host too
            **dict.fromkeys(("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"), "when_required"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "COLUMNS": "200",
            "DO_NOT_TRACK": "true",
            "GLOO_SOCKET_IFNAME": _INTERFACE,
            "HOME": str(folder / "home"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_TMPDIR": str(self.ray_folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "WANDB_MODE": "offline",
        }

    def up(self) -> None:
        self.ray_folder.mkdir()
        (self.folder / "home").mkdir(exist_ok=True)
        self.token.touch(0o600)
        self.token.write_text(secrets.token_hex(32))
        own = "".join(f"{host.address} {host.name}\n" for host in self.hosts)
        self.names.write_text(f"127.0.0.1 localhost\n{own}")
        _ip("link", "add", self.prefix, "type", "bridge")
        _ip("addr", "add", f"{self.here}/24", "dev", self.prefix)
        _ip("link", "set", self.prefix, "up")
        for host in self.hosts:
            _ip("netns", "add", host.name)
            _ip("link", "add", host._link, "type", "veth", "peer", "name", _INTERFACE, "netns", host.name)
            _ip("link", "set", host._link, "master", self.prefix, "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", _INTERFACE)
            _ip("-n", host.name, "link", "set", _INTERFACE, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.boot()

    @property
    def here(self) -> str:
        """The machine's own address on the bridge, as hosts reach it."""
        return f"{self.subnet}.254"

    def start_outside(self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Running:
        """Start a command on none of the hosts, but where it reaches all of them: a laptop that submits."""
        self._outside += 1
        output = self.folder / f"outside-{self._outside}.log"
        place = ("env", "-C", str(cwd or self.folder))
        return Running([*place, *words], {**self.environment, **(env or {})}, output)

    @contextlib.contextmanager
    def forwarded(self, port: int) -> Iterator[int]:
        """What listens on this machine's loopback, for the hosts: at `here` and the port that is given."""
        with socket.create_server((self.here, 0)) as listening:
            threading.Thread(target=_forward, args=(listening, port), daemon=True).start()
            yield listening.getsockname()[1]

    def kill_all(self) -> None:
        """Every host at once, as far as one command after the other is that."""
        for host in self.hosts:
            host.kill()

    def down(self) -> None:
        """Whatever `up` came to."""
        self.kill_all()
        for host in self.hosts:
            _ip("netns", "del", host.name, check=False)
            _ip("link", "del", host._link, check=False)
        _ip("link", "del", self.prefix, check=False)
        shutil.rmtree(self.ray_folder, ignore_errors=True)


@contextlib.contextmanager
def network(count: int, folder: Path) -> Iterator[Network]:
    """`count` hosts that are up; gone afterwards, with all that runs on them."""
    made = Network(count, folder)
    try:
        made.up()
        yield made
    finally:
        made.down()


@contextlib.contextmanager
def shared_storage(path: Path) -> Iterator[Path]:
    """A disk of its own at `path`, as a share that hosts booted from now on have mounted: the root file system is no
    place that several hosts could share, and is refused as one."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@functools.cache
def why_not() -> str | None:
    """Why hosts can't be made here, None if they can: tried with a namespace that is removed at once."""
    if not sys.platform.startswith("linux"):
        return "several hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "several hosts need root, for network namespaces"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"several hosts need {', '.join(missing)} (packages iproute2 and util-linux)"
    name = f"rt{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "bridge")
        inner = ["unshare", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "mount", "-t", "tmpfs", "none", "/mnt"]
        subprocess.run(["ip", "netns", "exec", name, *inner], check=True, capture_output=True, text=True)
    except (HostError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"namespaces can't be made here: {said.strip()}"
    finally:
        _ip("netns", "del", name, check=False)
        _ip("link", "del", name, check=False)
    return None


def _forward(listening: socket.socket, port: int) -> None:
    """Connect each caller with the loopback port, until the socket is closed."""
    while True:
        try:
            caller, _ = listening.accept()
            called = socket.create_connection(("127.0.0.1", port))
        except OSError:
            return
        for ends in ((caller, called), (called, caller)):
            threading.Thread(target=_copy, args=ends, daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _free_subnet() -> str:
    """The first three numbers of a /24 that no interface of this machine is in."""
    links = json.loads(_ip("-j", "-4", "addr"))
    used = {each["local"].rpartition(".")[0] for link in links for each in link["addr_info"]}
    dice = random.SystemRandom()
    while (found := f"10.{dice.randrange(128, 192)}.{dice.randrange(256)}") in used:
        pass
    return found


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise HostError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
