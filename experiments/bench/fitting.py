"""The largest batch that a device's memory holds."""


def fitting(make, batch):
    """make(batch), batch and None; for "largest" the last power of two times 16 that runs, and why twice that does not.

    Args:
      make: builds the work for a batch; called, that runs.
    """
    why = None
    if batch == "largest":
        batch = 16
        while (why := _refused(make, 2 * batch)) is None:
            batch *= 2
    return make(batch), batch, why


def _refused(make, batch):
    """Why it does not run. A function of its own: the error holds the trial's arrays until its `except` is left."""
    try:
        make(batch)()
    except Exception as error:  # a full memory, as a rule; but what did run counts whatever it is
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
