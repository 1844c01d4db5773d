"""What the API computes equals a plain torch and peft loop on the same data, in float32."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rewardsignal as rs
from tests.support.peft_loop import PeftLoop
from tests.support.stack import RunningStack

# peft asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PIRATE = Path(__file__).parents[2] / "examples" / "pirate.jsonl"
CLOSE = 1e-4
LEARNING_RATE, WEIGHT_DECAY = 5e-3, 0.02
CONFIG: dict[str, Any] = {
    "lora_r": 8, "lora_alpha": 12.0, "seed": 11,
    "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY,
}  # fmt: skip

TEXTS: list[dict[str, Any]] = [
    {"text": "The server keeps every training session in the memory of a worker."},
    {"text": "Ahoy! naïve café — 東京, 3.14"},
    {"text": "one, two"},
]
CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "You count."},
            {"role": "user", "content": "one, two"},
            {"role": "assistant", "content": "three, four"},
            {"role": "user", "content": "Go on!"},
            {"role": "assistant", "content": "five, six,\nseven"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "Paris, matey."},
        ]
    },
]
ROWS: list[dict[str, Any]] = [
    {"tokens": list(range(5, 45))},
    {"tokens": [7, 8, 9, 10, 11], "weights": [0.0, 0.0, 1.0, 0.5, 1.0]},
    {"tokens": [100, 200, 300, 400], "targets": [1, 2, 3, 4], "weights": [0.25, 0.0, 2.0, 1.0]},
    {"tokens": [511, 260, 13], "targets": [260, 13, 2]},
]
ADVANTAGES: list[dict[str, Any]] = [
    {"tokens": [9, 8, 7, 6], "targets": [8, 7, 6, 5], "weights": [0.0, -0.5, 1.5, 0.75]},
    {"tokens": [301, 302], "targets": [302, 303], "weights": [1.0, -0.25]},
]
Start = Callable[..., rs.SignalRun]


@pytest.fixture(scope="module")
def client(stack: RunningStack) -> Iterator[rs.SignalClient]:
    with rs.SignalClient(stack.new_user("numerics"), stack.base_url) as found:
        yield found


@pytest.fixture
def start(client: rs.SignalClient) -> Iterator[Start]:
    """Makes runs that are cancelled after the test."""
    made: list[rs.SignalRun] = []

    def start(**config: Any) -> rs.SignalRun:
        made.append(client.create_run("tiny", **{**CONFIG, **config}))
        return made[-1]

    yield start
    for run in made:
        run.cancel()


@pytest.fixture
def pair(start: Start, tiny_model: Path, tmp_path: Path) -> tuple[rs.SignalRun, PeftLoop]:
    """A run, and the plain loop that begins with the same adapter."""
    run = start()
    run.save_state("start")
    folder = run.download("start", tmp_path / "start")
    return run, PeftLoop(tiny_model, folder, LEARNING_RATE, WEIGHT_DECAY)


def same(found: Any, expected: dict[str, float]) -> None:
    """Every expected number is in the answer."""
    got = {name: getattr(found, name) for name in expected}
    assert got == pytest.approx(expected, rel=CLOSE), f"{got} is not {expected}"


@pytest.mark.parametrize(
    ("loss_fn", "batches"),
    [
        ("causal_lm", [TEXTS]),
        ("causal_lm", [CHATS]),
        ("causal_lm", [ROWS]),
        ("causal_lm", [TEXTS, CHATS + ROWS]),
        ("cross_entropy", [ROWS]),
        ("cross_entropy", [ADVANTAGES, CHATS]),
    ],
    ids=["text", "messages", "tokens", "accumulated", "sum", "accumulated sum"],
)
def test_training_equals_a_plain_loop(
    pair: tuple[rs.SignalRun, PeftLoop], loss_fn: str, batches: list[list[dict[str, Any]]]
) -> None:
    run, loop = pair
    losses = []
    for _ in range(5):
        for batch in batches:
            result = run.forward_backward(batch, loss_fn)
            same(result, loop.forward_backward(batch, loss_fn))
        losses.append(result.loss)
        same(run.optim_step(), loop.optim_step())
    assert len(set(losses)) == 5


def test_only_what_an_assistant_says_is_counted(
    pair: tuple[rs.SignalRun, PeftLoop], start: Start
) -> None:
    run, loop = pair
    (row, _) = loop.rows(CHATS)
    words = [target for target, weight in zip(row[1], row[2], strict=True) if weight]
    said = "three, four<|im_end|>five, six,\nseven<|im_end|>"
    assert run.detokenize(words, skip_special_tokens=False).text == said
    assert run.forward_backward(CHATS[:1]).num_tokens == len(words)
    # The same tokens by their ids are the same gradient.
    ids = start()
    as_rows = [
        {"tokens": tokens, "targets": targets, "weights": weights}
        for tokens, targets, weights in loop.rows(CHATS[:1])
    ]
    ids.forward_backward(as_rows)
    assert ids.optim_step().grad_norm == pytest.approx(run.optim_step().grad_norm, rel=1e-6)


def test_overrides_hold_for_one_step_alone(pair: tuple[rs.SignalRun, PeftLoop]) -> None:
    run, loop = pair
    steps: list[dict[str, float]] = [
        {},
        {"learning_rate": 2e-2, "weight_decay": 0.3},
        {},
        {"beta1": 0.5, "beta2": 0.9, "eps": 1e-4},
        {"grad_clip_norm": 1e-2},
        {},
    ]
    for options in steps:
        same(run.forward_backward(ROWS), loop.forward_backward(ROWS))
        same(run.optim_step(**options), loop.optim_step(**options))  # type: ignore[arg-type]
    same(run.forward_backward(TEXTS), loop.forward_backward(TEXTS))


def test_padding_order_and_splitting_change_nothing(start: Start) -> None:
    """A short row beside a long one, in any order, in one call or in several."""
    rows = [*TEXTS, *CHATS, *ROWS, {"tokens": [i % 500 + 5 for i in range(400)]}]
    shuffled = random.Random(3).sample(rows, len(rows))
    ways = [[rows], [shuffled], [[row] for row in rows], [shuffled[:4], shuffled[4:]]]
    found = []
    for way in ways:
        run = start()
        results = [run.forward_backward(batch) for batch in way]
        stepped = run.optim_step()
        after = run.forward_backward(rows)
        tokens = sum(result.num_tokens for result in results)
        found.append([tokens, math.fsum(result.loss_sum for result in results)])
        found[-1] += [stepped.grad_norm, after.loss, after.grad_norm]
        run.cancel()
    for numbers in found[1:]:
        assert numbers == pytest.approx(found[0], rel=2e-5)


def test_a_saved_adapter_gives_plain_peft_the_logprobs_of_the_server(
    pair: tuple[rs.SignalRun, PeftLoop], tiny_model: Path, tmp_path: Path
) -> None:
    run, _ = pair
    for _ in range(3):
        run.forward_backward(CHATS)
        run.optim_step(2e-2)
    chats = [[{"role": "user", "content": text}] for text in ("one", "What is the capital?")]
    run.save_state("trained")
    folder = run.download("trained", tmp_path / "trained")
    plain = PeftLoop(tiny_model, folder, 0.0, 0.0)
    for options in ({"temperature": 1.0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}):
        sampled = run.sample(chats, max_tokens=24, stop=[], n=2, seed=5, logprobs=True, **options)  # type: ignore[arg-type]
        assert sampled.weights_step == 3
        for prompt, row, chat in zip(sampled.prompt_token_ids, sampled.samples, chats, strict=True):
            expected = plain.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
            assert prompt == expected["input_ids"]
            for one in row:
                assert one.text == plain.tokenizer.decode(one.token_ids, skip_special_tokens=True)
                wanted = plain.logprobs(prompt, one.token_ids, options["temperature"])
                assert one.logprobs == pytest.approx(wanted, rel=CLOSE, abs=1e-5)


def test_token_ids_go_from_sample_into_training_without_text(start: Start) -> None:
    """The log-probability that was sampled is the loss that is trained on, token by token."""
    run = start()
    run.forward_backward(TEXTS)
    run.optim_step(2e-2)
    sampled = run.sample(
        [[7, 8, 9], [1, 300, 301, 302, 303]],
        max_tokens=20, temperature=1.0, top_p=1.0, stop=[], n=3, seed=1, logprobs=True,
    )  # fmt: skip
    rows, logprobs = [], []
    for prompt, samples in zip(sampled.prompt_token_ids, sampled.samples, strict=True):
        for one in samples:
            tokens = [*prompt, *one.token_ids]
            weights = [0.0] * (len(prompt) - 1) + [1.0] * len(one.token_ids)
            rows.append({"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights})
            logprobs += one.logprobs
    assert any(not 31 < token < 127 for row in rows for token in row["targets"])
    trained = run.forward_backward(rows, "cross_entropy")
    assert trained.num_tokens == len(logprobs) == 120
    assert trained.loss_sum == pytest.approx(-math.fsum(logprobs), rel=CLOSE)
    run.optim_step(1e-3)
    again = run.forward_backward(rows, "cross_entropy")
    assert again.loss_sum < trained.loss_sum


def test_the_loss_falls_on_the_demo_data(start: Start) -> None:
    rows = [json.loads(line) for line in PIRATE.read_text().splitlines()]
    run = start(lora_r=16, learning_rate=1e-2)
    with run.pipeline() as pipe:
        futures = []
        for step in range(24):
            batch = [rows[(8 * step + i) % len(rows)] for i in range(8)]
            futures.append(pipe.forward_backward(batch))
            pipe.optim_step()
    losses = [result.loss for result in rs.wait_all(futures, timeout=60)]
    # The tiny model is random, so it begins as a guess among its 512 tokens, or worse.
    assert losses[0] > math.log(512)
    assert math.fsum(losses[-6:]) / 6 < math.log(512) - 1, losses
