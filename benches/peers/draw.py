"""Two bars a contender: frames a second, and CPU time a frame. SVG, so that nothing is needed for it."""

from html import escape

ROW, NAMES, BAR, GAP = 26, 190, 250, 90
OURS, OTHERS = "#2f6fde", "#9aa4b2"


def plot(bars):
    """`bars`: (name, frames/s or None, CPU ms), from above."""
    width, height = NAMES + 2 * (BAR + GAP), 40 + ROW * len(bars) + 8
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             'font-family="system-ui, sans-serif" font-size="13">',
             f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for column, title in enumerate(("frames a second", "CPU a frame, ms")):
        left = NAMES + column * (BAR + GAP)
        parts.append(f'<text x="{left}" y="24" font-weight="600">{title}</text>')
        most = max((bar[1 + column] or 0) for bar in bars)
        for number, bar in enumerate(bars):
            value, top = bar[1 + column], 40 + ROW * number
            if column == 0:
                parts.append(f'<text x="{NAMES - 10}" y="{top + 15}" text-anchor="end">{escape(bar[0])}</text>')
            if value is not None:
                long = BAR * value / most
                color = OURS if bar[0].startswith("noblink") else OTHERS
                parts.append(f'<rect x="{left}" y="{top}" width="{long:.1f}" height="{ROW - 7}" '
                             f'rx="2" fill="{color}"/>')
                parts.append(f'<text x="{left + long + 6:.1f}" y="{top + 15}">{value:.1f}</text>')
    return "\n".join([*parts, "</svg>", ""])
