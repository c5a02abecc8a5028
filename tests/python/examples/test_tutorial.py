"""The tutorial: its pieces are one program that prints what the page says, in both languages."""

import ast
import re

import pytest
from test_readme import ROOT, blocks

ENGLISH, CHINESE = ROOT / "docs" / "tutorial.md", ROOT / "docs" / "zh" / "tutorial.md"
PRINTED = r"(?:^# .*\n)+\Z"  # the comments at the end of a piece
NUMBER = r"\d+(?:\.\d+)?"


def printed(piece: str) -> list[str]:
    found = re.search(PRINTED, piece, flags=re.MULTILINE)
    return found[0].replace("# ", "").split() if found else []


def assert_prints(output: str, wanted: list[str]) -> None:
    """The same words; numbers to a tenth or to one of their last digit: trainings differ a bit."""
    got = output.split()
    assert [re.sub(NUMBER, "0", word) for word in got] == [
        re.sub(NUMBER, "0", word) for word in wanted
    ]
    for word, value in zip(got, wanted, strict=True):
        for mine, theirs in zip(re.findall(NUMBER, word), re.findall(NUMBER, value), strict=True):
            last = 10.0 ** -len(theirs.partition(".")[2])
            share = 0.1 if "." in theirs else 0
            assert float(mine) == pytest.approx(float(theirs), rel=share, abs=1.01 * last), output


def test_the_pieces_print_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for piece in blocks("python", ENGLISH):
        exec(piece, names)
        assert_prints(capsys.readouterr().out, printed(piece))
    shown = re.findall(r"\]\(pictures/(.+)\)", ENGLISH.read_text())
    assert shown and set(shown) == {path.name for path in (tmp_path / "build").glob("*.png")}


def test_both_languages_have_the_same_pieces():
    pages = [blocks("python", page) for page in (ENGLISH, CHINESE)]
    for english, chinese in zip(*pages, strict=True):
        assert ast.dump(ast.parse(english)) == ast.dump(ast.parse(chinese))
        assert printed(english) == printed(chinese)
