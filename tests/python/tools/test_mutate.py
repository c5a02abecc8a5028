"""tools/mutate.py: its mutants, its samples, what becomes of them in a small tree, its verdict."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "tools"))

from mutate import SURVIVORS, Journal, explanations, in_random_order, judge, try_part  # noqa: E402
from mutation.mutants import mutants_of  # noqa: E402
from mutation.parts import PARTS  # noqa: E402
from mutation.processes import run  # noqa: E402
from mutation.trees import Tree  # noqa: E402


def changes(file: str, source: str) -> list[tuple[str, str]]:
    """What is replaced by what."""
    text = source.encode()
    return [(text[m.start : m.end].decode(), m.text) for m in mutants_of(file, text)]


@pytest.mark.parametrize(
    "statement, expected",
    [
        ("return x < 2;", [("return x < 2;", "return {};"), ("<", "<="), ("2", "3")]),
        ("return 1;", [("1", "0")]),
        ("return;", [("return;", ";")]),
        ("if (a && b) f(x);", [("a && b", "!(a && b)"), ("&&", "||"), ("f(x);", ";")]),
        ("if (a == b) {}", [("==", "!=")]),
        ("if (auto m = f()) {}", []),
        ("while (!a) x += 0.5;",
         [("!a", "!(!a)"), ("x += 0.5;", ";"), ("+=", "-="), ("0.5", "1.5")]),
        ("bool c = !a;", [("!", "")]),
        ('throw Error("1 < 2" + a);', [('throw Error("1 < 2" + a);', ";")]),
        ("std::array<int, 3> a; a.reserve(n);", []),
        ("static_assert(sizeof(int) == 4); // a < b", []),
    ],
)  # fmt: skip
def test_mutants_of_cpp(statement, expected):
    assert changes("a.cpp", f"void f() {{ {statement} }}") == expected


@pytest.mark.parametrize(
    "statement, expected",
    [
        ("return x <= 2", [("return x <= 2", "return None"), ("<=", "<"), ("2", "3")]),
        ("return None", []),
        ("if not a: f(x)", [("not a", "not (not a)"), ("f(x)", "pass")]),
        ("if a is not b: return", [("is not", "is"), ("return", "pass")]),
        ("b = 1 if a or c else x // 2", [("1", "0"), ("a or c", "not (a or c)"), ("or", "and"),
                                         ("//", "*"), ("2", "3")]),
        ("b = [x for x in y if x]", [("x", "not (x)")]),
        ("a.b = True", [("a.b = True", "pass"), ("True", "False")]),
        ("raise ValueError(f'{1 + 1}')", [("raise ValueError(f'{1 + 1}')", "pass")]),
        ("'''1 < 2'''", []),
        ("a: tuple[1] = b", []),
    ],
)  # fmt: skip
def test_mutants_of_python(statement, expected):
    assert changes("a.py", f"def f():\n    {statement}\n") == expected


def test_a_mutant_is_named_by_its_function_and_lines():
    source = b"class A:\n    def f(self):\n        return g(\n            1\n        )\n"
    whole, number = mutants_of("a.py", source)
    assert whole.name == ("a.py", "A.f", "return g( 1 )", "return None")
    assert number.name == ("a.py", "A.f", "1", "0")
    assert number.applied(source) == source.replace(b"1", b"0")
    (cpp,) = mutants_of("a.cpp", b"int A::f() const { return 1; }")
    assert cpp.function == "A::f"


def test_every_mutant_of_the_parts_changes_its_file():
    for part in PARTS.values():
        for file, tests in part.items():
            source = (ROOT / file).read_bytes()
            mutants = mutants_of(file, source)
            assert mutants and all(mutant.applied(source) != source for mutant in mutants), file
            for test in tests:
                cpp, python = ROOT / "tests/cpp" / f"{test}.cpp", ROOT / "tests/python" / test
                assert cpp.exists() or python.is_file(), test


def test_every_reason_belongs_to_a_mutant():
    names = {
        m.name for p in PARTS.values() for f in p for m in mutants_of(f, (ROOT / f).read_bytes())
    }
    explained = explanations(SURVIVORS)
    assert explained.keys() <= names
    assert all(":" in why for why in explained.values()), "kind: reason"


def test_samples_are_of_the_seed_and_of_all_files():
    sources = {"a.py": b"f(1)\n" * 10, "b.py": b"f(1)\n" * 100}
    mutants = [m for file, source in sources.items() for m in mutants_of(file, source)]
    order = in_random_order(mutants, seed=1)
    assert order == in_random_order(mutants, seed=1) != in_random_order(mutants, seed=2)
    assert set(order) == set(mutants)
    assert 3 <= sum(m.file == "a.py" for m in order[:44]) <= 5  # of 220


SMALL = """def small(x):
    print(end="")
    return x > 0
"""
SMALL_TEST = """from small_numbers import small
def test_small():
    assert small(1) and not small(0)
