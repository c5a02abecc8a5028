"""Mutants: small faults in a C++ or Python source, each of which a test should notice.

The operators are the usual ones: a comparison's border, an arithmetic or logical sign, a condition
negated, a number or truth value changed, a statement removed, a value not returned. Left alone are
types, constants of the compiler, imports, decorators and the texts of messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import tree_sitter_cpp
import tree_sitter_python
from tree_sitter import Language, Node, Parser

SWAPPED = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*",
    "+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=",
    "&&": "||", "||": "&&", "and": "or", "or": "and",
    "is": "is not", "is not": "is", "in": "not in", "not in": "in",
    "true": "false", "false": "true", "True": "False", "False": "True",
}  # fmt: skip
OPERATIONS = {
    "binary_expression", "assignment_expression",
    "comparison_operator", "boolean_operator", "binary_operator", "augmented_assignment",
}  # fmt: skip
NUMBERS = {"number_literal", "integer", "float"}
CONDITIONS = {
    "if_statement", "elif_clause", "while_statement", "conditional_expression", "if_clause"
}  # fmt: skip
NEGATIONS = {"unary_expression", "not_operator"}
# What a swapped sign turns into its opposite: the negated condition would be the same mutant.
OPPOSITES = {"==", "!=", "is", "is not", "in", "not in"}
STATEMENTS = {
    "expression_statement", "throw_statement", "raise_statement", "break_statement",
    "continue_statement",
}  # fmt: skip
LEFT_ALONE = {
    "comment", "template_argument_list", "template_parameter_list", "static_assert_declaration",
    "enumerator_list", "array_declarator", "type", "type_descriptor", "decorator", "string",
    "string_literal", "import_statement", "import_from_statement", "future_import_statement",
}  # fmt: skip
# Statements without a result that a test could see: memory asked for early, what a module exports;
# and names, whose lack any test sees.
NO_RESULT = {
    "cpp": re.compile(r"[\w.>-]+\breserve\("),
    "python": re.compile(r"[\w, ]+(: [^=]+)?( = |$)"),
}
# Returned values that are nothing already, or that other operators change.
PLAIN_VALUES = {
    "number_literal", "true", "false", "null", "initializer_list", "integer", "float", "none"
}  # fmt: skip
LANGUAGES = {
    "cpp": Language(tree_sitter_cpp.language()),
    "python": Language(tree_sitter_python.language()),
}


@dataclass(frozen=True)
class Mutant:
    """The bytes from `start` to `end` of a file replaced by `text`.

    file, function, before and after (the lines that change) name it, also when other lines move.
    """

    file: str
    function: str
    before: str
    after: str
    start: int
    end: int
    text: str

    @property
    def name(self) -> tuple[str, str, str, str]:
        return (self.file, self.function, self.before, self.after)

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


def language_of(file: str) -> str:
    return "python" if file.endswith(".py") else "cpp"


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """All mutants of a source, in the order of its text."""
    language = language_of(file)
    tree = Parser(LANGUAGES[language]).parse(source)
    found = {}
    for node, function in _nodes(tree.root_node, ""):
        for start, end, text in _changes(node, language):
            first = source.rfind(b"\n", 0, start) + 1
            last = source.find(b"\n", end) if b"\n" in source[end:] else len(source)
            lines = source[first:start] + text.encode() + source[end:last]
            before, after = _on_one_line(source[first:last]), _on_one_line(lines)
            found[start, end, text] = Mutant(file, function, before, after, start, end, text)
    return [found[place] for place in sorted(found)]


def _on_one_line(text: bytes) -> str:
    return " ".join(text.decode().split())


def _nodes(node: Node, function: str) -> Iterator[tuple[Node, str]]:
    """A node and all below it, with the name of the function that they are in."""
    if node.type in LEFT_ALONE or node.type.startswith("preproc_"):
        return
    if node.type in ("function_definition", "class_definition"):
        named = node.child_by_field_name("name") or node.child_by_field_name("declarator")
        while inner := named.child_by_field_name("declarator"):
            named = inner
        outer = f"{function}." if function and node.type != "lambda_expression" else ""
        function = outer + named.text.decode()
    yield node, function
    for child in node.children:
        yield from _nodes(child, function)


def _changes(node: Node, language: str) -> Iterator[tuple[int, int, str]]:
    """(first byte, end, new text) of each mutant of this node itself."""
    kind, text = node.type, node.text.decode()
    if kind in OPERATIONS:
        for sign in _signs(node):
            other = SWAPPED.get(sign.text.decode())
            if other and not ('"' in text and other in ("-", "-=")):  # texts are added alone
                yield sign.start_byte, sign.end_byte, other
    elif kind in ("true", "false"):
        yield node.start_byte, node.end_byte, SWAPPED[text]
    elif kind in NUMBERS and re.fullmatch(r"\d+(\.\d+)?", text):
        number = float(text) if "." in text else int(text)
        yield node.start_byte, node.end_byte, str(0 if number == 1 else number + 1)
    elif kind in NEGATIONS and text.startswith(("!", "not")):
        if node.parent.type not in (*CONDITIONS, "condition_clause"):
            yield node.start_byte, node.child_by_field_name("argument").start_byte, ""
    if kind in CONDITIONS and (condition := _condition(node, language)):
        sign = "not " if language == "python" else "!"
        yield condition.start_byte, condition.end_byte, f"{sign}({condition.text.decode()})"
    yield from _without_statement(node, language)


def _signs(node: Node) -> list[Node]:
    return node.children_by_field_name("operator") + node.children_by_field_name("operators")


def _condition(node: Node, language: str) -> Node | None:
    """What decides, if its negation is a mutant of its own."""
    if node.type == "conditional_expression" and language == "python":
        condition = node.named_children[1]
    elif node.type == "if_clause":
        condition = node.named_children[0]
    else:
        condition = node.child_by_field_name("condition")
    if condition.type == "condition_clause":
        condition = condition.child_by_field_name("value")
    opposite = [sign.text.decode() in OPPOSITES for sign in _signs(condition)]
    if condition.type == "declaration" or condition.text == b"TYPE_CHECKING" or opposite == [True]:
        return None
    return condition


def _without_statement(node: Node, language: str) -> Iterator[tuple[int, int, str]]:
    text, empty = node.text.decode(), "pass" if language == "python" else ";"
    if node.type == "return_statement":
        nothing = "return None" if language == "python" else "return {};"
        if not node.named_children:
            yield node.start_byte, node.end_byte, empty
        elif node.named_children[0].type not in PLAIN_VALUES and "nullopt" not in text:
            yield node.start_byte, node.end_byte, nothing
    elif node.type in STATEMENTS and not NO_RESULT[language].match(text):
        docstring = node.named_children and node.named_children[0].type in ("string", "ellipsis")
        if not docstring or node.type != "expression_statement":
            yield node.start_byte, node.end_byte, empty
