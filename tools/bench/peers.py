"""Libraries that the stream benchmark compares with in virtual environments of their own: none of our dependencies."""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUR_TORCH = f"torch=={version('torch').split('+')[0]}"


@dataclass(frozen=True)
class Peer:
    """A library: what pip is to install, the program that writes its format, and its contestants."""

    requirements: tuple[str, ...]
    program: str
    contestants: tuple[str, ...]


PEERS = {
    "mosaicml-streaming": Peer(
        ("mosaicml-streaming>=0.13,<0.14", OUR_TORCH, "numpy<3"), "peer_mosaic.py", ("mosaicml-streaming",)
    ),
    "litdata": Peer(("litdata>=0.2.76,<0.3", OUR_TORCH, "numpy<3"), "peer_litdata.py", ("litdata", "litdata-tokens")),
    "grain": Peer(("grain>=0.2.18,<0.3", "numpy<3"), "peer_grain.py", ("grain", "grain-packing")),
}
PEER_OF = {contestant: name for name, peer in PEERS.items() for contestant in peer.contestants}


def python_of(environments: Path, name: str) -> Path:
    """The interpreter of a library's environment."""
    return environments / name / "bin" / "python"


def make_environment(environments: Path, name: str) -> None:
    """Make a library's environment with pip, unless it is there."""
    ready = environments / name / ".ready"
    if ready.exists():
        return
    folder = environments / name
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *PEERS[name].requirements], check=True)
    ready.touch()


def write_format(environments: Path, name: str, raw: Path, out: Path) -> None:
    """Write the documents of raw/ids.npy, which end at raw/ends.npy, in a library's own format."""
    command = [python_of(environments, name), HERE / PEERS[name].program, raw / "ids.npy", raw / "ends.npy", out]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LITDATA_DISABLE_VERSION_CHECK": "1"}
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} could not write its format:\n{done.stderr}")
