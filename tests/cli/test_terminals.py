"""Terminals and pipes: characters that they lack, readers that leave, Ctrl-C, options in the wrong place."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest

from hf_saq.cli import commands, main
from hf_saq.cli.commands import COMMANDS


def answering(monkeypatch, answer) -> None:
    monkeypatch.setitem(COMMANDS, "card", answer)


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", "m\\xfcller"), ("latin-1", "müller"), ("utf-8", "müller")]
)
def test_what_was_measured_is_printed_in_the_characters_that_there_are(encoding, expected, monkeypatch, capsys):
    """A name of a folder does not cost the result of an hour."""
    answering(monkeypatch, lambda args: f"{args.directory}: top1 0.5, \udcff")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert main(["card", "müller"]) == 0
    assert raw.getvalue().decode(encoding) == f"{expected}: top1 0.5, \\udcff\n"
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_is_no_error(monkeypatch, capfd):
    """As `hf-saq inspect DIR | head -1` does."""
    answering(monkeypatch, lambda args: "line\n" * 100_000)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["card", "x"]) == 0
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_an_error(monkeypatch, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    answering(monkeypatch, lambda args: "text")
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    monkeypatch.setattr(sys, "stdout", full)
    assert main(["card", "x"]) == 1 and "No space left on device" in capsys.readouterr().err
    with pytest.raises(OSError):
        full.close()


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    answering(monkeypatch, interrupted)
    assert main(["card", "x"]) == 130
    assert capsys.readouterr() == ("", "hf-saq: interrupted\n")


def test_numbers_that_json_lacks_are_null(monkeypatch, capsys):
    class Found:
        def to_dict(self) -> dict:
            return {"scale": float("nan"), "layers": ({"size": float("inf")},)}

    monkeypatch.setattr(commands, "inspect_checkpoint", lambda *_: Found())
    assert main(["inspect", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "scale": None,
        "layers": [{"size": None}],
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--json", "inspect", "x"],
            "--json is an option of inspect, eval, compare, analyze, benchmark and comes after",
        ),
        (
            ["inspect", "x", "--points", "3"],
            "unrecognized arguments: --points 3; --points is an option of analyze and",
        ),
    ],
)
def test_an_option_in_the_wrong_place_is_not_answered_with_itself(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    err = capsys.readouterr().err
    assert message in err and "did you mean" not in err
