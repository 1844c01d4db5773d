"""Tables, times and sizes: aligned, cut only where there is a width, and never in control of a terminal."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewardsignal._cli import output
from rewardsignal._cli.output import cells, fit, printable, seconds_between, size, styled, table

TEXT = st.text(max_size=12)
ROWS = st.integers(1, 5).flatmap(
    lambda columns: st.lists(
        st.lists(TEXT, min_size=columns, max_size=columns), min_size=1, max_size=5
    )
)


def test_a_table() -> None:
    rows = [("RUN", "NAME", "STEP"), ("run_1", None, 7), ("run_22", "a name", 10)]
    assert table(rows, None) == ["RUN     NAME    STEP", "run_1   -       7", "run_22  a name  10"]


def test_wide_and_combining_characters() -> None:
    assert cells("日本") == 4
    assert cells("e\u0301") == 1
    assert table([("日本", "x"), ("abcde", "y")], None) == ["日本   x", "abcde  y"]


def test_the_widest_columns_are_cut_and_the_first_one_last() -> None:
    rows = [("run_0123456789abcdef", "a very long name indeed", "ready")]
    assert table(rows, 40) == ["run_0123456789abcdef  a very lon…  ready"]
    # What is still too wide ends where the terminal does.
    assert table(rows, 30) == ["run_0123456789abcdef  a ver… …"]
    assert table(rows, 10) == ["run_01234…"]


def test_no_rows() -> None:
    assert table([("RUN", "NAME")], None) == ["RUN  NAME"]
    assert table([], None) == []


def test_others_words_do_not_move_the_cursor() -> None:
    assert printable("a\x1b[2J\nb\x9b") == "a�[2J�b�"
    assert printable("a\n\tb\x07", keep="\n\t") == "a\n\tb�"


@given(ROWS)
def test_columns_begin_at_the_same_cell(rows: list[list[str]]) -> None:
    lines = table([[*row, "|"] for row in rows], None)
    assert len({cells(line[: line.rindex("|")]) for line in lines}) == 1
    for row, line in zip(rows, lines, strict=True):
        assert all(printable(cell) in line for cell in row)


@given(ROWS, st.integers(2, 60))
def test_no_line_is_wider_than_the_terminal(rows: list[list[str]], width: int) -> None:
    assert all(cells(line) <= width for line in table(rows, width))


@given(TEXT.map(printable), st.integers(1, 20))
def test_fit_takes_exactly_its_cells(text: str, width: int) -> None:
    assert cells(fit(text, width)) == width


def test_sizes_and_times() -> None:
    assert [size(n) for n in (0, 999, 1000, 19_600_000, 5 * 10**12)] == [
        "0 bytes", "999 bytes", "1.0 kB", "19.6 MB", "5000.0 GB",
    ]  # fmt: skip
    assert seconds_between("2026-01-02T03:04:05.000Z", "2026-01-02T03:04:06.500Z") == 1.5
    assert seconds_between(None, "2026-01-02T03:04:06.500Z") is None
    assert output.local_time(None) is None


@pytest.mark.parametrize(
    ("terminal", "environment", "bold"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False),
     (True, {"TERM": "dumb"}, False)],
)  # fmt: skip
def test_style_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, environment: dict[str, str], bold: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert (styled("x", bold=True) != "x") == bold
