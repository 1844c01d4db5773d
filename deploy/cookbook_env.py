"""The environment `.cookbook` with tinker-cookbook, which needs other versions of libraries than the server.

The client needs torch too; where this environment has the CPU build, it is linked there instead of being
downloaded again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".cookbook"
PYTHON = PLACE / "bin" / "python"
COOKBOOK, SDK = "tinker-cookbook[math-rl]==0.5.8", f"tinker=={version('tinker')}"
LINKED = ("torch", "torchgen", "functorch")


def main() -> int:
    """Make it unless it is there; 0 when it is there at the end."""
    torch = version("torch")
    wanted = "\n".join((COOKBOOK, SDK, f"torch=={torch}", sys.version, ""))
    made = PLACE / "made"
    if made.is_file() and made.read_text() == wanted:
        return 0
    size = "250 MB" if torch.endswith("+cpu") else "3 GB"
    print(f"Installing {COOKBOOK} into {PLACE.name}, about {size}.", file=sys.stderr, flush=True)
    shutil.rmtree(PLACE, ignore_errors=True)
    venv.create(PLACE, with_pip=True)
    if torch.endswith("+cpu"):
        link_torch()
    command = [str(PYTHON), "-m", "pip", "install", "-q", "--no-compile"]
    done = subprocess.run([*command, f"torch=={torch.split('+')[0]}", COOKBOOK, SDK])
    if done.returncode:
        print(f"{COOKBOOK} cannot be installed.", file=sys.stderr)
        return 1
    made.write_text(wanted)
    return 0


def link_torch() -> None:
    """A folder with torch's packages alone, which the new environment sees as its own."""
    ours = Path(sysconfig.get_path("purelib"))
    linked = PLACE / "linked"
    linked.mkdir()
    for name in (*LINKED, *(info.name for info in ours.glob("torch-*.dist-info"))):
        (linked / name).symlink_to(ours / name)
    theirs = next((PLACE / "lib").glob("python3*")) / "site-packages"
    (theirs / "linked.pth").write_text(f"{linked}\n")


if __name__ == "__main__":
    sys.exit(main())
