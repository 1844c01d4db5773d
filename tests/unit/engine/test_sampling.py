"""Sampling: determinism, greedy against transformers, log-probabilities, stops, truncation, cancelling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from schemas.errors import SignalError
from tests.unit.engine.support import make_trainer
from workers.engine import sampler
from workers.engine.base import Base
from workers.engine.sampler import SampleOutput, SampleParams
from workers.engine.trainer import Trainer
from workers.text.tokenizer import Tokenizer, load_tokenizer

PROMPTS = [[5, 6, 7, 8, 9], [40, 41], [5, 6, 7, 8, 9, 10, 11, 12]]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return load_tokenizer(tiny)


@pytest.fixture
def draw(base: Base, tokenizer: Tokenizer) -> Callable[..., SampleOutput]:
    run = make_trainer(base)

    def call(
        prompts: list[list[int]], key: tuple[int, int] = (7, 0), **params: object
    ) -> SampleOutput:
        settings = SampleParams(**{"max_tokens": 12, **params})  # type: ignore[arg-type]
        return run.sample(prompts, settings, tokenizer, lambda: False, key)

    return call


def _ids(output: SampleOutput) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in row] for row in output.samples]


def test_a_seed_gives_the_same_samples_and_another_seed_others(
    draw: Callable[..., SampleOutput],
) -> None:
    first, again, other = draw(PROMPTS), draw(PROMPTS), draw(PROMPTS, key=(8, 0))
    assert first == again and _ids(first) != _ids(other)
    assert _ids(draw(PROMPTS, key=(7, 1))) != _ids(first)
    assert first.num_tokens == 36 and not first.cancelled
    # Seeds are taken modulo 2^64.
    assert _ids(draw(PROMPTS, key=(-1, 0))) == _ids(draw(PROMPTS, key=(2**64 - 1, 0)))


def test_copies_differ_and_do_not_depend_on_the_split_into_waves(
    draw: Callable[..., SampleOutput], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = draw(PROMPTS, n=4)
    assert [len(row) for row in together.samples] == [4, 4, 4]
    assert len({tuple(sample.token_ids) for sample in together.samples[0]}) > 1
    room = 3 * 20 * base.decoder.cache_bytes_per_token
    monkeypatch.setattr(sampler, "_CACHE_BYTES", room)
    assert _ids(draw(PROMPTS, n=4)) == _ids(together)


def test_greedy_equals_transformers_generate(base: Base, tokenizer: Tokenizer, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(tiny)
    bare = make_trainer(base, noise=0.0)
    params = SampleParams(max_tokens=20, temperature=0.0)
    found = bare.sample(PROMPTS, params, tokenizer, lambda: False, (0, 0))
    settings = GenerationConfig(
        max_new_tokens=20, do_sample=False, pad_token_id=3, eos_token_id=None
    )
    for prompt, row in zip(PROMPTS, found.samples, strict=True):
        out = model.generate(torch.tensor([prompt]), generation_config=settings)
        assert out[0, len(prompt) :].tolist() == row[0].token_ids


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_logprobs_equal_the_trainers_forward(
    draw: Callable[..., SampleOutput], base: Base, temperature: float
) -> None:
    output = draw(PROMPTS, n=2, temperature=temperature, top_p=0.9, top_k=40)
    run = make_trainer(base)
    for prompt, row in zip(PROMPTS, output.samples, strict=True):
        for sample in row:
            tokens = torch.tensor(prompt + sample.token_ids)
            with base.activated(run.adapter):
                logits = base.decoder.head.logits(base.decoder.hidden(tokens[:-1].unsqueeze(0)))
            expected = logits.log_softmax(-1).gather(1, tokens[1:, None])[len(prompt) - 1 :, 0]
            assert torch.allclose(torch.tensor(sample.logprobs), expected, atol=1e-4)


def test_logprobs_are_of_the_scaled_distribution_before_truncation(
    draw: Callable[..., SampleOutput], base: Base
) -> None:
    output = draw(PROMPTS[:1], temperature=0.5, top_k=3, max_tokens=1)
    run = make_trainer(base)
    with torch.no_grad(), base.activated(run.adapter):
        logits = base.decoder.head.logits(base.decoder.hidden(torch.tensor(PROMPTS[:1])))[-1]
    sample = output.samples[0][0]
    expected = (logits / 0.5).log_softmax(-1)[sample.token_ids[0]]
    assert sample.logprobs[0] == pytest.approx(float(expected), abs=1e-4)


def test_frequencies_follow_the_distribution(draw: Callable[..., SampleOutput], base: Base) -> None:
    """800 first tokens against their probabilities: a chi-square test over the likeliest ones."""
    run = make_trainer(base)
    with torch.no_grad(), base.activated(run.adapter):
        logits = base.decoder.head.logits(base.decoder.hidden(torch.tensor(PROMPTS[1:2])))[-1]
    probabilities = logits.log_softmax(-1).exp().numpy().astype(np.float64)
    drawn = [sample.token_ids[0] for sample in draw(PROMPTS[1:2], n=800, max_tokens=1).samples[0]]
    top = np.argsort(probabilities)[::-1][:20]
    expected = np.append(probabilities[top], 1 - probabilities[top].sum()) * len(drawn)
    counts = np.array([drawn.count(token) for token in top])
    observed = np.append(counts, len(drawn) - counts.sum())
    # 20 degrees of freedom: 45.3 is exceeded once in a thousand seeds.
    assert ((observed - expected) ** 2 / expected).sum() < 45.3


def test_stop_tokens_end_a_row_and_stay_out_of_its_text(
    draw: Callable[..., SampleOutput], tokenizer: Tokenizer
) -> None:
    plain = draw(PROMPTS).samples
    stop = plain[0][0].token_ids[4]
    output = draw(PROMPTS, stop_token_ids=(stop,))
    for before, after in zip(plain, output.samples, strict=True):
        ids = before[0].token_ids
        if stop in ids:
            end = ids.index(stop) + 1
            assert after[0].token_ids == ids[:end] and after[0].finish_reason == "stop"
            assert after[0].text == tokenizer.decode(ids[: end - 1])
        else:
            assert after[0].token_ids == ids and after[0].finish_reason == "length"
    assert (
        output.samples[0][0].logprobs == plain[0][0].logprobs[: len(output.samples[0][0].token_ids)]
    )


def test_stop_texts_are_found_across_tokens(draw: Callable[..., SampleOutput]) -> None:
    plain = draw(PROMPTS, max_tokens=40)
    text = plain.samples[0][0].text
    stop = text[10:13]
    sample = draw(PROMPTS, max_tokens=40, stop_strings=("no such text", stop)).samples[0][0]
    assert sample.finish_reason == "stop"
    assert sample.text == text[: text.index(stop)]
    ids = plain.samples[0][0].token_ids
    assert sample.token_ids == ids[: len(sample.token_ids)] and len(sample.token_ids) < len(ids)


def test_one_candidate_is_greedy(draw: Callable[..., SampleOutput]) -> None:
    greedy = _ids(draw(PROMPTS, temperature=0.0))
    assert _ids(draw(PROMPTS, top_k=1)) == greedy
    assert _ids(draw(PROMPTS, top_p=1e-9)) == greedy
    assert _ids(draw(PROMPTS, temperature=1e-6)) == greedy


def test_a_row_ends_at_the_models_context(base: Base, tokenizer: Tokenizer) -> None:
    run = make_trainer(base)
    prompts = [[5] * (base.context_length - 3), [6, 7]]
    output = run.sample(prompts, SampleParams(max_tokens=6), tokenizer, lambda: False, (0, 0))
    assert [len(row[0].token_ids) for row in output.samples] == [3, 6]
    assert [row[0].finish_reason for row in output.samples] == ["length", "length"]


def test_should_stop_is_asked_before_every_token(base: Base, tokenizer: Tokenizer) -> None:
    run = make_trainer(base)
    calls: list[None] = []

    def third_time() -> bool:
        calls.append(None)
        return len(calls) > 3

    output = run.sample(PROMPTS, SampleParams(max_tokens=50), tokenizer, third_time, (0, 0))
    assert output.cancelled and output.num_tokens == 9
    assert (
        run.sample(PROMPTS, SampleParams(max_tokens=5), tokenizer, lambda: True, (0, 0)).num_tokens
        == 0
    )


def test_prompts_that_the_model_cannot_take_are_named(
    draw: Callable[..., SampleOutput], base: Base
) -> None:
    cases = [
        ([[5], []], "validation_error", "prompts.1"),
        ([[5] * base.context_length], "sequence_too_long", "prompts.0"),
        ([[5], [512]], "token_out_of_range", "prompts.1"),
        ([[-1]], "token_out_of_range", "prompts.0"),
        ([], "validation_error", "prompts"),
    ]
    for prompts, code, param in cases:
        with pytest.raises(SignalError) as caught:
            draw(prompts)
        assert (caught.value.code, caught.value.param) == (code, param)


def test_samples_train_without_text_in_between(base: Base, tokenizer: Tokenizer) -> None:
    """Token ids go from sample into forward_backward, and the trainer sees the same log-probabilities."""
    from array import array

    from workers.text.rows import Row

    run: Trainer = make_trainer(base)
    output = run.sample(PROMPTS, SampleParams(max_tokens=9), tokenizer, lambda: False, (3, 1))
    rows, total = [], 0.0
    for prompt, row in zip(PROMPTS, output.samples, strict=True):
        ids = prompt + row[0].token_ids
        weights = [0.0] * (len(prompt) - 1) + [1.0] * len(row[0].token_ids)
        rows.append(Row(array("i", ids[:-1]), array("i", ids[1:]), array("f", weights)))
        total -= sum(row[0].logprobs)
    result = run.forward_backward(rows, "cross_entropy", {}, True)
    assert result["loss_sum"] == pytest.approx(total, abs=1e-3)
    assert result["num_tokens"] == 27
