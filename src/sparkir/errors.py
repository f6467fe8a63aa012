"""The one exception for mistakes that a user can mend."""


class SparkirError(Exception):
    """Something the user gave is wrong; the message says what and what to do about it.

    The command line prints the message alone, without a traceback. Programmer errors are
    assertions and ordinary exceptions instead, and keep their traceback.
    """
