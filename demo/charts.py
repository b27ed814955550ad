"""Charts as inline SVG: a curve and a two-sided histogram."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM = 300, 150, 30, 18


def curve(points: Sequence[tuple[int, float]]) -> str:
    """Loss by step as a line, from zero.

    Example:
        >>> curve([(1, 2.0), (2, 1.0)]).startswith("<svg")
        True
    """
    if not points:
        return _svg("")
    last, top = max(points[-1][0], 1), max(loss for _, loss in points) or 1.0
    across, up = WIDTH - LEFT - 5, HEIGHT - BOTTOM - 8
    path = " ".join(f"{LEFT + across * step / last:.1f},{8 + up * (1 - loss / top):.1f}" for step, loss in points)
    return _svg(
        f'<polyline points="{path}" fill="none" stroke="var(--bar)" stroke-width="1.6"/>'
        f'<text x="2" y="14">{top:.1f}</text><text x="2" y="{HEIGHT - BOTTOM}">0</text>'
        f'<text x="{WIDTH - 5}" y="{HEIGHT - 4}" text-anchor="end">step {last}, loss {points[-1][1]:.2f}</text>'
    )


def histogram(edges: Sequence[float], positive: Sequence[int], negative: Sequence[int]) -> str:
    """Counts by cosine: positives green, negatives red, each scaled to its own peak."""
    across, up = WIDTH - 10, HEIGHT - BOTTOM - 4
    bars = []
    for counts, colour in ((negative, "var(--no)"), (positive, "var(--yes)")):
        peak = max([*counts, 1])
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
            x, width, height = 5 + across * (low + 1) / 2, across * (high - low) / 2, up * count / peak
            bars.append(
                f'<rect x="{x:.1f}" y="{4 + up - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
                f'fill="{colour}" fill-opacity="0.6"/>'
            )
    labels = "".join(
        f'<text x="{5 + across * (value + 1) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{value}</text>'
        for value in (-0.9, -0.5, 0, 0.5, 0.9)
    )
    return _svg("".join(bars) + labels)


def _svg(inside: str) -> str:
    line = f'<line x1="5" x2="{WIDTH - 5}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}" stroke="var(--line)"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{line}{inside}</svg>'
