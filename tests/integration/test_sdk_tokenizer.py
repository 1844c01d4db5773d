"""`run.tokenizer` against the server's own answers: every id, every text, every template."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rewardsignal as rs
from tests.support import stack as stacks
from tests.support.stack import RunningStack

SMOLLM = Path(".signal/models/smollm2-135m-instruct")
TEXTS = (
    "Hello, world!", "", " ", "  two  spaces\n\ttab\n", "naïve café — “quotes” …", "日本語と🙂 emoji 👩‍🔬",
    "<|im_start|>user\nhi<|im_end|>", "a<|endoftext|>b", "1234567890 3.14", "x" * 300, "\x00\x7f",
)  # fmt: skip
CHATS = (
    [{"role": "user", "content": "Say hello."}],
    [
        {"role": "system", "content": "Be brief. <b>&amp;</b>"},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": "Ahoy 🙂"},
        {"role": "user", "content": "   again "},
    ],
)


@pytest.fixture(scope="module")
def run(stack: RunningStack) -> Iterator[rs.SignalRun]:
    with rs.SignalClient(stack.api_key, stack.base_url) as client:
        found = client.create_run("tiny", lora_r=4)
        yield found
        found.cancel()


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rs.SignalRun]:
    """A run on the demo's model, which no worker needs to load: nothing is computed."""
    if not (SMOLLM / "tokenizer.json").is_file():
        pytest.skip("SmolLM2 is not here: make model")
    data_dir = tmp_path_factory.mktemp("tokenizer") / "data"
    running = stacks.up(data_dir, "--model", f"smollm2={SMOLLM.resolve()}", "--devices", "cpu:1x1")
    try:
        with rs.SignalClient(running.api_key, running.base_url) as client:
            found = client.create_run("smollm2", lora_r=4)
            yield found
            found.cancel()
    finally:
        stacks.down(data_dir)


def agrees(run: rs.SignalRun) -> None:
    own = run.tokenizer
    assert own is run.tokenizer
    for special in (True, False):
        ids = run.tokenize(TEXTS, add_special_tokens=special).token_ids
        assert [own.encode(text, add_special_tokens=special) for text in TEXTS] == ids
        for skip in (True, False):
            texts = run.detokenize(ids, skip_special_tokens=skip).text
            assert [own.decode(one, skip_special_tokens=skip) for one in ids] == texts
    for chat in CHATS:
        for prompt in (True, False):
            expected = run.apply_chat_template(chat, add_generation_prompt=prompt)
            assert own.render(chat, add_generation_prompt=prompt) == expected.text
            assert own.apply_chat_template(chat, prompt) == expected.token_ids
    info = run.tokenizer_info()
    assert own.eos_token_id == info.eos_token_id
    assert own.pad_token_id == info.pad_token_id
    assert own.vocab_size == len(own) <= info.vocab_size


def test_the_tiny_model(run: rs.SignalRun) -> None:
    agrees(run)
    assert repr(run.tokenizer).startswith("<Tokenizer of tiny, ")


@pytest.mark.timeout(240)
def test_smollm2(smollm: rs.SignalRun) -> None:
    agrees(smollm)


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ raise_exception('No such role.') }}", "No such role"), (None, "no chat template")],
)
def test_what_a_template_refuses_is_told(
    stack: RunningStack, template: str | None, message: str
) -> None:
    with rs.SignalClient(stack.api_key, stack.base_url) as client:
        tokenizer = rs.Tokenizer(client.tokenizer_files("tiny"))
    tokenizer._template_source = template
    with pytest.raises(ValueError, match=message):
        tokenizer.render(CHATS[0])


def test_it_needs_neither_torch_nor_transformers(run: rs.SignalRun, stack: RunningStack) -> None:
    script = (
        "import sys, rewardsignal as rs\n"
        "run = rs.SignalClient().run(sys.argv[1])\n"
        "print(run.tokenizer.apply_chat_template([{'role': 'user', 'content': 'a'}]))\n"
        "assert not {'torch', 'transformers', 'numpy', 'flask'} & set(sys.modules)\n"
    )
    environment = {"SIGNAL_BASE_URL": stack.base_url, "SIGNAL_API_KEY": stack.api_key}
    done = subprocess.run(
        [sys.executable, "-c", script, run.run_id],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = run.apply_chat_template([{"role": "user", "content": "a"}]).token_ids
    assert done.stdout.strip() == str(expected)
