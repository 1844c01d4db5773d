"""schemathesis over the OpenAPI document: no 5xx, and every answer as the document says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.api import BATCH, Api
from tests.support.stack import RunningStack

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_schema_conformance", "response_headers_conformance", "ignored_auth",
    "unsupported_method",
)  # fmt: skip
CONFIG = """
color = false
[parameters]
"path.run_id" = "{run_id}"
"path.future_id" = "{future_id}"
"path.name" = ["tiny", "final", "mine"]
"path.path" = ["adapter_config.json", "manifest.json"]
"""


def test_the_server_keeps_its_own_document(stack: RunningStack, tmp_path: Path) -> None:
    key = stack.new_user("schemathesis")
    with Api(stack, key) as api, api.run() as run:
        future_id = run.post("/forward_backward_async", BATCH).json()["future_id"]
        run.ok("/save_state", {"name": "mine"})
        config = CONFIG.format(run_id=run.id, future_id=future_id)
        (tmp_path / "schemathesis.toml").write_text(config)
        command = [
            str(Path(sys.executable).parent / "schemathesis"), "run", f"{stack.base_url}/openapi.json",
            "--header", f"Authorization: Bearer {key}", "--checks", ",".join(CHECKS),
            "--phases", "coverage,fuzzing", "--max-examples", "8", "--seed", "1",
            "--request-timeout", "40", "--continue-on-failure",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
