"""What a user's mistake raises; command lines print its text as one line and exit with 1."""


class UserError(Exception):
    """What was wrong, what was expected and what to do, in one line."""


class Unavailable(UserError):  # noqa: N818 - a state to report
    """This machine cannot do what was asked for: no GPU, no such instructions, a library that is not installed."""


class Stopped(Exception):  # noqa: N818 - a state to report
    """A run was told to end by signal `number`, and is saved `where` it was."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(where)
        self.number, self.where = number, where


def reason_of(error: Exception) -> str:
    """The first line of what a library said, at most 200 characters; the kind of error if it said nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
