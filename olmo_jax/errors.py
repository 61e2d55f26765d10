"""The one exception for mistakes that a person can mend; the command line prints it as one line.

Every room may import this file: it imports nothing.
"""


class UserError(Exception):
    """Bad input: the message says what was given, what is allowed, and what to do, in one line."""
