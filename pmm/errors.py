"""What a user's mistake raises; command lines print its text as one line and exit with 1."""


class UserError(Exception):
    """What was wrong, what was expected and what to do, in one line."""


class Unavailable(UserError):  # noqa: N818 - a state to report
    """This machine cannot do what was asked for: no GPU, no such instructions, a library that is not installed."""
