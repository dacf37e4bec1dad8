"""`hf-saq --print-completion` prints what a shell can read."""

from __future__ import annotations

import subprocess

import pytest

from hf_saq.cli import completion, main
from hf_saq.installing import how_to_install


def script_for(shell: str, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", shell])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_bash_completes_commands_and_options(capsys):
    """bash itself is asked: after `hf-saq ex`, and after `hf-saq export --no`."""
    script = script_for("bash", capsys)
    ask = (
        'complete_it() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_hf_saq; '
        'echo "${COMPREPLY[*]}"; }\n'
        "complete_it hf-saq ex\ncomplete_it hf-saq export --no\n"
    )
    outcome = subprocess.run(["bash", "-c", script + "\n" + ask], capture_output=True, text=True, check=True)
    assert outcome.stdout.split("\n")[:2] == ["export", "--no-check"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell, capsys):
    script = script_for(shell, capsys)
    assert all(name in script for name in ("inspect", "dequantize", "export"))


def test_directories_complete_directories(capsys):
    """In the words of the script: the first argument of `pack` completes directories, the shell's number does not."""
    script = script_for("bash", capsys)
    assert "_shtab_hf_saq_pack_pos_0_COMPGEN=_shtab_compgen_dirs" in script
    assert "_shtab_hf_saq_export_pos_1_COMPGEN=_shtab_compgen_dirs" in script


def test_without_shtab(monkeypatch, capsys):
    monkeypatch.setattr(completion, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", "bash"])
    expected = f"hf-saq: error: --print-completion needs shtab: {how_to_install('completion')}\n"
    assert stopped.value.code == 1 and capsys.readouterr().err == expected
