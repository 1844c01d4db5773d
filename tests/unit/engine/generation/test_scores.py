"""Log-probabilities beside the tokens: of prompts, and of the likeliest tokens."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from tests.unit.engine.generation.support import (
    PROMPTS,
    alone,
    ask,
    finish,
    generator_of,
    ids_of,
    logprobs_at,
)
from tests.unit.engine.support import make_trainer
from workers.engine.base import Base
from workers.text.rows import Row


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompt_scores_are_those_of_the_trainer(base: Base, max_tokens: int) -> None:
    run = make_trainer(base)
    prompts = [*PROMPTS, [17]]
    request = ask(
        prompts,
        weights=run.adapter,
        max_tokens=max_tokens,
        temperature=0.3,
        prompt_logprobs=True,
        prompt_top_logprobs=4,
        n=2,
    )
    output = alone(base, request)
    assert output.prompt_scores is not None and output.num_tokens == 8 * max_tokens
    rows = [
        Row(array("i", p[:-1]), array("i", p[1:]), array("f", [1.0] * (len(p) - 1)))
        for p in PROMPTS
    ]
    trained = run.forward(rows, top_k=4)["rows"]
    for scores, row in zip(output.prompt_scores, trained, strict=False):
        assert scores.logprobs[0] is None and scores.top is not None and scores.top[0] is None
        assert scores.logprobs[1:] == pytest.approx(row["logprobs"], abs=1e-5)
        tops = [top for top in scores.top if top is not None]
        assert [top[0] for top in tops] == row["top_token_ids"]
        assert [top[1] for top in tops] == [
            pytest.approx(one, abs=1e-5) for one in row["top_logprobs"]
        ]
    assert output.prompt_scores[3].logprobs == [None] and output.prompt_scores[3].top == [None]
    if max_tokens == 0:
        reasons = {sample.finish_reason for row in output.samples for sample in row}
        assert reasons == {"length"} and ids_of(output) == [[]] * 8


def test_scoring_takes_a_prompt_as_long_as_the_context(base: Base) -> None:
    prompt = [5] * base.context_length
    output = alone(base, ask([prompt], max_tokens=0, prompt_logprobs=True))
    assert output.prompt_scores is not None
    assert len(output.prompt_scores[0].logprobs) == base.context_length
    assert output.prompt_scores[0].top is None


def test_likeliest_tokens_are_those_of_the_scaled_distribution(base: Base) -> None:
    weights = make_trainer(base).adapter
    many = ask(weights=weights, temperature=0.6, top_k=2, top_logprobs=5)
    greedy = ask(weights=weights, temperature=0.0, top_logprobs=1, key=(1, 0))
    plain = ask(weights=weights, key=(2, 0))
    generator = generator_of(base)
    tickets = [generator.submit(request) for request in (many, greedy, plain)]
    found = finish(generator, *tickets)
    for request, output in zip((many, greedy), found, strict=False):
        for prompt, (sample,) in zip(PROMPTS, output.samples, strict=True):
            assert len(sample.top) == len(sample.token_ids)
            for at, (ids, logprobs) in enumerate(sample.top):
                logits = logprobs_at(base, weights, prompt + sample.token_ids[:at])
                values = logits / (request.temperature or 1.0)
                values -= values.max()
                values -= np.log(np.exp(values).sum())
                order = np.argsort(-values)[: request.top_logprobs]
                assert ids == order.tolist()
                assert logprobs == pytest.approx(values[order].tolist(), abs=1e-4)
    assert all(s.top[at][0] == [t] for (s,) in found[1].samples for at, t in enumerate(s.token_ids))
    assert all(sample.top == [] for (sample,) in found[2].samples)


def test_one_score_in_a_step_and_nobody_passes_who_waits_for_it(base: Base) -> None:
    generator = generator_of(base)
    tickets = [
        generator.submit(ask(PROMPTS[:1], max_tokens=tokens, prompt_logprobs=True))
        for tokens in (0, 2, 1)
    ]
    assert generator.step() == tickets[:1]
    assert generator.step() == []
    assert sorted(generator.step(), key=lambda one: one.number) == tickets[1:]
