"""The one kind of error that is the user's to mend; commands print it as one line and end with status 2."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, the value, the remedy."""
