"""bench/results/*.json -> one table, between the markers in README.md.

    python -m bench.table
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
START, END = "<!-- bench -->\n", "<!-- end of bench -->"
PEERS = ("naive", "compiled", "liger", "trl", "chunked", "cce")


def time_and_memory(row: dict | None) -> str:
    if row is None:
        return ""
    memory = "" if row["peak_mb"] is None else f" / {row['peak_mb']:,.0f}"
    return f"{row['ms']:.3g}{memory}" if row["ms"] < 100 else f"{row['ms']:.0f}{memory}"


def rate(row: dict) -> str:
    value = f"{row['tflop_per_s']:.3g} TFLOP/s" if "tflop_per_s" in row else f"{row['gb_per_s']:.3g} GB/s"
    return f"{value}, {row['percent_of_ceiling']:.0f} % of {row['ceiling']}"


def table(report: dict) -> str:
    """One device's: a line a kernel, shape and direction."""
    cases: dict[tuple, dict] = {}
    for row in report["rows"]:
        cases.setdefault((row["kernel"], row["shape"], row["backward"]), {})[row["contender"]] = row
    peers = [peer for peer in PEERS if any(peer in found for found in cases.values())]
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    lines = [
        f"{report['device']}, {report['dtype'].removeprefix('torch.')} ({versions}). Milliseconds / peak MB "
        "beyond inputs and gradients; the ceiling is a matmul or a copy, timed in turn with the contenders:",
        "",
        "| kernel, shape | | ours | ours reaches | " + " | ".join(peers) + " |",
        "|---|---|---|---|" + "---|" * len(peers),
    ]
    for (kernel, shape, backward), found in cases.items():
        cells = [time_and_memory(found.get(peer)) for peer in peers]
        ours, way = found["ours"], "fwd + bwd" if backward else "fwd"
        cells = [f"`{kernel}` {shape}", way, time_and_memory(ours), rate(ours), *cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    reports = [json.loads(file.read_text()) for file in sorted((ROOT / "bench" / "results").glob("*.json"))]
    reports = [report for report in reports if "rows" in report]  # of kernels; others have their own form
    readme = ROOT / "README.md"
    before, found, rest = readme.read_text().partition(START)
    if not found or END not in rest:
        raise SystemExit(f"{readme}: no lines {START.strip()} and {END} to write between")
    text = "\n\n".join(table(report) for report in reports)
    readme.write_text(f"{before}{START}{text}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
