"""What did the GPU runs measure? Fills the README's and the notes' tables and draws the charts, from JSON alone.

    python benchmarks/report.py [FOLDER]

FOLDER's ffa_fwd.json, ffa_bwd.json, ffa_both.json and rows.json, those there are, are first copied to benchmarks/h200/:
tables and charts come from there.
Tables stand between `<!-- measured NAME -->` and `<!-- end -->` and are replaced whole; charts go to docs/.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
KEPT = HERE / "h200"
NAMES = ("ffa_fwd", "ffa_bwd", "ffa_both", "rows")
STYLES = {  # of an implementation: its name, its colour
    "ffa": ("magi_attention", "#c0392b"),
    "ordered": ("magi_attention, deterministic", "#e59866"),
    "fa3": ("FlashAttention 3", "#2c6fbb"),
    "cudnn": ("cuDNN", "#58a55c"),
    "fa2": ("FlashAttention 2", "#9aa5b1"),
    "flex": ("FlexAttention", "#8e6bb0"),
}
README_CASES = (
    ("full", 8192, "32:32", "128"),
    ("causal", 8192, "32:32", "128"),
    ("full", 16384, "32:32", "128"),
    ("causal", 16384, "32:32", "128"),
    ("causal", 32768, "32:32", "128"),
    ("causal", 65536, "32:8", "128"),
    ("doc8", 16384, "32:32", "128"),
    ("doc32", 16384, "32:32", "128"),
    ("documents_causal", 16384, "32:32", "128"),
    ("window_1024", 16384, "32:32", "128"),
    ("block_causal_2048", 16384, "32:32", "128"),
    ("video_history", 86400, "48:8", "128"),
    ("causal", 16384, "32:32", "64"),
)


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def peer(row: dict, name: str, brackets: bool = True) -> str:
    """TFLOP/s of a peer and how much longer it takes."""
    if name not in row["ratio"]:
        return "-"
    ratio = f"{row['ratio'][name]:.2f}x"
    return f"{row['tflops'][name]:.0f} ({ratio})" if brackets else ratio


def bars_table(result: dict) -> str:
    from ffa import verdict

    number = lambda x: "-" if x is None else f"{x:.2f}"  # noqa: E731
    lines = []
    for bar in result["bars"]:
        found = [value for _, value in bar["values"]]
        measured = ["-"] * 4
        if found:
            asked = bar["must"] or bar["goal"]
            measured = [
                f"{found[0]:.2f} ({bar['values'][0][0]})",
                number(median(found)),
                number(found[-1]),
                f"{sum(x >= asked for x in found)} of {len(found)}",
            ]
        lines.append([bar["bar"], number(bar["must"]), number(bar["goal"]), *measured, verdict(bar)])
    return table(["bar: against", "must", "goal", "worst", "median", "best", "cases that meet it", "verdict"], lines)


def case_table(result: dict) -> str:
    names = [n for n in STYLES if n != "ffa" and any(n in r["ratio"] for r in result["rows"])]
    lines = []
    for r in result["rows"]:
        waited = " / ".join(f"{r['host'][n]['waited']:.0f}" for n in ("ffa", "fa3") if n in r.get("host", {}))
        lines.append(
            [r["case"], f"{r['ms']['ffa']:.3f}", f"{r['tflops']['ffa']:.0f}", f"{r['host_us']:.0f}", waited or "-"]
            + [f"{r['memory'] / 2**20:.0f}", *(peer(r, n) for n in names)]
        )
    header = ["mask, tokens, heads", "ms", "TFLOP/s", "host us", "call and wait us, ours / FA3", "memory MiB"]
    return table(header + [STYLES[n][0] for n in names], lines)


def said(result: dict) -> str:
    product = result.get("matrix_product_tflops")
    ceiling = f"; matrix product 8192^3 {product:.0f} TFLOP/s" if product else ""
    return f"{result['device']}, torch {result['torch']}{ceiling}."


def notes_section(result: dict) -> str:
    missing: dict[str, list[str]] = {}
    for case, why in result.get("failed", {}).items():
        missing.setdefault(why, []).append(case)
    parts = [said(result), bars_table(result), case_table(result)]
    return "\n\n".join(parts + [f"Not measured ({why}): {', '.join(cases)}." for why, cases in missing.items()])


def rows_section(result: dict) -> str:
    lines = [
        [r["case"], f"{r['ms']['verb'] * 1e3:.1f} us" if "ms" in r else f"{r['us']:.1f} us"]
        + [f"{r['share']:.2f}" if "share" in r else "-"]
        for r in result["rows"]
    ]
    return "\n\n".join([said(result), bars_table(result), table(["verb", "time", "share of a copy's speed"], lines)])


def readme_section(results: dict[str, dict]) -> str:
    found = {
        name: {(r["mask"], r["tokens"], r["heads"], r["head_dim"]): r for r in results[name]["rows"]}
        for name in ("ffa_fwd", "ffa_bwd")
        if name in results
    }
    forward, backward = found.get("ffa_fwd", {}), found.get("ffa_bwd", {})
    lines = []
    for key in README_CASES:
        f, b = forward.get(key), backward.get(key)
        if f or b:
            row = [(f or b)["case"], *([f"{f['tflops']['ffa']:.0f}"] if f else ["-"])]
            row += [peer(f, n, False) if f else "-" for n in ("fa3", "flex")]
            row += [f"{b['tflops']['ffa']:.0f}" if b else "-"]
            row += [peer(b, n, False) if b else "-" for n in ("cudnn", "flex", "ordered")]
            lines.append(row)
    header = ["mask, tokens, heads", "forward", "to FlashAttention 3", "to FlexAttention"]
    header += ["backward", "to cuDNN", "to FlexAttention", "to our deterministic"]
    parts = [table(header, lines)]
    for row in results.get("ffa_both", {"rows": []})["rows"]:
        if row["case"] == "causal 16k 32:32":
            parts.append(f"Forward and backward together, causal 16k: {peer(row, 'cudnn', False)} to cuDNN.")
    titles = {"ffa_fwd": "Forward", "ffa_bwd": "Backward"}
    parts += [f"![{titles[n]}: TFLOP/s of each implementation, a panel a mask](docs/{n}.png)" for n in found]
    return "\n\n".join(parts)


def chart(result: dict, path: Path) -> None:
    """A panel for each mask at 32:32 heads of 128: bars of each implementation over the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in result["rows"] if r["heads"] == "32:32" and r["head_dim"] == "128" and r["tokens"] >= 8192]
    masks = [m for m in dict.fromkeys(r["mask"] for r in rows)]
    names = [n for n in STYLES if any(n in r["tflops"] for r in rows)]
    if not rows:
        return
    columns = min(3, len(masks))
    figure, axes = plt.subplots(
        -(-len(masks) // columns), columns, figsize=(4.6 * columns, 2.7 * -(-len(masks) // columns)), squeeze=False
    )
    for axis in axes.flat[len(masks) :]:
        axis.axis("off")
    top = max(t for r in rows for t in r["tflops"].values()) * 1.12
    for axis, mask in zip(axes.flat, masks):
        cases = [r for r in rows if r["mask"] == mask]
        here = [n for n in names if any(n in r["tflops"] for r in cases)]
        width = 0.84 / len(here)
        for x, r in enumerate(cases):
            bars = [n for n in here if n in r["tflops"]]
            for i, name in enumerate(bars):
                at = x + (i - (len(bars) - 1) / 2) * width
                axis.bar(at, r["tflops"][name], width * 0.94, color=STYLES[name][1])
                axis.text(at, r["tflops"][name], f"{r['tflops'][name]:.0f}", ha="center", va="bottom", fontsize=6)
        axis.set_xticks(range(len(cases)), [f"{r['tokens'] // 1024}k" for r in cases])
        axis.set_xlim(-0.5, len(cases) - 0.5)
        axis.set_ylim(0, top)
        axis.set_title(mask.replace("_", " "), loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if axis in axes[:, 0]:
            axis.set_ylabel("TFLOP/s")
    handles = [plt.Rectangle((0, 0), 1, 1, label=title, color=colour) for title, colour in map(STYLES.get, names)]
    figure.legend(handles=handles, ncols=len(names), loc="upper center", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def fill(path: Path, sections: dict[str, str]) -> None:
    """Replaces what stands between the markers of each section."""
    text = path.read_text()
    for name, section in sections.items():
        pattern = re.compile(rf"(<!-- measured {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{path} must have a section <!-- measured {name} --> ... <!-- end -->")
        text = pattern.sub(lambda found, section=section: found[1] + section + "\n" + found[2], text)
    path.write_text(text)


def main() -> None:
    KEPT.mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        for name in NAMES:
            if (source := Path(sys.argv[1]) / f"{name}.json").exists():
                shutil.copyfile(source, KEPT / source.name)
    results = {n: json.loads((KEPT / f"{n}.json").read_text()) for n in NAMES if (KEPT / f"{n}.json").exists()}
    root = HERE.parent
    notes = {name: (rows_section if name == "rows" else notes_section)(result) for name, result in results.items()}
    fill(HERE / "notes.md", notes)
    if "ffa_fwd" in results or "ffa_bwd" in results:
        fill(root / "README.md", {"h200": readme_section(results)})
    for name in ("ffa_fwd", "ffa_bwd"):
        if name in results:
            chart(results[name], root / "docs" / f"{name}.png")
    print("filled: " + ", ".join(results))


if __name__ == "__main__":
    main()
