"""Every message that a user can meet says what is wrong, with the value got, and what to do.

All places that make a ConfigError, DataError or CheckpointError are found in the syntax trees of megarq/, tools/ and
evaluation/. A message is taken apart into clauses, at colons, full stops, semicolons and question marks. (MegarqError
itself is for passing on that another rank or command has failed, which has said why.)
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megarq import errors

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("megarq", "tools", "evaluation") for path in (ROOT / folder).rglob("*.py"))
KINDS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.MegarqError) and kind is not errors.MegarqError
}
VALUE = "⟨value⟩"
ADVICE = {"suggestion", "advice", "nearest"}
"""Names, in a placeholder, of what ends in `Did you mean ..?` or `Known: ..`."""
REMEDIES = {
    *(
        "add",
        "ask",
        "change",
        "check",
        "choose",
        "convert",
        "copy",
        "correct",
        "draw",
        "end",
        "export",
        "free",
        "give",
        "go",
        "hold",
    ),
    *("import", "leave", "make", "mend", "move", "name", "number", "press", "pretokenize", "put", "quote", "remove"),
    *(
        "wait",
        "rename",
        "repeat",
        "replace",
        "resize",
        "resume",
        "run",
        "save",
        "set",
        "start",
        "train",
        "try",
        "use",
        "write",
    ),
    *("did", "expected", "known"),  # did you mean X?; expected a whole number; known: a, b
}
ABSENCES = re.compile(r"\b(no|none|neither|without|both|empty|unset|missing)\b")
"""What is said where there is no value to show."""


class Message(NamedTuple):
    place: str
    """File and line."""
    text: str
    """The message, values replaced by VALUE."""

    @property
    def clauses(self) -> list[str]:
        """Its parts, in lower case."""
        return [
            part.strip().lower()
            for part in re.split(rf"[:.;?]\s|[.?]$|(?<={VALUE})\s(?=[A-Z])", self.text)
            if part.strip()
        ]


def messages(path: Path) -> Iterator[Message]:
    """All messages that a file makes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
            assert len(node.args) == 1, f"{path}:{node.lineno}: {node.func.id} takes one message"
            yield Message(f"{path.relative_to(ROOT)}:{node.lineno}", rendered(node.args[0], constants))


def rendered(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """The text of a string expression; the module's own constants are looked up."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(rendered(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return rendered(node.value, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return rendered(node.left, constants) + rendered(node.right, constants)
    if isinstance(node, ast.IfExp):
        return rendered(node.body, constants)
    if isinstance(node, ast.Name) and isinstance(constants.get(node.id), ast.Constant):
        return rendered(constants[node.id], {})
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return f" Did you mean {VALUE}?" if names & ADVICE else VALUE


ALL = [message for path in FILES for message in messages(path)]


def test_messages_are_found():
    assert len(ALL) > 150
    assert any("DeepSpeed pipelines allow stages 0 and 1" in message.text for message in ALL)


@pytest.mark.parametrize("message", ALL, ids=lambda message: message.place)
def test_message_names_the_value_got(message):
    named = VALUE in message.text or re.search(r"--[a-z]|=\S", message.text) or ABSENCES.search(message.clauses[0])
    assert named, message.text


@pytest.mark.parametrize("message", ALL, ids=lambda message: message.place)
def test_message_says_what_to_do(message):
    remedies = [clause for clause in message.clauses[1:] if re.match(r"[a-z]*", clause)[0] in REMEDIES]
    complete_command = "the complete command" in message.clauses
    assert remedies or complete_command, message.text


@pytest.mark.parametrize("message", ALL, ids=lambda message: message.place)
def test_message_is_a_sentence(message):
    assert message.text.endswith((".", "?", VALUE)), message.text
    assert "  " not in message.text.replace("\n    ", ""), message.text
