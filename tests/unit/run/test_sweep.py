"""Sweep files are read as a shell reads words, whatever wrote them."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import ConfigError
from pipeline.run.launch.sweep import main, read_sweep

TEXT = """# rates
name=a recipe.lr=0.1   # the published one

  name='b c' "data.root=/my pictures/100%" run_root=a\\ b
name=2024_11_29 tags=[x,#y] 'a #b' \\#c #d
"""
TRAININGS = [
    ["name=a", "recipe.lr=0.1"],
    ["name=b c", "data.root=/my pictures/100%", "run_root=a b"],
    ["name=2024_11_29", "tags=[x,#y]", "a #b", "#c"],
]


@pytest.mark.parametrize("written", [TEXT, TEXT.replace("\n", "\r\n"), "\ufeff" + TEXT, TEXT.rstrip("\n")])
def test_words_are_a_shells(written: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.txt").write_bytes(written.encode())
    assert read_sweep(tmp_path / "sweep.txt") == TRAININGS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name=a\nrecipe.lr=3\n", "Line 2 of {} gives no name="),
        ("name=a\n\nname=b\nname=a x=1\n", "Lines 1 and 4 of {} both give name=a: change one."),
        ("name=a data.root='x\n", "Line 1 of {} is not what a shell could read: No closing quotation."),
    ],
)
def test_a_line_that_cannot_be_meant_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said.format(path))):
        read_sweep(path)


def test_there_is_no_training_beyond_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.txt").write_text(TEXT)
    assert main(str(tmp_path / "sweep.txt"), "4") == 2
    assert "holds 3 trainings, and none is number 4" in capsys.readouterr().err
    assert main(str(tmp_path / "none.txt"), "1") == 2


PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.just(" "), max_size=12)


@given(st.lists(PRINTABLE, min_size=1, max_size=4))
def test_what_is_printed_is_read_by_a_shell(texts: list[str]) -> None:
    words = shlex.join(["name=x", *texts])
    assert shlex.split(words) == ["name=x", *texts]
    assert "\n" not in words


def test_a_shell_gets_every_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.txt").write_text("name=x \"run_root=a'b $HOME `c` [d]\" 'e*' ''\n")
    assert main(str(tmp_path / "sweep.txt"), "1") == 0
    script = 'eval "set -- \\"\\$@\\" $1"; shift; printf "%s|" "$@"'
    shell = ["bash", "-c", script, "x", capsys.readouterr().out, "first"]
    assert (
        subprocess.run(shell, capture_output=True, text=True, check=True).stdout
        == "first|name=x|run_root=a'b $HOME `c` [d]|e*||"
    )
