"""The error that a user can do something about."""


class UserError(ValueError):
    """Its message is one line: what was wrong and what to do. The command ends with code 2."""
