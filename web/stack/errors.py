"""The exceptions of the stack's commands."""

from __future__ import annotations


class StackError(Exception):
    """The stack cannot be started, stopped or asked; the message says how to mend it."""


class AlreadyRunsError(StackError):
    """Another supervisor has the data folder."""
