"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in a flag, a file or a setting.

    The message is one line: what was given, what is allowed, what to do. Scripts print it without a traceback.
    """
