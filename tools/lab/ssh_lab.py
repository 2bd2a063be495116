"""Hosts that talk ssh on one machine: a login host `ctl` and `node1` …, each with a network card of its own.

The cards hang on a switch (a bridge in a network namespace of its own); nothing leads from there to this machine's
network or back. Host keys are in every host's known_hosts, and `ctl` and the nodes may log in to each other as root.
"""

import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lab_host import Host, LabError, cannot_host, changing, check_folder, read_mark, run_command, wait_for, write_mark

KIND = "ssh"
PROGRAMS = ("/usr/sbin/sshd", "ssh", "ssh-keygen", "pdsh", "ip", "unshare", "nsenter", "setsid", "timeout")
READY_SECONDS = 60.0
CONTROLLER = 100  # last number of ctl's address
SWITCH = "switch"

SSH_CONFIG = """\
Host *
  IdentityFile {folder}/id
  IdentitiesOnly yes
  BatchMode yes
  StrictHostKeyChecking yes
  GlobalKnownHostsFile {folder}/known_hosts
  UserKnownHostsFile /dev/null
"""
# as Debian's: of a client's environment only the language is taken
SSHD_CONFIG = """\
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
UseDNS no
PidFile none
AcceptEnv LANG LC_*
MaxStartups 100
Subsystem sftp internal-sftp
"""


