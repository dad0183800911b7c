"""A picture of results: python -m bench.plot RESULT.json ... -o out.png

Per problem: how many times as long F.cross_entropy (another loss) and the composition of tensor
operations take, and the share of the machine's bandwidth that the fused loss reaches. Bars are
medians, whiskers the 20th and 80th percentile.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = {"forward": "#0072b2", "forward+backward": "#e69f00"}
RIVALS = {
    "cross_entropy": "F.cross_entropy (another loss)",
    "composition": "topk, logsumexp, gather",
}


def label(result: dict[str, Any]) -> str:
    p = result["problem"]
    data = "" if p["data"] == "normal" else f", {p['data']}"
    return f"{p['rows']} x {p['classes']}, k={p['k']}\n{p['dtype']}{data}"


def machine(about: dict[str, Any]) -> str:
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    return f"{where}, torch {about['versions']['torch']}"


def chosen(result: dict[str, Any], provider: str | None) -> dict[str, Any] | None:
    """Of those of ours that ran the one asked for, else the first, which is what "auto" takes."""
    for row in result["providers"]:
        if row["ours"] and row["passes"] and provider in (None, row["provider"]):
            return row
    return None


def shares(row: dict[str, Any]) -> dict[str, Any]:
    """The percentage of each pass. The longest time is the lowest share."""
    found = {}
    for name, times in row["passes"].items():
        floor = times["percent_of_bandwidth"] * times["median_ms"]
        median, low, high = (floor / times[f"{point}_ms"] for point in ("median", "p80", "p20"))
        found[name] = {"median": median, "p20": low, "p80": high}
    return found


def bars(axis: Any, rows: list[dict[str, Any]], title: str, one: float, form: str) -> None:
    """A group of bars per row, pass -> median, p20, p80; a line at `one`."""
    for shift, (name, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
        there = [(y + shift, row[name]) for y, row in enumerate(rows) if name in row]
        for y, (median, low, high) in ((y, spread.values()) for y, spread in there):
            whisker = [[median - low], [high - median]]
            axis.barh(y, median, 0.38, color=color, xerr=whisker, capsize=2, ecolor="#444444")
            where = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axis.annotate(form.format(median), (high, y), fontsize=8, **where)
    axis.axvline(one, color="black", linewidth=1)
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.margins(x=0.15, y=0.02)
    axis.spines[["top", "right"]].set_visible(False)


def draw(files: Sequence[Path], provider: str | None, out: Path) -> None:
    loaded = [json.loads(path.read_text()) for path in files]
    found = [(r, chosen(r, provider)) for file in loaded for r in file["results"]]
    pairs = [(result, row) for result, row in found if row is not None]
    if not pairs:
        raise SystemExit(f"results: expected times of {provider or 'sparse_ce'}, got none")
    size = (14, 1.8 + 0.62 * len(pairs))
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True, layout="constrained")
    for axis, (rival, title) in zip(axes, RIVALS.items(), strict=False):
        rows = [result["ratios"][row["provider"]].get(rival, {}) for result, row in pairs]
        bars(axis, rows, f"{title}:\ntimes as long as the fused loss", 1, "{:.1f}")
    title = "bandwidth of the fused loss,\n% of the machine's own"
    bars(axes[2], [shares(row) for _, row in pairs], title, 100, "{:.0f} %")
    axes[0].set_yticks(range(len(pairs)), [label(result) for result, _ in pairs], fontsize=9)
    axes[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, COLORS, loc="outside lower center", ncols=2, frameon=False)
    machines = {machine(file["environment"]) for file in loaded}
    names = {row["provider"] for _, row in pairs}
    figure.suptitle(f"{', '.join(sorted(names))} on {'; '.join(sorted(machines))}", fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("bench.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="default: beside the first result, .png")
    parser.add_argument("--provider", help="default: the first of ours that ran")
    options = parser.parse_args(argv)
    out = options.out or options.results[0].with_suffix(".png")
    draw(options.results, options.provider, out)


if __name__ == "__main__":
    main()
