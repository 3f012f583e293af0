"""Write the results of a benchmark run as JSON, Markdown table and plots, and check the expected ratios.

python bench/report.py build/bench.json                  # writes bench/results/<machine>.{json,md,...}
python bench/report.py build/bench.json --check          # compares with bench/goals.json, exit status 1 on a loss
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
GOALS = HERE / "goals.json"
RESULTS = HERE / "results"

# names of peers that plots explain
LEGEND = {
    "published": "published way",
    "stock": "best of PyTorch's own operations",
    "two ops": "our two operations in turn",
    "with moments": "ours with moments",
}

PEER_STEP = "the peer's whole step"

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read the figures of every benchmark in a pytest-benchmark file, or in the lines of `pytest --figures`."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        # the last line of a program that was stopped may be half written
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    else:
        rows = [entry["extra_info"] for entry in json.loads(text)["benchmarks"] if "op" in entry["extra_info"]]
    if not rows:
        raise ValueError(f"{path} holds no figures: `make bench` writes one that does.")
    return merged(rows)


def merged(rows: list[Row]) -> list[Row]:
    """Add the peers of a case that was measured again, with others, to its first row."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        known = first.setdefault((row["op"], row["case"]), row)
        if known is not row:
            known["peers"] |= {name: peer for name, peer in row["peers"].items() if name not in known["peers"]}
            known["missing"] = {n: why for n, why in known.get("missing", {}).items() if n not in known["peers"]}
    return list(first.values())


def machine_name(rows: list[Row]) -> str:
    """Return the stem of the result files: device and threads."""
    device = rows[0]["device"]
    threads = "" if "nvidia" in device.lower() else f"-{rows[0]['threads']}-threads"
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + threads


class Verdict(NamedTuple):
    """One goal with its measured value.

    `holds` says that the figure is not below what is expected of it; `reached` that it is what the project wants.
    """

    goal: Row
    case: str
    measured: float
    holds: bool
    reached: bool


def judge(rows: list[Row], goals: list[Row]) -> Iterator[Verdict]:
    """Yield every goal for each of its cases on its kind of device."""
    for goal in goals:
        for row in rows:
            fits = row["op"] == goal["op"] and row["device_type"] == goal["device_type"]
            if fits and fnmatch.fnmatch(row["case"], goal["case"]):
                measured = metric(row, goal["metric"])
                if measured is not None:
                    sign = -1 if goal["want"] == "at_most" else 1
                    slack = goal["expected"] * goal["tolerance"]
                    holds = sign * measured >= sign * goal["expected"] - slack
                    yield Verdict(goal, row["case"], measured, holds, sign * measured >= sign * goal["goal"])


def metric(row: Row, name: str) -> float | None:
    """Return `ratio:PEER`, `peak:PEER` (the peer's peak memory over ours), or a figure of the row itself."""
    kind, _, peer = name.partition(":")
    if not peer:
        value = row.get(kind)
        return None if value is None else float(value)
    other = row["peers"].get(peer)
    if other is None:
        return None
    if kind == "ratio":
        return float(other["ratio"]["p50"])
    ours, theirs = row.get("peak_bytes"), other.get("peak_bytes")
    return None if not ours or theirs is None else theirs / ours


def check(rows: list[Row]) -> int:
    """Print every goal with its measured value; return 1 if one is missed, or applies here and was not measured.

    A goal marked `slow` is of a benchmark that only runs with `--run-slow`, and may be absent.
    """
    goals = [goal for goal in json.loads(GOALS.read_text()) if goal["device_type"] == rows[0]["device_type"]]
    failed = 0
    for goal in goals:
        wanted = f"{'<=' if goal['want'] == 'at_most' else '>='} {goal['goal']:g}"
        verdicts = list(judge(rows, [goal]))
        for v in verdicts:
            state = "LOST" if not v.holds else ("ok" if v.reached else "short of the goal")
            name = f"{goal['op']} | {v.case} | {goal['metric']}"
            print(f"{name:84} {v.measured:8.2f}  goal {wanted:8} expected {goal['expected']:<6g} {state}")
            failed += not v.holds
        if not verdicts:
            is_slow = goal.get("slow", False)
            state = "left out: `make bench` measures it" if is_slow else "NOT MEASURED"
            print(f"{goal['op']} | {goal['case']} | {goal['metric']}: {state}")
            failed += not is_slow
    if failed:
        print(f"{failed} figures are missing or below what is expected of this code (bench/goals.json)")
    elif not goals:
        print(f"bench/goals.json expects nothing of a {rows[0]['device_type']} device yet")
    return 1 if failed else 0