class SshLab:
    """The ssh hosts whose state lies in `folder`. Nothing runs before `up`, and nothing is left after `down`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    @staticmethod
    def cannot_run() -> str | None:
        """Why this machine cannot run an ssh lab, in one line; None if it can."""
        return cannot_host(PROGRAMS, network=True)

    def up(self, nodes: int = 3) -> None:
        """Start what does not run yet: a new lab of `nodes` nodes, or an older one's hosts that are powered off."""
        with changing(self.folder):
            if read_mark(self.folder, KIND) is None:
                check_folder(self.folder)
                self._create(nodes)
            switch = self._switch()
            if switch.init is None:
                switch.boot("127.0.0.1 localhost\n", [])
                self._in_network(switch, "link add br0 type bridge forward_delay 0")
                self._in_network(switch, "link set br0 up")
            self._boot(list(self._hosts()))

    def down(self) -> None:
        """End every process of the lab, network included, and delete its folder."""
        with changing(self.folder):
            if read_mark(self.folder, KIND) is not None:
                for host in [*self._hosts().values(), self._switch()]:
                    host.power_off()
                shutil.rmtree(self.folder)
            elif self.folder.exists():
                self.folder.rmdir()

    def status(self) -> dict[str, str]:
        """Of every host: up, cut (running, but off the network) or down. Empty without a lab."""
        if read_mark(self.folder, KIND) is None:
            return {}
        states = {}
        for name, host in self._hosts().items():
            if host.init is None:
                states[name] = "down"
            else:
                port = self._in_network(self._switch(), f"link show {name}")
                states[name] = "up" if ",UP" in port else "cut"
        return states

    def on(
        self, name: str, argv: Sequence[str], timeout_seconds: float = 60, *, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on one host, as `lab.on("ctl", ["ssh", "node1", "hostname"])`, in the current folder."""
        return run_command(self.entering(name, argv), timeout_seconds, check=check)

    def entering(self, name: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` on a host, for those who start and watch it themselves."""
        return self._host(name).entering(argv, Path.cwd())

    def cut(self, name: str) -> None:
        """Pull the network cable of a host. Its processes go on; nothing is told to anyone."""
        self._in_network(self._switch(), f"link set {self._host(name).name} down")

    def heal(self, name: str) -> None:
        """Plug the cable in again."""
        self._in_network(self._switch(), f"link set {self._host(name).name} up")

    def kill(self, name: str) -> None:
        """Power a host off: all of its processes end at once."""
        with changing(self.folder):
            self._host(name).power_off()

    def boot(self, name: str) -> None:
        """Power a host on, cable plugged in, and wait until it can be logged in to."""
        with changing(self.folder):
            self._boot([self._host(name).name])

    def rekey(self, name: str) -> None:
        """Give a host a new host key that nobody was told of, as a reinstalled or an impostor's machine has."""
        with changing(self.folder):
            host = self._host(name)
            host.power_off()
            self._make_key(host.folder / "host_key", name)
            self._boot([name])

    def trust(self) -> None:
        """Make the present host keys of all known to all, as an administrator would after looking."""
        lines = []
        for host in self._hosts().values():
            kind, key, _ = (host.folder / "host_key.pub").read_text().split()
            lines.append(f"{host.name},{host.address} {kind} {key}\n")
        (self.folder / "known_hosts").write_text("".join(lines))

    def reset(self) -> None:
        """Back to the start: all hosts freshly booted, plugged in and known to all; nothing runs on them but sshd."""
        with changing(self.folder):
            for host in self._hosts().values():
                host.power_off()
            self.trust()
            self._boot(list(self._hosts()))

    def _settings(self) -> dict[str, int]:
        settings = read_mark(self.folder, KIND)
        if settings is None:
            raise LabError(f"there is no lab in {self.folder}; start one with `up`")
        return settings

    def _hosts(self) -> dict[str, Host]:
        numbers = {"ctl": CONTROLLER} | {f"node{number}": number for number in range(1, self._settings()["nodes"] + 1)}
        return {
            name: Host(name, f"10.77.0.{number}", self.folder / name, own_network=True, setup=self._setup())
            for name, number in numbers.items()
        }

    def _host(self, name: str) -> Host:
        hosts = self._hosts()
        if name not in hosts:
            raise LabError(f"no host {name!r}; there are {', '.join(hosts)}")
        return hosts[name]

    def _switch(self) -> Host:
        return Host(SWITCH, "", self.folder / SWITCH, own_network=True)

    def _setup(self) -> tuple[str, ...]:
        return (
            # /sys shows the network of whoever mounted it; control groups are mounted below it and kept
            "mount -t tmpfs tmpfs /run",
            "mkdir /run/sshd /run/cgroup",
            "mount --rbind /sys/fs/cgroup /run/cgroup",
            "mount -t sysfs sysfs /sys",
            "mount --rbind /run/cgroup /sys/fs/cgroup",
            f"mount --bind {self.folder}/ssh_config /etc/ssh/ssh_config",
            # what this machine's root has configured for ssh is none of the lab's business
            'if [ -d "$HOME/.ssh" ]; then mount -t tmpfs tmpfs "$HOME/.ssh"; fi',
        )

    def _create(self, nodes: int) -> None:
        write_mark(self.folder, KIND, {"nodes": nodes})
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        self._make_key(self.folder / "id", "lab")
        for host in self._hosts().values():
            host.folder.mkdir()
            self._make_key(host.folder / "host_key", host.name)
        self.trust()

    def _make_key(self, path: Path, comment: str) -> None:
        path.unlink(missing_ok=True)
        run_command(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)], 20, check=True)

    def _boot(self, names: Sequence[str]) -> None:
        hosts = self._hosts()
        hosts_file = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts.values())
        for host in (hosts[name] for name in names):
            if host.init is None:
                sshd = [
                    "/usr/sbin/sshd",
                    "-D",
                    "-e",
                    "-f",
                    f"{self.folder}/sshd_config",
                    "-h",
                    f"{host.folder}/host_key",
                ]
                host.boot(hosts_file, [sshd])
                # the port of a host that was just powered off may not be gone yet
                self._in_network(self._switch(), f"link delete {host.name}", check=False)
                # a card keeps its address over a reboot; a new one would be unknown to the neighbours for half a minute
                card = f"eth0 address 02:77:00:00:00:{int(host.address.rpartition('.')[2]):02x} netns {host.init}"
                self._in_network(self._switch(), f"link add {host.name} type veth peer name {card}")
                self._in_network(self._switch(), f"link set {host.name} master br0 up")
                self._in_network(host, f"address add {host.address}/24 dev eth0")
                self._in_network(host, "link set eth0 up")
                self._in_network(host, "link set lo up")
        for name in names:
            if not wait_for(partial(self._greets, name), READY_SECONDS):
                log = (hosts[name].folder / "sshd.log").read_text(errors="replace")
                raise LabError(f"{name} answers no ssh after {READY_SECONDS:.0f} s:\n{log}")

    def _greets(self, name: str) -> bool:
        """Whether sshd answers over the network, whatever its host key."""
        asker = "ctl" if self._host("ctl").init is not None else name
        greeting = f"exec 3<>/dev/tcp/{self._host(name).address}/22 && read -r -t 5 line <&3"
        return self.on(asker, ["bash", "-c", greeting], 10, check=False).returncode == 0

    @staticmethod
    def _in_network(host: Host, ip_arguments: str, *, check: bool = True) -> str:
        """Run `ip` within a host's network only."""
        return run_command(
            ["nsenter", f"--target={host.init}", "--net", "ip", *ip_arguments.split()], 20, check=check
        ).stdout
