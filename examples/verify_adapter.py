"""Proof that an adapter is a plain PEFT one: load it with peft alone and score the same tokens.

`python examples/verify_adapter.py MODEL_FOLDER ADAPTER_FOLDER < facts.json`, where the facts hold
`prompts` and `tokens` (lists of token ids) and `logprobs` (what the server said of the tokens at
temperature 1).
Exit status 0 when all agree within 1e-3.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

TOLERANCE = 1e-3


def main() -> int:
    """Print the largest difference; 1 when it is too large."""
    warnings.simplefilter("ignore", FutureWarning)  # peft and transformers about each other
    transformers_logging.disable_progress_bar()
    # What it says of kernels that the CPU lacks, once peft imports it, is no news here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import PeftModel

    model_folder, adapter_folder = sys.argv[1:3]
    facts = json.load(sys.stdin)
    base = AutoModelForCausalLM.from_pretrained(
        model_folder, local_files_only=True, dtype=torch.float32
    )
    bare = score(base, facts)
    adapted = score(PeftModel.from_pretrained(base, adapter_folder), facts)
    said = torch.tensor([number for row in facts["logprobs"] for number in row])
    difference = float((adapted - said).abs().max())
    moved = float((bare - said).abs().max())
    print(
        f"Proof   loaded with plain peft in a fresh process: log-probabilities of {len(said)} tokens\n"
        f"        differ from the server's by at most {difference:.1e} (without the adapter by {moved:.1e})"
    )
    if difference > TOLERANCE:
        print(
            f"        that is more than {TOLERANCE:.0e}: the adapter is not what the server trained",
            file=sys.stderr,
        )
        return 1
    return 0


@torch.no_grad()
def score(model: torch.nn.Module, facts: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities of all tokens after their prompts, in a row."""
    found = []
    for prompt, tokens in zip(facts["prompts"], facts["tokens"], strict=True):
        ids = torch.tensor([prompt + tokens])
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        found.append(torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(found)


if __name__ == "__main__":
    sys.exit(main())
