"""bench/results/*.json -> one table, between the markers in README.md.

python -m bench.table
"""

import json
from pathlib import Path

from bench.kernels import KERNELS

ROOT = Path(__file__).parent.parent
START, END = "<!-- bench -->\n", "<!-- end of bench -->"
PEERS = ("naive", "compiled", "liger", "trl", "chunked", "cce")


def time_and_memory(row: dict | None) -> str:
    if row is None:
        return ""
    if "note" in row:
        return row["note"]
    ms = f"{row['ms']:.3g}" if row["ms"] < 100 else f"{row['ms']:,.0f}"
    return f"{ms} / {row['peak_mb']:,.0f}"


def rate(row: dict) -> str:
    if "note" in row:
        return ""
    if "tflop_per_s" in row:
        value = f"{row['tflop_per_s']:.3g} TFLOP/s"
    else:
        value = f"{row['gb_per_s']:.3g} GB/s"
    return f"{value}, {row['percent_of_ceiling']:.0f} % of {row['ceiling']}"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(reports: list[dict]) -> str:
    """A line a kernel, shape, direction and device; and a line for each kernel that no GPU has
    run."""
    # A case is a line, and its contenders are the columns.
    cases: dict[tuple, dict] = {}
    for letter, report in zip("ABCDEFGH", reports, strict=False):
        for row in report["rows"]:
            key = KERNELS.index(row["kernel"]), row["shape"], letter, row["backward"]
            cases.setdefault(key, {})[row["contender"]] = row
    contenders = set().union(*cases.values())
    # In the order of PEERS; a peer that nobody has measured gets no column.
    peers = [peer for peer in PEERS if peer in contenders]
    lines = [
        "Milliseconds / peak MB beyond inputs and gradients. The ceiling: a matmul or a copy, timed "
        "in turn with the contenders. On:",
        "",
    ]
    for letter, report in zip("ABCDEFGH", reports, strict=False):
        versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
        dtype = report["dtype"].removeprefix("torch.")
        lines.append(f"- {letter}: {report['device']}, {dtype} ({versions})")
    lines += [
        "",
        line("kernel, shape", "on", "", "ours", "ours reaches", *peers),
        "|" + "---|" * (5 + len(peers)),
    ]
    measured = set()
    for report in reports:
        if report["cuda"]:
            measured |= {row["kernel"] for row in report["rows"]}
    for i, kernel in enumerate(KERNELS):
        if kernel not in measured:
            lines.append(line(f"`{kernel}`", "a GPU", "", "not measured", *[""] * (1 + len(peers))))
        for (k, shape, letter, backward), found in cases.items():
            if k == i:
                ours = found["ours"]
                way = "fwd + bwd" if backward else "fwd"
                lines.append(
                    line(
                        f"`{kernel}` {shape}",
                        letter,
                        way,
                        time_and_memory(ours),
                        rate(ours),
                        *(time_and_memory(found.get(peer)) for peer in peers),
                    )
                )
    return "\n".join(lines)


def main() -> None:
    reports = [
        json.loads(file.read_text()) for file in sorted((ROOT / "bench" / "results").glob("*.json"))
    ]
    # of kernels; others have their own form
    reports = [report for report in reports if "rows" in report]
    readme = ROOT / "docs" / "speed.md"
    before, found, rest = readme.read_text().partition(START)
    if not found or END not in rest:
        raise SystemExit(f"{readme}: no lines {START.strip()} and {END} to write between")
    readme.write_text(f"{before}{START}{table(reports)}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
