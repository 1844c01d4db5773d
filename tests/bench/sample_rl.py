"""One iteration of reinforcement learning: 4 samples of each of 4 prompts, importance sampling, a step."""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from typing import Any

import torch

from tests.bench.sample_peers import Generate
from workers.engine.adamw import AdamWSettings
from workers.engine.base import load_base
from workers.engine.lora import LoraSpec
from workers.engine.sampler import SampleOutput, SampleParams
from workers.engine.trainer import Trainer
from workers.text.rows import Row
from workers.text.tokenizer import Tokenizer

_PROMPTS, _COPIES, _LENGTH, _TOKENS, _RANK = 4, 4, 64, 64, 8


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    found: list[list[int]] = torch.randint(
        4, 49000, (_PROMPTS, _LENGTH), generator=generator
    ).tolist()
    return found


def iteration(model: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """CPU seconds of each part, the second time; how far the sampler's log-probabilities are from the
    trainer's."""
    run = Trainer(
        load_base(model, dtype="bfloat16"), LoraSpec(r=_RANK, alpha=2 * _RANK), AdamWSettings(1e-4)
    )
    params, parts = SampleParams(max_tokens=_TOKENS, n=_COPIES), [0.0, 0.0, 0.0]
    for number in range(2):
        at = [time.process_time()]
        output = run.sample(_prompts(), params, tokenizer, lambda: False, (number, 0))
        at.append(time.process_time())
        rows = _rows(output)
        run.forward_backward(rows, "importance_sampling", {})
        at.append(time.process_time())
        gap = _gap(run, rows) if number else 0.0
        resumed = time.process_time()
        run.optim_step()
        parts = [at[1] - at[0], at[2] - at[1], time.process_time() - resumed]
    names = ("sample_s", "forward_backward_s", "optim_step_s")
    timed = {name: round(part, 3) for name, part in zip(names, parts, strict=True)}
    return {**timed, "total_s": round(sum(parts), 3), "mean_logprob_gap": round(gap, 4)}


def _rows(output: SampleOutput) -> list[Row]:
    rows = []
    for prompt, samples in zip(_prompts(), output.samples, strict=True):
        for copy, sample in enumerate(samples):
            ids, before = prompt + sample.token_ids, [0.0] * (len(prompt) - 1)
            count = len(sample.token_ids)
            arrays = {
                "logprobs": array("f", before + sample.logprobs),
                "advantages": array("f", before + [1.0 - copy % 2 * 2] * count),
            }
            weights = array("f", before + [1.0] * count)
            rows.append(Row(array("i", ids[:-1]), array("i", ids[1:]), weights, arrays))
    return rows


def _gap(run: Trainer, rows: list[Row]) -> float:
    """The mean distance of the sampler's log-probabilities from those of a training forward pass, nats."""
    found = run.forward(rows)["rows"]
    gaps: list[float] = [
        abs(own - theirs)
        for row, made in zip(rows, found, strict=True)
        for own, theirs in zip(made["logprobs"], row.arrays["logprobs"], strict=True)
        if own is not None
    ]
    return sum(gaps) / len(gaps)


def peer_iteration(peer: Generate) -> dict[str, float]:
    """The same written with generate and peft, the second time; the peer has an adapter from then on."""
    peer.adapted(_RANK)
    model: Any = peer.model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(2):
        at = [time.process_time()]
        ids = peer.batch(_prompts(), _TOKENS, n=_COPIES)
        at.append(time.process_time())
        logits = model(ids[:, :-1], use_cache=False).logits[:, _LENGTH - 1 :].float()
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, _LENGTH:, None]).squeeze(-1)
        signs = torch.tensor([1.0, -1.0]).repeat(len(ids) // 2).unsqueeze(1)
        loss = -((logprobs - logprobs.detach()).exp() * signs).sum()
        loss.backward()
        at.append(time.process_time())
        optimizer.step()
        optimizer.zero_grad()
        at.append(time.process_time())
    names = ("sample_s", "forward_backward_s", "optim_step_s")
    timed = {
        name: round(end - begin, 3) for name, begin, end in zip(names, at, at[1:], strict=False)
    }
    return {**timed, "total_s": round(at[-1] - at[0], 3)}