def brief(rows: list[Row]) -> str:
    """Return a line per case, and the goals that are not reached, for a terminal."""
    on_gpu = rows[0]["device_type"] == "cuda"
    of = "a copy" if on_gpu else "the line"
    steps = [row for row in rows if row["op"] == "step"]
    header = f"{'kernels':58}  {'time':>7}  of {of}{'      host' if on_gpu else ''}  times as long, the others"
    lines = [header] if len(steps) < len(rows) else []
    for row in rows:
        if row["op"] != "step":
            time = _time(row.get("device_s", row.get("p50_s")))
            share = _percent(row.get("device_percent_of_line", row.get("percent_of_line")))
            host = f"{_time(row.get('host_s')):>10}" if on_gpu else ""
            name = f"{row['op']}: {row['case']}"[:58]
            lines.append(f"{name:58}  {time:>7}  {share:>{len(of) + 3}}{host}  {_brief_peers(row)}")
    lines += [f"{'steps':28}  {'time':>7}  units per s  of a product  {'peak':>8}  the others"] if steps else []
    for row in steps:
        rate, share, peak = row.get("units_per_s"), _percent(row.get("percent_of_gemm")), row.get("peak_bytes")
        text = "" if rate is None else f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"
        memory = "" if peak is None else f"{peak / 1e9:.2f} GB"
        time = _time(row.get("p50_s"))
        lines.append(f"{row['case'][:28]:28}  {time:>7}  {text:>11}  {share:>12}  {memory:>8}  {_brief_peers(row)}")
    verdicts = [(goal, list(judge(rows, [goal]))) for goal in json.loads(GOALS.read_text())]
    total, reached = (sum(len([v for v in those if v.reached or every]) for _, those in verdicts) for every in (1, 0))
    lines += [f"goals (bench/goals.json): {reached} of {total} reached; measured, where not:"] if total else []
    for goal, those in verdicts:
        measured = [f"{v.measured:.3g}{'' if v.holds else ' LOST'}" for v in those if not v.reached]
        sign = "<=" if goal["want"] == "at_most" else ">="
        name = f"{goal['op']}: {goal['case']}, {goal['metric']}"
        lines += [f"  {name} {sign} {goal['goal']:g}: {', '.join(measured)}"] if measured else []
    return "\n".join(lines) + "\n"


def _brief_peers(row: Row) -> str:
    """Return every peer's time over ours: of the device where both have it."""
    texts = []
    for name, peer in row["peers"].items():
        on_device = row.get("device_s") and peer.get("device_s")
        ratio = peer["device_s"] / row["device_s"] if on_device else peer["ratio"]["p50"]
        texts.append(f"{name} {ratio:.2f}")
    return ", ".join(texts)


def markdown(rows: list[Row]) -> str:
    """Yield a table per operation: ours, the machine's bandwidth, and every peer's time over ours."""
    first = rows[0]
    where = f"{first['device']}, {first['threads']} CPU threads, torch {first['torch']}"
    lines = [
        f"# {where}",
        "",
        "Medians of rounds in which everyone runs in turn. A peer's figure is its time over ours, median of the rounds "
        "(20th to 80th percentile): above 1 ours is faster. The line is what the machine does with as many bytes in "
        "the same rounds, a scale in place on a CPU and a copy on a GPU. Peak is memory above the inputs.",
    ]
    for op in dict.fromkeys(row["op"] for row in rows):
        cases = [row for row in rows if row["op"] == op]
        peers = list(dict.fromkeys(name for row in cases for name in row["peers"]))
        on_gpu = ["device time, cold", "launches", "waits"] if any("launches" in row for row in cases) else []
        on_gpu += ["host"] if any("host_s" in row for row in cases) else []
        lines += ["", f"## {op}", ""]
        lines.append(
            "| case | " + " | ".join(["ours", "must move", "GB/s", "of the line", "peak", *on_gpu, *peers]) + " |"
        )
        lines.append("|" + "---|" * (6 + len(on_gpu) + len(peers)))
        for row in cases:
            cells = [_time(row.get("p50_s")), _bytes(row.get("bytes"))]
            cells += [_number(row.get("gb_per_s")), _percent(row.get("percent_of_line")), _bytes(row.get("peak_bytes"))]
            if "launches" in on_gpu:
                waits = {True: "yes", False: "no", None: ""}[row.get("waits_for_device")]
                cells += [_time(row.get("device_s")), str(row.get("launches", "")), waits]
            cells += [_time(row.get("host_s"))] if "host" in on_gpu else []
            cells += [_peer(row["peers"].get(name)) for name in peers]
            lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
        missing = {name: why for row in cases for name, why in row.get("missing", {}).items()}
        lines += [""] if missing else []
        lines += [f"Not measured: {name} ({why})." for name, why in missing.items()]
        notes = dict.fromkeys(row["note"] for row in cases if row.get("note"))
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    return ""