"""
FILE, TESTS = "python/small_numbers.py", ["test_small.py"]


@pytest.fixture
def small(tmp_path):
    """A checkout with one Python module and its test, and the copy of it."""
    checkout, copy = tmp_path / "checkout", tmp_path / "copy"
    for path, text in ((FILE, SMALL), ("tests/python/test_small.py", SMALL_TEST)):
        (checkout / path).parent.mkdir(parents=True)
        (checkout / path).write_text(text)
    shutil.copytree(checkout / "python", copy / "python")
    environment = {"PYTHONPATH": str(copy / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    return Tree(copy, checkout, environment=environment)


def mutants_in(tree: Tree, file: str) -> list:
    return mutants_of(file, (tree.checkout / file).read_bytes())


def test_a_small_run(small, tmp_path):
    journal = Journal(tmp_path / "journal")
    outcomes = try_part({FILE: TESTS}, mutants_in(small, FILE), 0, small, journal, "small")
    found = {mutant.after: outcome for mutant, outcome in outcomes.items()}
    assert found == {
        "pass": "survived",
        "return None": "killed",
        "return x >= 0": "killed",
        "return x > 1": "killed",
    }
    assert (small.sources / FILE).read_text() == SMALL


def test_a_run_goes_on_where_it_stopped(small, tmp_path):
    path = tmp_path / "journal"

    def outcomes() -> list[str]:
        mutants = mutants_in(small, FILE)
        return [*try_part({FILE: TESTS}, mutants, 2, small, Journal(path), "small").values()]

    assert outcomes() == ["survived", "killed"]
    noted = path.read_text()
    assert outcomes() == ["survived", "killed"] and path.read_text() == noted
    test = small.checkout / "tests/python/test_small.py"
    test.write_text(SMALL_TEST + "def test_printed(capsys):\n    test_small()\n")
    assert outcomes() == ["survived", "killed"]
    assert path.read_text().count("survived") == 2  # tried again
    assert path.read_text().count("killed") == 1
    test.write_text("def test():\n    pass\n")
    for folder in (small.checkout, small.sources):
        (folder / FILE).write_text("# another file\n" + SMALL)
    assert outcomes() == ["survived", "survived"]


def test_what_does_not_compile_is_no_mutant(tmp_path):
    source = "struct A { explicit A(int); };\nA f(int x) { return A(x + 1); }\n"
    (tmp_path / "a.cpp").write_text(source)
    build = [("g++", "-fsyntax-only", tmp_path / "a.cpp")]
    tree = Tree(tmp_path, tmp_path, build=build)
    mutants = mutants_in(tree, "a.cpp")
    outcomes = try_part({"a.cpp": []}, mutants, 2, tree, Journal(tmp_path / "j"), "cpp")
    assert [mutant.text for mutant in outcomes] == ["-", "0"]


def test_tests_that_fail_without_a_mutant_stop_the_run(small):
    (small.checkout / "tests/python/test_small.py").write_text("def test(): assert 0\n")
    with pytest.raises(RuntimeError, match="without a mutant failed"):
        small.try_out(mutants_in(small, FILE)[0], TESTS)


def test_a_command_is_ended_with_what_it_started():
    code = "import subprocess, sys; subprocess.run(['sleep', '1234.5'])"
    assert run([sys.executable, "-c", code], 1)[0] == "timeout"
    assert subprocess.run(["pgrep", "-x", "-f", "sleep 1234.5"]).returncode == 1


def test_the_verdict(capsys):
    mutants = mutants_of("a.py", b"f(1)\ng(2)\nh(3)\ni(4)\nj(5)\n")
    outcomes = dict.fromkeys(mutants, "killed")
    names = {mutant.name for mutant in mutants}
    assert judge(outcomes, {}, names, "all") == []
    assert "10 mutants  100.0 % killed" in capsys.readouterr().out
    outcomes[mutants[0]] = "survived"
    (survived,) = judge(outcomes, {}, names, "one")
    assert survived == "survived: a.py, :\n    f(1)\n    pass"
    assert judge(outcomes, {mutants[0].name: "equivalent: f"}, names, "known") == []
    assert "{'equivalent': 1}" in capsys.readouterr().out
    (stale,) = judge(outcomes, dict.fromkeys((m.name for m in mutants[:2]), "as: is"), names, "st")
    assert stale.startswith("explained, but killed: a.py, :\n    f(1)\n    f(0)")
    outcomes[mutants[1]] = "survived"
    under, *_ = judge(outcomes, dict.fromkeys((m.name for m in mutants[:2]), "as: is"), names, "u")
    assert under == "u: 80.0 % killed, wanted 90 %"
    (gone,) = judge({}, {("a.py", "", "k()", "pass"): "as: is"}, names, "gone")[1:]
    assert gone == "explained, but no mutant: a.py, :\n    k()\n    pass"
