"""docs/images/incentives*.svg: how hard each loss of pairs pushes; ``python tools/incentive_plots.py`` draws them.

A panel for each loss: minus the derivative by ln pi(chosen) and the derivative by ln pi(rejected), scaled to the larger
of both, where the log-ratios are r+ = m/2 and r- = -m/2 and the margin m goes from -20 to 20 nats. Above the line the
loss raises the chosen response and lowers the rejected one; below it does the opposite. One picture is for a desk, one
for a phone: its letters are as large as those of the page.
"""

from html import escape
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
MARGINS = (-20.0, 20.0, 41)
HEIGHT, GAP = 86, 10


class Layout(NamedTuple):
    """How panels are laid out."""

    file: str
    columns: int
    width: int
    """Of a panel."""


LAYOUTS = (Layout("incentives.svg", 4, 190), Layout("incentives_narrow.svg", 2, 165))
CHOSEN, REJECTED = "#1f77b4", "#d62728"


def curves() -> dict[str, tuple[Any, Any, Any]]:
    """By loss: margins, push on the chosen, push on the rejected; of losses whose rows are single pairs."""
    import jax.numpy as jnp
    import numpy as np

    from ches_jax.losses import LossInputs, distinct_losses, get_loss, incentives

    margins = np.linspace(*MARGINS).astype(np.float32)
    ref = np.full_like(margins, -40.0)
    logps = {"chosen": ref + margins / 2, "rejected": ref - margins / 2}
    fields: dict[str, Any] = {f"logp_{side}": value for side, value in logps.items()}
    fields |= {f"ref_logp_{side}": ref for side in logps} | {
        f"{side}_tokens": np.full_like(ref, 20.0) for side in logps
    }
    fields |= {name.replace("logp_", "logp_joint_"): v for name, v in fields.items() if "logp" in name}
    fields |= {"rewards_chosen": ref * 0 + 2, "rewards_rejected": ref * 0 + 1}
    found = {}
    for name in distinct_losses():
        loss = get_loss(name)
        if loss.couples_rows or loss.stateful or not loss.needs <= fields.keys():
            continue
        read: dict[str, Any] = {k: jnp.asarray(v) for k, v in fields.items() if k in loss.needs}
        batch = LossInputs(**read)
        push = incentives(loss)(batch)
        found[repr(loss)] = (margins, np.asarray(push.chosen), np.asarray(push.rejected))
    return found


def panel(name: str, margins: Any, chosen: Any, rejected: Any, at: tuple[float, float], width: int) -> str:
    """One loss."""
    import numpy as np

    largest = max(float(np.abs(chosen).max()), float(np.abs(rejected).max())) or 1.0
    x0, y0 = at
    top, plot = y0 + 14, HEIGHT - 28
    middle = top + plot / 2

    def line(values: Any, colour: str, dashes: str) -> str:
        xs = x0 + (margins - margins[0]) / (margins[-1] - margins[0]) * width
        ys = middle - values / largest * plot / 2
        points = " ".join(f"{x:.0f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}/>'

    return "".join(
        (
            f'<text x="{x0}" y="{y0 + 9}" font-weight="bold">{escape(name.partition("(")[0])}</text>',
            f'<text x="{x0 + width}" y="{y0 + 9}" text-anchor="end" fill="#888">{largest:.3g}</text>',
            f'<path d="M{x0} {middle}h{width}M{x0 + width / 2} {top}v{plot}" stroke="#bbb" stroke-width="0.7"/>',
            line(chosen, CHOSEN, ""),
            line(rejected, REJECTED, ' stroke-dasharray="4 2"'),
        )
    )


def picture(found: dict[str, tuple[Any, Any, Any]], layout: Layout) -> str:
    """All panels."""
    rows = -(-len(found) // layout.columns)
    head = (
        f'<tspan fill="{CHOSEN}">solid: push up on the chosen</tspan>, '
        f'<tspan fill="{REJECTED}">dashed: push down on the rejected</tspan>;',
        f"margin {MARGINS[0]:g} to {MARGINS[1]:g} nats from left to right;",
        "in grey the largest push, per nat",
    )
    lines = head if layout.columns < 4 else (" ".join(head),)
    top = 8 + 14 * len(lines)
    wide = layout.columns * (layout.width + GAP) + GAP
    high = rows * (HEIGHT + GAP) + GAP + top
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="10">',
        f'<rect width="{wide}" height="{high}" fill="#fff"/>',
        *(f'<text x="{GAP}" y="{15 + 14 * i}" font-size="11">{line}</text>' for i, line in enumerate(lines)),
    ]
    for i, (name, values) in enumerate(found.items()):
        at = GAP + i % layout.columns * (layout.width + GAP), top + GAP + i // layout.columns * (HEIGHT + GAP)
        out.append(panel(name, *values, at, layout.width))
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    drawn = curves()
    for layout in LAYOUTS:
        (ROOT / "docs" / "images" / layout.file).write_text(picture(drawn, layout), encoding="utf-8")
