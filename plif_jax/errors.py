"""The one exception that means "the user can mend this", and what was probably meant."""

import difflib
import errno

# The operating system's refusals that are about a path, and the user's to mend: no defect of ours, no lost connection.
OF_THE_PLACE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES),
    *(errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


class UserError(ValueError):
    """A mistake in a flag, a file or a setting.

    The message is one line: what was given, what is allowed, what to do. Scripts print it without a traceback.
    """


def nearest(given: str, allowed) -> str | None:
    """The allowed name that a short or misspelt one is nearest to, whatever the case; None where none is near."""
    names = {name.lower(): name for name in allowed}
    begun = sorted((name for name in names if given and name.startswith(given.lower())), key=len)
    near = begun or difflib.get_close_matches(given.lower(), names, 1)
    return names[near[0]] if near else None
