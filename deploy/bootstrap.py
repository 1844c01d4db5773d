"""Set-up of a checkout: the virtual environment in .venv with everything that the project needs.

`python deploy/bootstrap.py --torch auto|cpu|cuda PYTHON…` is what `make setup` runs; PYTHON… are the
candidates, newest first. Uses the standard library alone, touches .venv and pip's cache only, does
nothing when the environment is already right, and says what it downloads before it does.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "signal-setup"
CONSTRAINTS = "deploy/constraints.txt"
TORCH = "2.13.0"
EXTRAS = "web,worker,embedded,s3,dev"
# What decides whether an environment is still right.
INPUTS = (
    "setup.cfg",
    "client_lib/setup.cfg",
    CONSTRAINTS,
    "deploy/bootstrap.py",
)
NO_CPU_BUILD = f"""
The package indexes that pip uses here have no CPU build of torch {TORCH} for this Python, so the build
from PyPI comes, which carries CUDA: about 3 GB instead of 200 MB. To get the small one, stop this,
point pip at an index that has it (PyTorch publishes one for CPU wheels) and run it again:

    export PIP_EXTRA_INDEX_URL=<the index's URL>
"""


class SetupError(Exception):
    """Set-up cannot go on; the message says how to mend it."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when the environment is ready."""
    parser = argparse.ArgumentParser(description="Makes .venv ready.")
    parser.add_argument("--torch", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="candidates, newest first")
    options = parser.parse_args(arguments)
    wanted = default_build() if options.torch == "auto" else options.torch
    try:
        set_up(wanted, options.pythons)
    except SetupError as error:
        print(f"make setup: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"make setup: this failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    return 0


def set_up(wanted: str, pythons: list[str]) -> None:
    """Makes the environment with torch's build `wanted` unless it is there."""
    fingerprint = fingerprint_of(wanted)
    if STAMP.is_file() and STAMP.read_text() == fingerprint and venv_version():
        return
    STAMP.unlink(missing_ok=True)
    torch = make_venv(wanted, pythons)
    announce(wanted, torch)
    pip("install", "--upgrade", "-c", CONSTRAINTS, "setuptools")
    pip("install", torch)
    # torch is named again, so that no requirement can bring another build in its place.
    pip(
        *("install", "--no-build-isolation", "-c", CONSTRAINTS, torch),
        *("-e", f".[{EXTRAS}]", "-e", "./client_lib"),
    )
    STAMP.write_text(fingerprint)
    print("Set-up is done. `make help` lists what there is.")


def default_build() -> str:
    """`cuda` when an NVIDIA driver answers, else `cpu`."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "cpu"
    answer = subprocess.run([command, "-L"], capture_output=True, text=True)
    return "cuda" if answer.returncode == 0 and "GPU" in answer.stdout else "cpu"


def fingerprint_of(wanted: str) -> str:
    """Changes when the environment must be made again, or the checkout was moved."""
    digest = hashlib.sha256()
    for name in INPUTS:
        path = ROOT / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return f"{ROOT}\n{wanted}\n{digest.hexdigest()}\n"


def make_venv(wanted: str, pythons: list[str]) -> str:
    """Makes .venv by the newest Python that has the wanted build; returns torch's requirement.

    An environment that is there and works is kept when it has a build of torch at all.
    """
    if venv_version():
        torch = choose(wanted, installed())
        if torch and is_wanted(wanted, torch):
            return torch
        if torch := choose(wanted, available()):
            return torch
    found: dict[str, str] = {}
    for python in pythons:
        create(python)
        torch = choose(wanted, available())
        if torch and is_wanted(wanted, torch):
            return torch
        if torch:
            found[python] = torch
    if not found:
        tried = ", ".join(pythons) or "none on PATH"
        raise SetupError(
            f"no Python with torch {TORCH} (tried: {tried}). Install Python 3.11, 3.12 or 3.13, and "
            "see that `pip index versions torch` lists this version."
        )
    python, torch = next(iter(found.items()))
    create(python)
    return torch


def create(python: str) -> None:
    """A fresh .venv; raises SetupError that says what to install where `ensurepip` is missing."""
    if subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True).returncode:
        raise SetupError(
            f"{python} cannot make virtual environments: its `ensurepip` is missing. On Debian and "
            "Ubuntu: sudo apt install python3-venv; elsewhere install Python with pip."
        )
    print(f"Making .venv with {python}", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", str(VENV)], check=True)


def venv_version() -> str:
    """The version of .venv's Python; empty when there is none that can be used."""
    probe = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True)
    except OSError:
        return ""
    version = answer.stdout.strip()
    return version if version in ("3.11", "3.12", "3.13") else ""


def installed() -> list[str]:
    """The version of torch that .venv has, so that a repeat needs no network."""
    probe = "from importlib.metadata import version; print(version('torch'))"
    answer = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True)
    return answer.stdout.split()


def available() -> list[str]:
    """The versions of torch that pip can get for .venv's Python, newest first."""
    answer = subprocess.run(
        [PYTHON, "-m", "pip", "index", "versions", "torch"], capture_output=True, text=True
    )
    line = re.search(r"^Available versions: (.*)$", answer.stdout, re.MULTILINE)
    return line[1].split(", ") if line else []


def choose(wanted: str, versions: list[str]) -> str | None:
    """torch's requirement for the wanted build, or for the nearest to it; None where there is none."""
    plain, cpu = TORCH, f"{TORCH}+cpu"
    cuda = [version for version in versions if version.startswith(f"{TORCH}+cu")]
    order = [cpu, plain] if wanted == "cpu" else [plain, *cuda]
    for version in order:
        if version in versions:
            # `==2.13.0` would also take 2.13.0+cpu, which sorts higher; `===` means the text itself.
            return f"torch==={version}"
    return None


def is_wanted(wanted: str, torch: str) -> bool:
    """Whether the requirement is the build that was asked for."""
    return torch.endswith("+cpu") == (wanted == "cpu")


def announce(wanted: str, torch: str) -> None:
    """Says what comes over the network, and how large it is."""
    version = torch.removeprefix("torch===")
    size = "200 MB" if torch.endswith("+cpu") else "3 GB with its CUDA libraries"
    print(f"Downloading into .venv, unless pip has them already (Python {venv_version()}):")
    print(f"  torch {version}: about {size}")
    print("  transformers, Celery, Flask, a Valkey server and the rest: about 150 MB")
    print("It takes one to three minutes and prints nothing meanwhile.", flush=True)
    if not is_wanted(wanted, torch) and wanted == "cpu":
        print(NO_CPU_BUILD, flush=True)


def pip(*arguments: str) -> None:
    """Runs .venv's pip in the checkout."""
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments, "-qq"]
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    raise SystemExit(main())
