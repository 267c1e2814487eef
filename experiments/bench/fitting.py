"""The largest batch that a device's memory holds."""


def fitting(make, batch, is_full):
    """make(batch) and batch; for "largest" the last power of two times 16 that the device's memory holds.

    Args:
      make: builds the work for a batch; called, that runs.
      is_full: whether an error says that the memory is full.
    """
    if batch == "largest":
        batch = 16
        while _fits(make, 2 * batch, is_full):
            batch *= 2
    return make(batch), batch


def _fits(make, batch, is_full):
    """Whether it does. A function of its own: the error holds the trial's arrays until its `except` is left."""
    try:
        make(batch)()
    except Exception as error:
        if not is_full(error):
            raise
        return False
    return True
