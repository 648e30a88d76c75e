"""Answering at the terminal: two texts side by side, one key for an answer."""

from __future__ import annotations

from collections.abc import Callable

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from tiltlm.labels.session import KEYS, Question, Session
from tiltlm.records import shown

QUIT, UNDO = "q", "u"
HELP = "1 first is better · 2 second is better · = tie · s skip · u undo · q quit"


def answer_at_terminal(session: Session, console: Console, read_key: Callable[[], str]) -> int:
    """Ask the open questions until there are none or the person quits; every answer is kept at once.

    Args:
        read_key: the next key; "" where there is no more input, which quits.

    Returns:
        How many answers this sitting added, those taken back not counted.
    """
    before = len(session.answers)
    console.print(HELP, style="dim", markup=False, highlight=False)
    try:
        _sit(session, console, read_key)
    except (KeyboardInterrupt, EOFError):  # another way to quit: nothing is lost
        console.print("")
    return len(session.answers) - before


def _sit(session: Session, console: Console, read_key: Callable[[], str]) -> None:
    while waiting := session.open_questions:
        _show(waiting[0], len(waiting), console)
        key = _key(read_key, console)
        if key == QUIT:
            break
        if key != UNDO:
            session.answer(waiting[0], key)
        elif session.undo() is None:
            console.print("there is no answer to take back", style="yellow")


def _key(read_key: Callable[[], str], console: Console) -> str:
    """The next key that means something."""
    while True:
        key = read_key()
        if key in ("", "\x04"):  # the end of the input
            return QUIT
        if key in (QUIT, UNDO, *KEYS):
            return key
        if key.strip():
            console.print(f"{key!r} means nothing; {HELP}", style="yellow", markup=False, highlight=False)


def _show(question: Question, left: int, console: Console) -> None:
    prompt = shown(question.prompt)
    console.print(Panel(Text(prompt), title=f"question {question.number}, {left} open", title_align="left"))
    width = max(24, (console.width - 2) // 2)
    both = [Panel(Text(text), title=key, width=width) for key, text in (("1", question.first), ("2", question.second))]
    console.print(Columns(both, padding=(0, 1)))
