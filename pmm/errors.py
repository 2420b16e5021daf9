"""The one exception that a user's mistake raises; command lines print its text as one line and exit with 1."""


class UserError(Exception):
    """What was wrong, what was expected and what to do, in one line."""
