"""The benchmark: peers in processes of their own, timed in turn, and figures that are ratios."""
