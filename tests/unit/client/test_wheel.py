"""The wheel: what is in it, how large it is with what it needs, and that every Python here imports it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rewardsignal as rs
from tests.bench import sizes

ROOT = Path(__file__).resolve().parents[3]
MAX_MB = 15.0
PYTHONS = subprocess.run(
    ["bash", str(ROOT / "deploy" / "pythons.sh")], capture_output=True, text=True, check=True
).stdout.split()
SCRIPT = """
import asyncio, sys
import rewardsignal as rs
import rewardsignal.cli, rewardsignal.data
assert rs.__file__.startswith(sys.prefix), rs.__file__
missing = [name for name in rs.__all__ if not hasattr(rs, name)]
assert not missing, missing
with rs.SignalClient("sk-test", "http://127.0.0.1:9") as client:
    print(repr(client))
asyncio.run(rs.AsyncSignalClient("sk-test", "http://127.0.0.1:9").close())
"""


def ran(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves folders behind."""
    place = tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    shutil.copytree(ROOT / "client_lib", place / "source", ignore=junk)
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    ran(sys.executable, *build, "-w", place, place / "source")
    return next(place.glob("*.whl"))


def requirements(wheel: Path) -> list[str]:
    """Names of what the client needs, extras aside."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        described = message_from_bytes(archive.read(name))
    needs = map(Requirement, described.get_all("Requires-Dist", []))
    return sorted(need.name for need in needs if need.marker is None)


@pytest.fixture(scope="module")
def needed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the client depends on, copied out of this environment: all of it is pure Python."""
    folder = tmp_path_factory.mktemp("needed")
    for name in set().union(*(sizes.closure(need, "") for need in requirements(wheel))):
        for file in metadata.files(name) or ():
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            assert file.suffix != ".so", f"{name} is not pure Python"
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), target)
    return folder


def test_it_brings_one_name_and_its_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        top = {name.split("/")[0] for name in names}
        info = next(name for name in top if name.endswith(".dist-info"))
        assert top == {"rewardsignal", info}
        assert "rewardsignal/py.typed" in names
        sources = {path.relative_to(ROOT / "client_lib").as_posix()
                   for path in (ROOT / "client_lib" / "rewardsignal").rglob("*.py")}  # fmt: skip
        assert {name for name in names if name.endswith(".py")} == sources
        described = archive.read(f"{info}/METADATA").decode()
        commands = archive.read(f"{info}/entry_points.txt").decode()
    assert f"Version: {rs.__version__}\n" in described
    assert "signal = rewardsignal.cli:main" in commands
    assert requirements(wheel) == ["click", "httpx2", "platformdirs", "tqdm"]


def test_it_is_small(wheel: Path, needed: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        own = sum(one.file_size for one in archive.infolist())
    others = sum(path.stat().st_size for path in needed.rglob("*") if path.is_file())
    # Twice the sources, as pip compiles them.
    assert 2 * (own + others) / 1e6 < MAX_MB


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_here_installs_it(
    wheel: Path, needed: Path, tmp_path: Path, python: str
) -> None:
    environment = tmp_path / "environment"
    ran(python, "-m", "venv", "--without-pip", environment)
    own = environment / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    ran(sys.executable, "-m", "pip", "--python", own, *install)
    packages = next((environment / "lib").glob("python3.*")) / "site-packages"
    (packages / "needed.pth").write_text(f"{needed}\n", encoding="utf-8")
    assert "<SignalClient" in ran(own, "-W", "error", "-c", SCRIPT, cwd=tmp_path)
    assert rs.__version__ in ran(environment / "bin" / "signal", "--version", cwd=tmp_path)
