"""Install what the labs need on Debian, without starting any of it."""

import os
import shutil
import subprocess
from pathlib import Path

import slurm_lab
import ssh_lab
from lab_host import LabError

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "pdsh", "openssh-server", "iproute2", "iputils-ping"]
POLICY = Path("/usr/sbin/policy-rc.d")


def missing_programs() -> list[str]:
    """Programs of either lab that this machine lacks."""
    return [program for program in (*slurm_lab.PROGRAMS, *ssh_lab.PROGRAMS) if shutil.which(program) is None]


def install() -> str:
    """Install the packages if a program is missing, and say what was done.

    Raises:
        LabError: not root, no apt, or apt failed.
    """
    missing = missing_programs()
    if not missing:
        return "nothing to install"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise LabError(
            f"missing: {', '.join(missing)}; needs root and Debian's apt-get to install {' '.join(PACKAGES)}"
        )
    # Debian starts a daemon as soon as it is installed unless this file says no; the labs start their own
    silence = not POLICY.exists()
    if silence:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", *command], env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, check=False
            )
            if done.returncode != 0:
                raise LabError(f"`apt-get {' '.join(command)}` ended with exit code {done.returncode}")
    finally:
        if silence:
            POLICY.unlink()
    return f"installed {' '.join(PACKAGES)}"