def _peer(peer: Row | None) -> str:
    if peer is None:
        return ""
    ratio = peer["ratio"]
    text = f"**{ratio['p50']:.2f}**" + (f" ({ratio['p20']:.2f} to {ratio['p80']:.2f})" if "p20" in ratio else "")
    details = [_bytes(peer["peak_bytes"])] if peer.get("peak_bytes") is not None else []
    details += [f"compiles {peer['compile_s']:.0f} s"] if peer.get("compile_s") else []
    return text + (f", {', '.join(details)}" if details else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def _bytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f} MB"


def draw(rows: list[Row], stem: Path) -> list[Path]:
    """Draw the plots that the rows allow; return the files."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    drawn = [_draw_speedups(rows, stem), _draw_bandwidth(rows, stem), _draw_step(rows, stem)]
    return [path for path in drawn if path is not None]


def _where(rows: list[Row]) -> str:
    first = rows[0]
    return f"{first['device']}, torch {first['torch']}"


def _draw_speedups(rows: list[Row], stem: Path) -> Path:
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["peers"]]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    colors = {name: plt.get_cmap("tab10").colors[i % 10] for i, name in enumerate(peers)}
    figure, axis = plt.subplots(figsize=(10, 0.34 * len(rows) + 1.8), layout="constrained")
    labels = []
    for y, row in enumerate(reversed(rows)):
        labels.append(f"{row['op']}: {row['case']}")
        for name, peer in row["peers"].items():
            ratio = peer["ratio"]
            # figures that were taken from elsewhere may have no spread
            low, high = ratio.get("p20", ratio["p50"]), ratio.get("p80", ratio["p50"])
            spread = [[ratio["p50"] - low], [high - ratio["p50"]]]
            axis.errorbar(ratio["p50"], y, xerr=spread, fmt="o", color=colors[name], capsize=2, markersize=5)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    left, right = min(0.5, axis.get_xlim()[0]), max(2.1, axis.get_xlim()[1])
    axis.axvspan(left, 1, color="tab:red", alpha=0.06)
    axis.set_xlim(left, right)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200) if left <= t <= right]
    axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(-0.6, len(labels) - 0.4)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(f"How many times as long the others take: {_where(rows)}", fontsize=10)
    axis.set_xlabel(
        "left of 1 the other is faster, right of 1 ours\ntime of the other over ours:\n"
        "median of the rounds, and 20th to 80th percentile"
    )
    explained = {name: LEGEND.get(name, name) for name in peers}
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colors[n], label=explained[n]) for n in peers]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(peers)), fontsize=8)
    return _save(figure, stem, "speedup")


def _draw_bandwidth(rows: list[Row], stem: Path) -> Path | None:
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row.get("gb_per_s")]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(10, 0.34 * len(rows) + 1.8), layout="constrained")
    styles = {"published": "v:tab:blue", "stock": "s:tab:orange", "torch.compile": "X:tab:green"}
    for y, row in enumerate(reversed(rows)):
        # on a GPU, times of the device
        rate, share = (row.get(f"device_{key}", row[key]) for key in ("gb_per_s", "percent_of_line"))
        for name, style in styles.items():
            marker, _, color = style.partition(":")
            if name in row["peers"]:
                peer = row["peers"][name]
                theirs = row["bytes"] / peer.get("device_s", peer["p50_s"]) / 1e9
                axis.plot(share * theirs / rate, y, marker, color=color, alpha=0.8)
        axis.barh(y, share, color="tab:red", alpha=0.25, height=0.7)
        axis.plot(share, y, "o", color="tab:red")
        axis.text(101, y, f"{rate:,.0f} GB/s", va="center", fontsize=7)
    axis.axvline(100, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), [f"{row['op']}: {row['case']}" for row in reversed(rows)], fontsize=8)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlim(0, 112)
    axis.set_xticks(range(0, 101, 20))
    axis.xaxis.set_major_formatter("{x:g} %")
    axis.grid(axis="x", alpha=0.3)
    how = "a copy" if rows[0]["device_type"] == "cuda" else "a scale in place"
    axis.set_title(f"How close to the speed of memory: {_where(rows)}", fontsize=10)
    axis.set_xlabel(f"bytes that must be moved per second, over those that {how} of as many moves\n(more is better)")
    handles = [plt.Line2D([], [], marker="o", linestyle="", color="tab:red", label="ours (rate at the right)")]
    for name, style in styles.items():
        marker, _, color = style.partition(":")
        label = LEGEND.get(name, name)
        handles.append(plt.Line2D([], [], marker=marker, linestyle="", color=color, label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8)
    return _save(figure, stem, "bandwidth")


def _draw_step(rows: list[Row], stem: Path) -> Path | None:
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row.get("shares")]
    if not rows:
        return None
    bars: list[tuple[str, dict[str, float], float, str | None]] = []
    for row in reversed(rows):
        for name, peer in row["peers"].items():
            ratio = f"{peer['ratio']['p50']:.2f} times ours"
            bars.append((f"{row['case']}\n{name}", {PEER_STEP: 100.0}, peer["p50_s"], ratio))
        bars.append((f"{row['case']}\nours", row["shares"], row["p50_s"], None))
    parts = list(dict.fromkeys(part for _, shares, _, _ in bars for part in shares))
    figure, axis = plt.subplots(figsize=(10, 0.8 * len(bars) + 1.5), layout="constrained")
    # light ones first, since the text is black
    tab20 = plt.get_cmap("tab20").colors
    colors = dict(zip(parts, [*tab20[1::2], *tab20[::2]], strict=False)) | {PEER_STEP: "lightgray"}
    longest = max(seconds for _, _, seconds, _ in bars)
    for y, (_, shares, seconds, label) in enumerate(bars):
        left = 0.0
        for part in parts:
            width = shares.get(part, 0.0) * seconds / sum(shares.values())
            axis.barh(y, width, left=left, color=colors[part])
            if width >= 0.04 * longest:
                text = label or f"{shares[part]:.0f} %"
                axis.text(left + width / 2, y, text, ha="center", va="center", fontsize=8)
            left += width
    axis.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=8)
    axis.set_title(f"Where the time of a step goes: {_where(rows)}", fontsize=10)
    axis.set_xlabel("seconds of one step (shorter is better); narrow parts have no label")
    axis.margins(y=0.02)
    axis.set_xlim(0, 1.03 * longest)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[part], label=part) for part in parts]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(parts)), fontsize=8)
    return _save(figure, stem, "step")


def _save(figure: Any, stem: Path, kind: str) -> Path:
    path = stem.with_name(f"{stem.name}-{kind}.png")
    figure.savefig(path, dpi=110)
    return path


def write(rows: list[Row], folder: Path) -> list[Path]:
    """Write all result files of one machine."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / machine_name(rows)
    table, figures = stem.with_suffix(".md"), stem.with_suffix(".json")
    figures.write_text(json.dumps([_rounded(row) for row in rows], indent=1) + "\n")
    table.write_text(markdown(rows))
    return [figures, table, *draw(rows, stem)]


def _rounded(value: Any) -> Any:
    """Round to four significant digits: more would be noise in the history."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, float) and value and math.isfinite(value):
        return round(value, 3 - math.floor(math.log10(abs(value))))
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "file", type=Path, help="what `pytest bench --benchmark-json FILE` or `--figures FILE.jsonl` wrote"
    )
    parser.add_argument("--check", action="store_true", help="compare with bench/goals.json and write nothing")
    parser.add_argument("--brief", action="store_true", help="print a short table and write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    try:
        rows = read_rows(arguments.file)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.brief:
        print(brief(rows), end="")
        return 0
    if arguments.check:
        return check(rows)
    for path in write(rows, arguments.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
