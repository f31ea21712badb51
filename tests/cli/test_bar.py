from __future__ import annotations

import io

import pytest

from ray_tracking.cli.bar import Bar


def test_plain_lines_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Bar("Reading [3]\x1b", 4_000_000, live=False, clock=lambda: now[0]) as bar:
        for second in range(1, 26):
            now[0] = float(second)
            bar.advance(100_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Reading [3]?  1.0 MB of 4.0 MB (25 %)",
        "Reading [3]?  2.0 MB of 4.0 MB (50 %)",
    ]


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("Reading", 0, live=False) as bar:
        bar.advance(5)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_that_goes_away_and_takes_nothing_from_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Bar("Writing m.pt", 2_000_000) as bar:
        bar.advance(1_000_000)
        bar.say("to stdout")
    assert capsys.readouterr().out == "to stdout\n"
    assert "Writing m.pt" in terminal.getvalue()
    assert "1.0/2.0 MB" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")


def test_things_instead_of_bytes_and_a_total_that_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    with Bar("Syncing", 0, unit="records", live=False, clock=lambda: now[0]) as bar:
        for second, done in ((5.0, 10), (11.0, 20)):
            now[0] = second
            bar.reach(done, 4000)
    assert capsys.readouterr().err == "Syncing  20 of 4000 records (0 %)\n"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Bar("Syncing", 0, unit="records") as bar:
        bar.reach(1500, 4000)
    assert "1500/4000" in terminal.getvalue()
    assert " records" in terminal.getvalue()
