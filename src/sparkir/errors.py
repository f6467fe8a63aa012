"""The one exception for mistakes that a user can mend, and the hint for a mistyped name."""

import difflib
from collections.abc import Sequence


class SparkirError(Exception):
    """Something the user gave is wrong; the message says what and what to do about it.

    The command line prints the message alone, without a traceback. Programmer errors are
    assertions and ordinary exceptions instead, and keep their traceback.
    """


def did_you_mean(
    word: str, known: Sequence[str], *, listed: str = "known", cutoff: float = 0.6
) -> str:
    """The nearest of `known` as a question, or all of them after `listed` if none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else f"{listed}: {', '.join(known)}"
