"""The page of ``side_by_side``: the headline, the roofline of each case, every number with its spread."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ches_jax.report.document import Page, Section
from ches_jax.report.html import data_table, escape, figure, gallery, paragraphs
from ches_jax.report.render import render

WIDTH, LINE, LEFT = 400, 26, 100
WORDS = 84
"""Room for what is written behind a bar."""


def roofline(case: Mapping[str, Any]) -> str:
    """Useful GFLOP/s of each way as a bar, beneath the peak of a matrix product at the model's shapes."""
    peak = case["peak_gflops_per_core"]
    scale = (WIDTH - LEFT - WORDS - 6) / max(peak, *(r["useful_gflops_per_core"] for r in case["table"].values()))
    height = LINE * len(case["table"]) + 46
    at = LEFT + scale * peak
    parts = []
    for k, (way, row) in enumerate(case["table"].items()):
        y, width = 28 + LINE * k, scale * row["useful_gflops_per_core"]
        words = f"{row['useful_gflops_per_core']:.1f} ({row['share_of_peak']:.0%})"
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(way)}</text>')
        parts.append(
            f'<rect class="fillbar s{0 if way == "ours" else 1}" x="{LEFT}" y="{y}" width="{width:.1f}" height="17"/>'
        )
        end = LEFT + width
        behind = max(end, at) if end + WORDS > at else end  # the line of the peak crosses no words
        parts.append(f'<text class="tick" x="{behind + 6:.1f}" y="{y + 13}">{words}</text>')
    parts.append(f'<line class="axis dashed" x1="{at:.1f}" x2="{at:.1f}" y1="20" y2="{height - 16}"/>')
    parts.append(f'<text class="tick" x="{at:.1f}" y="14" text-anchor="middle">peak {peak:.1f} GFLOP/s</text>')
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def page_of(result: Mapping[str, Any]) -> Page:
    """The page of a result with its environment."""
    cases = result["cases"]
    own = [c["table"]["ours"]["share_of_peak"] for c in cases if "ours" in c["table"]]
    ratios: dict[str, list[float]] = {}
    for case in cases:
        for way, (_, middle, _) in case["ratios"].items():
            ratios.setdefault(way, []).append(middle)
    spans = [f"{way} takes {_span(r, '.2f')} times our CPU seconds" for way, r in ratios.items()]
    headline = "; ".join(([f"Useful FLOP/s are {_span(own, '.0%')} of the measured peak"] if own else []) + spans)
    figures = [
        figure(
            f"roofline-{k}",
            f"{c['data']}, {c['size']}, threads: {c['threads']}, pairs: {c['pairs']}",
            roofline(c),
            "; ".join(f"{way} {row['useful_gflops_per_core']} GFLOP/s" for way, row in c["table"].items()),
            "Useful GFLOP/s for each CPU second, and share of the peak.",
        )
        for k, c in enumerate(cases)
    ]
    columns = ["data", "size", "threads", "way", "CPU s", "least", "most", "share of peak", "x ours", "least", "most"]
    lines = []
    for c in cases:
        for way, row in c["table"].items():
            low, middle, high = c["ratios"].get(way, (1.0, 1.0, 1.0))
            least, most = row["cpu_seconds_range"]
            shown = [row["cpu_seconds"], least, most, row["share_of_peak"], middle, low, high]
            lines.append([c["data"], c["size"], str(c["threads"]), way, *(f"{v:.3g}" for v in shown)])
    loads = [
        [c["data"], c["size"], str(c["threads"]), f"{c['load']['others']:.2f}", f"{c['load']['steal']:.2f}"]
        for c in cases
    ]
    env = result["environment"]
    pairs, turns = (" or ".join(str(n) for n in sorted({c[k] for c in cases})) for k in ("pairs", "repeats"))
    how = paragraphs(
        "Each way is a process that was warmed by two whole passes; the passes that count were made in turn on one "
        "list of token ids. Useful FLOPs are the products of the layers' matrices at every position once, a prompt "
        "once for its pair: the same number for all ways. The peak was measured after each pass, at the model's shapes."
    )
    busy = ["The machine was busy while this was measured: the numbers are no evidence."] if result["loaded"] else []
    return Page(
        kind="benchmark",
        title="Scoring side by side",
        headline=headline,
        subtitle=f"{pairs} pairs, {turns} turns, {env['cpu']}, {env['cores']} cores",
        tone="bad" if result["loaded"] else "plain",
        notes=busy,
        sections=[
            Section(anchor="roofline", heading="Roofline", body=how + gallery(figures)),
            Section(anchor="numbers", heading="Every number", body=data_table(columns, lines, text_columns=4)),
            Section(
                anchor="load",
                heading="What else the machine did",
                body=data_table(["data", "size", "threads", "cores of others", "cores stolen"], loads, text_columns=3),
            ),
            Section(
                anchor="environment",
                heading="Environment",
                body=data_table(["what", "value"], [[k, str(v)] for k, v in env.items()], text_columns=2),
                folded=True,
            ),
        ],
    )


def write_page(result: Mapping[str, Any], out: Path) -> Path:
    """Writes it."""
    out.write_text(render(page_of(result)), encoding="utf-8")
    return out


def _span(values: Sequence[float], form: str) -> str:
    """The least and the most of some numbers, or the one that both are.

    >>> _span([0.5, 0.25], ".0%"), _span([2.0], ".1f")
    ('25% to 50%', '2.0')
    """
    ends = f"{min(values):{form}}", f"{max(values):{form}}"
    return " to ".join(dict.fromkeys(ends))
