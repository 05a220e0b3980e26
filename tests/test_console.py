"""Text from outside is shown as it is: a rule over all source files, and what the helper does."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from harness.console import complain, say, sentence, stdout, styled, table, to_file
from harness.progress import counting, track

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "run.py", ROOT / "train.py"]
SOURCES += [p for room in ("harness", "methods", "kernels", "dynact") for p in (ROOT / room).rglob("*.py")]
TAG = re.compile(r"\[(/[a-z ]*|(not )?(bold|dim|italic|red|green|yellow|cyan|blue|magenta|white|link)[a-z _=]*)\]")


def breaches(tree: ast.AST, makes_consoles: bool = False) -> list[str]:
    """What in a file could let text be read as style, or fail on a character."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and TAG.search(node.value):
            found.append(f"line {node.lineno}: a style inside of text")
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name == "Console" and not makes_consoles:
            found.append(f"line {node.lineno}: a console of its own")
        if name == "print" and isinstance(node.func, ast.Name):
            found.append(f"line {node.lineno}: print")
        if name in ("from_markup", "render_markup") or given.get("markup") is True:
            found.append(f"line {node.lineno}: markup")
        if name == "TextColumn" and given.get("markup") is not False:
            found.append(f"line {node.lineno}: markup of a progress bar")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_lets_text_be_style(path: Path) -> None:
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):  # docstrings are not printed
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    assert breaches(tree, makes_consoles=path.name == "console.py") == []


@pytest.mark.parametrize(
    "bad",
    [
        "Console(stderr=True)",
        "print(name)",
        "console.print(f'[bold]{name}[/]')",
        "console.print(f'[bold red]error:[/] {error}')",
        "Text.from_markup(name)",
        "console.print(name, markup=True)",
        "TextColumn('{task.description}')",
    ],
)
def test_the_rule_can_fail(bad: str) -> None:
    assert breaches(ast.parse(bad))


NASTY = ["/data/[/v2]/run[final]", "[bold]x[/bold]", "a [link=x]b", ":smile:", "[red", "\\[x]", "{0} %s"]


@pytest.mark.parametrize("text", NASTY)
def test_text_is_shown_as_it_is(text: str) -> None:
    file = io.StringIO()
    console = to_file(file, width=200)
    say(console, ("error:", "bold red"), f" {text}")
    listing = table(f"about {text}")
    listing.add_column(text)
    listing.add_column("x" * 40)
    listing.add_row(text)
    listing.add_row(styled(text, style="red"))
    console.print(listing)
    assert file.getvalue().startswith(f"error: {text}\n")
    assert file.getvalue().count(text) == 5


def test_a_line_is_never_wrapped() -> None:
    file = io.StringIO()
    say(to_file(file, width=40), "rows: /a folder with/a long path/" * 5)
    assert file.getvalue().count("\n") == 1


def test_control_characters_and_bytes_that_are_no_text_are_shown_as_codes() -> None:
    file = io.StringIO()
    say(to_file(file), "a\x1b[31mred\rb\udce9")
    assert file.getvalue() == "a\\x1b[31mred\\x0db\\udce9\n"


def test_a_terminal_that_lacks_a_character_gets_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    console = stdout()
    say(console, "±0.1 été")
    console.file.flush()
    assert buffer.getvalue() == b"\\xb10.1 \\xe9t\\xe9\n"


def test_an_error_is_one_sentence(capsys: pytest.CaptureFixture) -> None:
    complain(ValueError("no folder\n   [/v2] here"))
    assert capsys.readouterr().err == "error: no folder [/v2] here\n"
    assert sentence(KeyError()) == "KeyError"


def terminal(file: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm")  # a dumb one gets no bars
    return Console(file=file, width=200, force_terminal=True, markup=False)


def test_a_bar_shows_its_title_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("harness.progress.stderr", lambda: terminal(file, monkeypatch))
    monkeypatch.setattr("harness.progress.PATIENCE_S", 0.0)
    with counting(3, "training [/v2] {x}", done=1, stays=True) as advance:
        advance()
        assert list(track(range(2), "inside [/v3]")) == [0, 1]
        advance.at(3)
    assert "training [/v2] {x}" in file.getvalue()
    assert "3/3" in file.getvalue()
    assert "inside [/v3]" in file.getvalue()


def test_a_bar_is_shown_only_for_what_takes_time_and_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("harness.progress.stderr", lambda: to_file(file, width=200))
    monkeypatch.setattr("harness.progress.PATIENCE_S", 0.0)
    assert list(track(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    assert file.getvalue() == "", "no terminal"
    monkeypatch.setattr("harness.progress.stderr", lambda: terminal(file, monkeypatch))
    monkeypatch.setattr("harness.progress.PATIENCE_S", 60.0)
    with counting(2, "quick", still=True) as advance:
        advance()
        advance.at(2, total=4)
    assert file.getvalue() == "", "over at once"
    with pytest.raises(RuntimeError), counting(2, "broken") as advance:
        monkeypatch.setattr("harness.progress.PATIENCE_S", 0.0)
        advance()
        raise RuntimeError
    with counting(4, "timing", still=True) as advance:
        advance()
        advance.at(2, total=8)
    assert "2/8" in file.getvalue(), "the broken one has let go of the terminal"
