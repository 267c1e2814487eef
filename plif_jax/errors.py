"""The one exception that means "the user can mend this", what was probably meant, and what others say in a line."""

import difflib
import errno

# The operating system's refusals that are about a path, and the user's to mend: no defect of ours, no lost connection.
PATH_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES),
    *(errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


class UserError(ValueError):
    """A mistake in a flag, a file or a setting.

    The message is one line, whatever was given: what that was, what is allowed, what to do. Scripts print it without a
    traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(given: str, allowed) -> str | None:
    """The allowed name that a short or misspelt one is nearest to, whatever the case; None where none is near.

    Short for one are its beginning, one of its words and its initials: lr for learning_rate.
    """
    names, short = {name.lower(): name for name in allowed}, given.lower()

    def is_short_for(name):
        words = name.split("_")
        return name.startswith(short) or short in (*words, "".join(word[:1] for word in words))

    shortened = filter(is_short_for, names) if short else ()
    near = sorted(shortened, key=lambda name: (not name.startswith(short), len(name)))
    near = near or difflib.get_close_matches(short, names, 1)
    return names[near[0]] if near else None
