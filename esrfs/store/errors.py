"""The one error that store code raises for people."""

from __future__ import annotations

import enum


class Problem(enum.StrEnum):
    """Classes of trouble; the command line turns each into its own exit code."""

    NOT_A_STORE = "not_a_store"
    REFUSED = "refused"
    """esrfs could, but must not: a store within a store, a tree that another program mirrors …"""
    UNSUPPORTED = "unsupported"
    """The filesystem, or this version of esrfs, can't."""
    PERMISSION = "permission"
    """The store, or part of it, belongs to another user."""
    BUSY = "busy"
    DAMAGED = "damaged"
    NOT_FOUND = "not_found"


class StoreError(Exception):
    """What happened, to which file, what esrfs did about it, and what to do: one or two sentences for people."""

    def __init__(self, message: str, problem: Problem) -> None:
        super().__init__(message)
        self.message = message
        self.problem = problem
