"""Chat templates: helpers, whitespace, the sandbox, errors."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from schemas.errors import SignalError
from workers.text.chat import ChatTemplate, read_chat_template

HI = [{"role": "user", "content": "a <b> é"}]


def render(source: str, **special_tokens: str) -> str:
    return ChatTemplate(source, special_tokens).render(HI, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "a <b> é"}]'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ strftime_now('%Y') }}", datetime.now().strftime("%Y")),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        (
            "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{% generation %}x{% set y = 1 %}{% endgeneration %}{{ y is defined }}", "xFalse"),
        ("{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}", "2"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
    ],
)
def test_what_templates_expect(source: str, text: str) -> None:
    assert render(source, bos_token="<s>") == text


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[7]['role'] }}", "has no element 7"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% set n = namespace(__class__=1) %}", "may not set"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "may not set"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_a_template_that_fails_is_an_answer_about_the_messages(source: str, reason: str) -> None:
    with pytest.raises(SignalError, match=reason) as caught:
        ChatTemplate(source, {}).render(HI, add_generation_prompt=False, param="messages")
    assert (caught.value.code, caught.value.param) == ("chat_template_error", "messages")


def test_a_template_cannot_change_the_messages() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(SignalError):
        ChatTemplate("{{ messages[0].update(role='y') }}", {}).render(
            messages, add_generation_prompt=False
        )
    assert messages == [{"role": "user", "content": "x"}]


def test_the_file_goes_before_the_configuration(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert read_chat_template(tmp_path, {}) is None
    assert read_chat_template(tmp_path, {"chat_template": "c"}) == "c"
    assert read_chat_template(tmp_path, {"chat_template": named}) == "d"
    assert read_chat_template(tmp_path, {"chat_template": named[:1]}) is None
    (tmp_path / "chat_template.jinja").write_text("f")
    assert read_chat_template(tmp_path, {"chat_template": named}) == "f"
