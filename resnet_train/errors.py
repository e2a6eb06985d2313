"""The two ways in which a command ends badly. Both become one line on stderr."""


class UserError(Exception):
    """Something asked for cannot be had; the message says what, what is allowed and what to try. Exit code 2."""

    code = 2


class RunError(UserError):
    """A run that began well cannot go on (a loss that is not finite, a full disk). Exit code 1."""

    code = 1
