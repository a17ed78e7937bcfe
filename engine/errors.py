"""The error that a user can do something about."""


class UserError(ValueError):
    """Something the user can mend; the message is one line."""
