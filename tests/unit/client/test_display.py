"""Records for people: a line for terminals, HTML for notebooks; a series, with and without matplotlib."""

from __future__ import annotations

import builtins
import sys
import types
from typing import Any

import pytest

from rewardsignal import _schemas as records

ROWS = [
    {"seq": 1, "step": 1, "source": "run", "metrics": {"loss": 2.0}},
    {"seq": None, "step": 1, "source": "user", "metrics": {"reward": 0.5}},
    {"seq": 3, "step": 2, "source": "run", "metrics": {"loss": 1.5, "<b>": 1.0}},
]


def series() -> records.RunMetrics:
    raw = {"run_id": "run_1", "step": 2, "metrics": ROWS, "has_more": False}
    return records.RunMetrics.from_dict(raw)


def test_a_record_is_a_line() -> None:
    sample = records.SampleResult.from_dict(
        {
            "samples": [[{"text": "line\nfeed" * 40, "token_ids": list(range(500))}]],
            "seq": 1,
            "metrics": {"generated_tokens": 3.14159265358979},
        }
    )
    shown = repr(sample)
    assert "\n" not in shown
    assert len(shown) < 1200
    assert "… 494 more" in shown
    assert "'generated_tokens': 3.14159}" in shown


def test_a_record_is_a_table_without_a_line_of_its_own_markup() -> None:
    evil = "<script>alert('x')</script>"
    run = records.Run.from_dict({"run_id": evil, "labels": {evil: evil}, "config": {"a": [1, 2]}})
    html = run._repr_html_()
    assert html.startswith("<table><caption>Run</caption>")
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 3
    assert html.count("<table>") == html.count("</table>")


def test_long_values_are_cut() -> None:
    rows = [{**ROWS[0], "step": step} for step in range(500)]
    raw = {"run_id": "x" * 5000, "step": 1, "metrics": rows}
    html = records.RunMetrics.from_dict(raw)._repr_html_()
    assert len(html) < 20_000
    assert "… 480 more" in html
    assert "(5,000 characters)" in html


def test_texts_of_a_sample() -> None:
    samples = [[{"text": "a"}, {"text": "b"}], [{"text": "c"}]]
    result = records.SampleResult.from_dict({"samples": samples})
    assert result.texts == ["a", "b", "c"]
    assert (result[0], result[-1]) == ("a", "c")
    assert result["samples"] == result.samples
    with pytest.raises(IndexError):
        result[2]
    with pytest.raises(KeyError):
        result["nothing"]


def test_a_series_by_name() -> None:
    assert series().names() == ["loss", "reward", "<b>"]
    assert series().series("loss") == ([1, 2], [2.0, 1.5])
    assert series().series("reward") == ([1], [0.5])
    with pytest.raises(KeyError, match="loss, reward"):
        series().series("accuracy")
    empty = records.RunMetrics.from_dict({"run_id": "r", "metrics": []})
    with pytest.raises(KeyError, match="no metrics yet"):
        empty.series("loss")


def test_plots_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"rewardsignal\[plot\]"):
        series().plot()


class Axes:
    """What of matplotlib's axes a plot uses, and what it was told."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, Any, dict[str, Any]]] = []
        self.title = ""

    def plot(self, steps: Any, values: Any, **options: Any) -> None:
        self.lines.append((steps, values, options))

    def set_title(self, title: str) -> None:
        self.title = title

    def set_xlabel(self, label: str) -> None:
        assert label == "step"

    def legend(self) -> None:
        assert self.lines

    def grid(self, **_: Any) -> None: ...


def test_a_plot_draws_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where matplotlib is installed, the next test draws with it."""
    pyplot = types.SimpleNamespace(subplots=lambda **_: (None, Axes()))
    monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace(pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    axes = series().plot()
    assert axes.lines == [([1, 2], [2.0, 1.5], {"label": "loss", "marker": "."})]
    assert axes.title == "run_1"
    own = Axes()
    assert series().plot("reward", "loss", ax=own) is own
    assert [options["label"] for _, _, options in own.lines] == ["reward", "loss"]


def test_a_plot_with_matplotlib() -> None:
    import matplotlib

    matplotlib.use("Agg")
    axes = series().plot("loss", "reward")
    assert [line.get_label() for line in axes.get_lines()] == ["loss", "reward"]
    assert list(axes.get_lines()[0].get_ydata()) == [2.0, 1.5]
