"""What a worker's start and its first operations import: transformers and torch._dynamo cost seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from array import array
from pathlib import Path

from workers.engine.adamw import AdamWSettings
from workers.engine.base import load_base
from workers.engine.certificate import certificate
from workers.engine.info import fingerprint, fingerprint_id, versions
from workers.engine.lora import LoraSpec
from workers.engine.sampler import SampleParams
from workers.engine.trainer import Trainer
from workers.text.rows import Row
from workers.text.tokenizer import load_tokenizer

folder = Path(sys.argv[1])
base = load_base(folder, threads=1)
run = Trainer(base, LoraSpec(r=2), AdamWSettings(), gradient_checkpointing=True)
row = Row(array("i", [5, 6, 7]), array("i", [6, 7, 8]), array("f", [1, 1, 1]))
run.forward_backward([row], "causal_lm", {}, True)
run.optim_step()
run.sample([[5, 6], [7]], SampleParams(3), load_tokenizer(folder), lambda: False, (0, 0))
run.export_adapter(Path(sys.argv[2]), "tiny")
run.restore(run.capture())
certificate(run.capture()), fingerprint_id(fingerprint(base)), versions()
heavy = {"transformers", "peft", "torch._dynamo", "torch.distributed.tensor", "celery", "flask", "redis"}
print(sorted(heavy & set(sys.modules)))
"""


def test_every_primitive_runs_without_heavy_imports(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tiny), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
