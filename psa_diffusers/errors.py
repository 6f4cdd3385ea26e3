"""The one error that the commands turn into a single line instead of a traceback."""


class InputError(ValueError):
    """What was asked cannot be done; the message is one line that names the thing, its value and what is allowed."""
