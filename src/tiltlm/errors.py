"""The errors that a person can act on."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the field, the value and the remedy; the command line prints
    it without a traceback and exits with code 2.
    """


class TiltWarning(UserWarning):
    """A result is usable, but not for the reason the user may think; the message says what to do."""


def at_least_one(settings: object, *names: str) -> None:
    """Refuse settings whose fields of these names are below 1.

    Raises:
        InputError: naming the field and its value.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise InputError(f"{name} is {getattr(settings, name)}; it must be at least 1")


def not_negative(settings: object, *names: str) -> None:
    """Refuse settings whose fields of these names are negative or no number.

    Raises:
        InputError: naming the field and its value.
    """
    for name in names:
        if not getattr(settings, name) >= 0:
            raise InputError(f"{name} is {getattr(settings, name)}; it must not be negative")
