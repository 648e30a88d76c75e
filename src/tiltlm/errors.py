"""The errors that a person can act on."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the field, the value and the remedy; the command line prints
    it without a traceback and exits with code 2.
    """


class TiltWarning(UserWarning):
    """A result is usable, but not for the reason the user may think; the message says what to do."""
