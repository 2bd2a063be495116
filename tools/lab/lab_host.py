"""One pretended machine: a set of Linux namespaces around a process that is its init.

It shares this machine's filesystem, so that the same virtual environment and run folder are visible on every host, but
has its own host name, process table, /etc/hosts and /dev/shm, and with `own_network` its own network. All of it lives
and dies with the init process: nothing is mounted, named or edited outside, and killing init is a power-off.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BOOT_SECONDS = 60.0
POWER_OFF_SECONDS = 60.0
FOLDER_CHARACTERS = 60  # of the 107 that the path of a socket may have
MARK = "lab.json"  # a folder with this file in it belongs to a lab, which may delete it


class LabError(Exception):
    """The lab cannot do what was asked; the message says why and what to do."""


@dataclass(frozen=True)
class Host:
    """A pretended machine. `folder` holds its state; `setup` are shell lines run before its services start."""

    name: str
    address: str
    folder: Path
    own_network: bool = False
    setup: tuple[str, ...] = ()

    @property
    def init(self) -> int | None:
        """Process id, as seen from outside, of this host's init; None while it is powered off."""
        try:
            pid, start = json.loads((self.folder / "init.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return pid if start_ticks(pid) == start else None

    def boot(self, hosts_file: str, services: Sequence[Sequence[str]]) -> None:
        """Start init and the services under it. Their output goes to `<program>.log` in the host's folder.

        Args:
            hosts_file: content of its /etc/hosts.
            services: command lines of daemons that stay in the foreground; an empty list makes a host that only waits.

        Raises:
            LabError: init did not come up; with what it printed.
        """
        assert self.init is None, f"{self.name} runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "hosts").write_text(hosts_file)
        (self.folder / "hostname").write_text(f"{self.name}\n")
        ready = self.folder / "init.pid"
        ready.unlink(missing_ok=True)
        (self.folder / "init.sh").write_text(init_script(self, services))
        # slave: what the outside mounts later shows up in here, and never the other way round
        namespaces = [
            "--mount",
            "--propagation=slave",
            "--uts",
            "--ipc",
            "--pid",
            *(["--net"] if self.own_network else []),
        ]
        with (self.folder / "boot.log").open("wb") as log:
            # `setsid --fork` hands the process to this machine's own init, so that whoever started it need not reap it
            command = ["setsid", "--fork", "unshare", *namespaces, "--fork", "sh", f"{self.folder}/init.sh"]
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", check=True)
        if not wait_for(ready.exists, BOOT_SECONDS):
            raise LabError(f"{self.name} did not start:\n{(self.folder / 'boot.log').read_text()}")
        pid = int(ready.read_text())
        (self.folder / "init.json").write_text(json.dumps([pid, start_ticks(pid)]))

    def power_off(self) -> None:
        """End every process of this host at once, as a power cut does, and return when none is left."""
        pid = self.init
        if pid is None:
            return
        os.kill(pid, signal.SIGKILL)  # the kernel ends a process table with its init
        if not wait_for(lambda: self.init is None, POWER_OFF_SECONDS):
            raise LabError(
                f"{self.name} (process {pid}) survives SIGKILL; is one of its processes stuck in the kernel?"
            )

    def kill_processes(self, with_variable: str) -> None:
        """Kill those of this host's processes that were started with an environment variable of that name."""
        if self.init is None:
            return
        table = Path(f"/proc/{self.init}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile, or is not for us to look at, and so none of this host's
                if (process / "ns" / "pid").readlink() == table:
                    environment = (process / "environ").read_bytes().split(b"\0")
                    if any(entry.startswith(f"{with_variable}=".encode()) for entry in environment):
                        os.kill(int(process.name), signal.SIGKILL)

    def entering(self, argv: Sequence[str], cwd: Path) -> list[str]:
        """The command line that runs `argv` on this host, in folder `cwd`."""
        pid = self.init
        if pid is None:
            raise LabError(f"{self.name} is powered off; boot it first")
        network = ["--net"] if self.own_network else []
        within = ["--mount", "--uts", "--ipc", "--pid", *network, f"--wdns={cwd}"]
        return ["nsenter", f"--target={pid}", *within, "--", *argv]


def init_script(host: Host, services: Sequence[Sequence[str]]) -> str:
    """The shell script that is a host's init: mounts, services, then waiting, which also reaps orphans."""
    folder = shlex.quote(str(host.folder))
    started = [f"{shlex.join(argv)} >>{folder}/{Path(argv[0]).name}.log 2>&1 &" for argv in services]
    lines = [
        "set -eu",
        # /proc is still the outer one: there this shell has the number by which the outside can kill it
        "read -r pid rest </proc/self/stat",
        f"hostname {shlex.quote(host.name)}",
        "mount -t proc proc /proc",
        "mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm",
        f"mount --bind {folder}/hosts /etc/hosts",
        f"mount --bind {folder}/hostname /etc/hostname",
        *host.setup,
        *started,
        f"echo $pid >{folder}/init.new",
        f"mv {folder}/init.new {folder}/init.pid",
        "sleep infinity &",
        "wait",
    ]
    return "\n".join(lines)


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with its id, its identity. None if it is gone or a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18])


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def run_command(
    argv: Sequence[str], timeout_seconds: float, env: dict[str, str] | None = None, *, check: bool
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output is text. After the timeout it and its children are ended (exit code 124).

    Raises:
        LabError: with `check`, the exit code is not 0; with its standard error.
    """
    # `timeout` rather than subprocess's own, which would end nsenter but not what nsenter started
    limited = ["timeout", "--kill-after=2", str(timeout_seconds), *argv]
    done = subprocess.run(limited, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        what = f"`{shlex.join(argv)}` ended with exit code {done.returncode}"
        raise LabError(f"{what}: {done.stderr.strip() or done.stdout.strip()}")
    return done


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Hold the labs beside `folder` for oneself: two commands never change one lab at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # the folder above is what gets locked: it is there before the lab and after it, and no lock file is left
    above = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(above, fcntl.LOCK_EX)
        yield
    finally:
        os.close(above)


def read_mark(folder: Path, kind: str) -> dict[str, int] | None:
    """The settings that the lab in `folder` was started with; None if there is none.

    Raises:
        LabError: the folder holds another kind of lab, or something else.
    """
    mark = folder / MARK
    if mark.exists():
        found = json.loads(mark.read_text())
        if found["kind"] == kind:
            return dict(found["settings"])
        raise LabError(f"{folder} holds a lab of kind {found['kind']}, not {kind}; choose another --run-dir")
    if folder.exists() and any(folder.iterdir()):
        raise LabError(f"{folder} is not empty and no lab; choose another --run-dir")
    return None


def check_folder(folder: Path) -> None:
    """Refuse a folder for a new lab that a daemon could not work in.

    Raises:
        LabError: a name too long for sockets or with characters special to configuration files, or hidden from hosts.
    """
    hidden = [place for place in ("/run", "/dev/shm", "/proc") if folder.is_relative_to(place)]
    if hidden:
        raise LabError(f"{folder}: every host of a lab has a {hidden[0]} of its own; choose another --run-dir")
    if len(str(folder)) > FOLDER_CHARACTERS or not re.fullmatch(r"[\w./-]+", str(folder), re.ASCII):
        limits = f"at most {FOLDER_CHARACTERS} characters, of a-z A-Z 0-9 . / _ -"
        raise LabError(
            f"{folder}: the path must have {limits}, for the daemons' sockets and files; choose another --run-dir"
        )


def write_mark(folder: Path, kind: str, settings: dict[str, int]) -> None:
    """Make `folder` a lab's."""
    folder.mkdir(exist_ok=True)
    (folder / MARK).write_text(json.dumps({"kind": kind, "settings": settings}))


def cannot_host(programs: Sequence[str], *, network: bool) -> str | None:
    """Why this machine cannot run a lab that needs `programs`, in one line; None if it can."""
    if os.geteuid() != 0:
        return "a lab needs root; as root: python tools/lab/lab.py install"
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; run: python tools/lab/lab.py install"
    probe = "mount -t tmpfs tmpfs /dev/shm" + (
        " && ip link add veth0 type veth peer name veth1 && ip link add br0 type bridge" if network else ""
    )
    namespaces = ["--mount", "--uts", "--ipc", "--pid", *(["--net"] if network else [])]
    tried = run_command(["unshare", *namespaces, "--fork", "sh", "-c", probe], 20, check=False)
    if tried.returncode != 0:
        return f"this machine allows no namespaces ({tried.stderr.strip()}); run on one that does, as root"
    return None
