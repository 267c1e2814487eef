"""The table, benchmark.json and the chart."""

import json
from pathlib import Path

from matplotlib.ticker import LogLocator, NullFormatter

from plif_jax import files
from plif_jax.curves import COLORS, figure


def line(row):
    """One row as text."""
    if "reason" in row:
        return f"{row['case']:<52} {row['against']:<32} not measured: {row['reason']}"
    verdict = "" if row["met"] is None else ("met" if row["met"] else "MISSED")
    return (
        f"{row['case']:<52} {row['against']:<32} {_figure(row['ours_s'], row):>10} {_figure(row['theirs_s'], row):>10} "
        f"{_ratio(row):>7}  {row['target'] or '':<8} {verdict:<6} {row['rounds']:3d} {row['spread']:5.0%}"
        + (f"  not memory, but {row['stopped']}" if "stopped" in row else "")
    )


LEGEND = (
    "ours, theirs: time of a call, of train and infer per sample. ratio: theirs over ours, how many times faster ours\n"
    "is, of the matrix product the share of its rate; but ours over theirs of copy, bare steps and memory, whose rows\n"
    "'T=b over T=a' tell how many times the memory of T=a is needed at T=b. batch=a / b: ours, theirs, the\n"
    "largest that fit. n: rounds; ±: half the distance between the quartiles over the median, of the more restless peer"
)
HEADER = (
    f"{'case':<52} {'against':<32} {'ours':>10} {'theirs':>10} {'ratio':>7}  {'target':<8} {'':<6} {'n':>3} {'±':>5}"
)


def _ratio(row):
    """A ratio in two decimals, or in as many as tell it from its target."""
    found, target = row["ratio"], _target(row)
    for digits in range(2, 6):
        text = f"{found:.{digits}f}"
        if float(text) != target or found == target:
            break
    return text


def _target(row):
    return float(row["target"].split()[1]) if row["target"] else None


def _figure(value, row):
    if "unit" in row:
        return f"{value:.{0 if row['unit'] == 'MiB' else 2}f} {row['unit']}"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def ran_on(peers):
    """Devices and versions of the peers, a line for each that differs."""
    return sorted(
        {
            f"{facts['device']}, {facts['threads']} CPU threads: "
            + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
            for facts in peers.values()
        }
    )


def write(folder, machine, rows, peers):
    """Writes benchmark.json and, where something was measured, benchmark.png into a folder; returns their names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "peers": peers, "rows": rows}, indent=1, sort_keys=True)
    files.write(folder / "benchmark.json", text + "\n")
    if measured := [row for row in rows if "ratio" in row]:
        files.write_figure(chart(measured, machine, peers), folder / "benchmark.png", dpi=150)
    return "benchmark.json and benchmark.png" if measured else "benchmark.json"


def chart(rows, machine, peers):
    """A bar from 1 to each ratio, on a logarithmic axis; a black tick marks its target."""
    fig, ax = figure(width=9, height=1.4 + 0.3 * max(len(rows), 1))
    colors = {None: "tab:gray", True: COLORS[0], False: COLORS[1]}
    for y, row in enumerate(rows):
        target = _target(row)
        ax.barh(y, row["ratio"] - 1, left=1, color=colors[row["met"]], height=0.7)
        if target:
            ax.plot(2 * [target], [y - 0.4, y + 0.4], color="black", linewidth=2)
        offset, side = ((3, 0), "left") if row["ratio"] >= 1 else ((-3, 0), "right")
        # In the bar's colour, for at a ratio of 1 there is no bar; and on white, for a target's tick may lie there.
        white = {"facecolor": "white", "linewidth": 0, "pad": 1}
        text = {"color": colors[row["met"]], "bbox": white, "fontsize": 7}
        at = {"xytext": offset, "textcoords": "offset points", "ha": side, "va": "center"}
        ax.annotate(_ratio(row), (row["ratio"], y), **at, **text)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [f"{row['case']} : {row['against']}" for row in rows], fontsize=7)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", labelsize=8)
    ax.use_sticky_edges = False  # the bars' common start is no edge of the chart
    ax.margins(x=0.12, y=0.01)
    ax.set_xlabel(
        "theirs over ours, or share of the matrix product's rate: more is better\n"
        "copy, bare steps, memory: ours over theirs, less is better\n"
        "blue: target met, orange: missed, gray: none set; black tick: the target",
        fontsize=8,
    )
    devices = sorted({facts["device"] for facts in peers.values()})
    ax.set_title(f"{machine['cpu']}, {machine['cores']} cores; {', '.join(devices)}", fontsize=8)
    return fig
