"""Figures from seconds: medians, and ratios taken round by round."""

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What the docs promise of a ratio: at least, or at most, `value`."""

    value: float
    at_most: bool = False

    def met(self, ratio):
        """Whether a ratio keeps the promise."""
        return ratio <= self.value if self.at_most else ratio >= self.value

    def __str__(self):
        return f"{'<=' if self.at_most else '>='} {self.value:g}"


def ratio(numerator, denominator):
    """Median over the rounds of one peer's seconds over another's.

    The two of a round ran one after the other, so a load that comes and goes cancels; it would not in a ratio of
    medians.
    """
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=False))


def spread(seconds):
    """Half the distance between the quartiles over the median: how restless the machine was."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / middle


def row(case, seconds, ours, against, *, slower=True, target=None, **facts):
    """One line of the table: the ratio of `against` to `ours`, or with slower=False of `ours` to `against`."""
    a, b = seconds[against], seconds[ours]
    value = ratio(a, b) if slower else ratio(b, a)
    return {
        "case": case,
        "against": against,
        "ours_s": statistics.median(b),
        "theirs_s": statistics.median(a),
        "rounds": min(len(a), len(b)),
        "spread": max(spread(a), spread(b)),
        "ratio": value,
        "target": None if target is None else str(target),
        "met": None if target is None else target.met(value),
        **facts,
    }


def missing(case, against, reason):
    """The line of a peer that could not run."""
    return {"case": case, "against": against, "reason": reason}
