"""A recording of noise, the same for every peer."""

import numpy as np

EVENT = np.dtype([("t", np.int64), ("x", np.int16), ("y", np.int16), ("p", np.bool_)])


def recording(events, height, width):
    """`events` events, uniform over the pixels of a sensor, in order of time; microseconds."""
    rng = np.random.default_rng(2020)
    out = np.empty(events, EVENT)
    out["t"] = np.sort(rng.integers(0, 1_000_000, events))
    out["x"], out["y"] = rng.integers(0, width, events), rng.integers(0, height, events)
    out["p"] = rng.integers(0, 2, events)
    return out
