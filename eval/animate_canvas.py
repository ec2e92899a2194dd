"""One canvas over its steps as a moving picture: an SVG of a frame a step, which a page shows with <img> and plays.

    python -m eval.plots --canvas=CKPT --prompt=TEXT --out=out/canvas.svg

Plain CSS, no script, no font and no file beside it, which is what GitHub lets through. It has its own background, so
that it reads on a light page and on a dark one. Where nothing moves (a printer, a reader who asked for no motion) the
last frame stands.
"""

from xml.sax.saxutils import escape

from eval.figures import CHANGED, INK, blue
from view.cells import NEWLINE, PAD, UNPRINTABLE, spans

PER_LINE, MAX_LINES = 40, 8  # slots of a line, lines of a canvas; more cannot be read
CELL, TALL, EDGE, TOP = 21, 30, 14, 64  # pixels: width and height of a slot, around all, above the canvas
STEP_SECONDS, HOLD_SECONDS = 0.7, 3.0  # of a frame, of the last one
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def animation(rows, tokenizer, title: str) -> str:
    """The SVG: rows are plot_canvas.Row, the first the noise, the last what stands at the end.

    A cell's blue says how likely the network found the token, an orange frame that it has just changed.
    """
    slots = min(len(rows[0].ids), PER_LINE * MAX_LINES)
    columns, lines = min(slots, PER_LINE), -(-slots // PER_LINE)
    width, height = 2 * EDGE + CELL * max(columns, 24), TOP + TALL * lines + 30 + EDGE
    last, whole = len(rows) - 1, (len(rows) - 1) * STEP_SECONDS + HOLD_SECONDS
    cut = f"the first {slots} of {len(rows[0].ids)} slots; " if slots < len(rows[0].ids) else ""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">',
            f"<title>{escape(shown(title))}</title>",
            "<style>",
            f"text {{ font: 15px {FONT}; fill: {INK}; }} .c {{ text-anchor: middle; }} .l {{ fill: white; }}",
            f".p {{ fill: #7D909C; }} .s {{ font-size: 13px; }} .n {{ stroke: {CHANGED}; stroke-width: 2; }}",
            ".f { visibility: hidden; } .f:last-of-type { visibility: visible; }",  # where nothing moves
            "@media (prefers-reduced-motion: no-preference) {",
            f".f {{ animation: step {whole:g}s step-end infinite; }} .f:last-of-type {{ animation-name: last; }}",
            *(f"#f{k} {{ animation-delay: {k * STEP_SECONDS - whole:.6g}s; }}" for k in range(1, last + 1)),
            "}",
            *(
                f"@keyframes {name} {{ 0% {{ visibility: visible; }} {100 * seconds / whole:.6g}% "
                "{ visibility: hidden; } 100% { visibility: hidden; } }"
                for name, seconds in (("step", STEP_SECONDS), ("last", HOLD_SECONDS))
            ),
            "</style>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#FAFAFA" stroke="#BBBBBB"/>',
            f'<text x="{EDGE}" y="27">{escape(shown(title))}</text>',
            *(frame(k, rows, tokenizer, slots, width) for k in range(len(rows))),
            f'<text class="s" x="{EDGE}" y="{height - EDGE - 4}">{cut}blue: how sure the network is; '
            f'<tspan fill="{CHANGED}">orange: just changed</tspan>; {PAD} pad: no text</text>',
            "</svg>\n",
        ]
    )


def frame(k: int, rows, tokenizer, slots: int, width: int) -> str:
    """The group of row k: which step it is, a bar of how far that is, and the cells."""
    row, before = rows[k], rows[k - 1].ids if k else rows[k].ids
    name = row.name if row.name == "answer" or k == 0 else f"step {row.name}"
    done = k / max(len(rows) - 1, 1)
    parts = [
        f'<g class="f" id="f{k}"><text class="s" x="{EDGE}" y="50">{escape(name)}</text>',
        f'<rect x="{EDGE + 90}" y="43" width="{(width - 2 * EDGE - 90) * done:.0f}" height="5" fill="{INK}"/>',
    ]
    for text, first, end in spans(row.ids[:slots], tokenizer):
        line, column = divmod(first, PER_LINE)
        chance = min(row.chances[first:end])
        x, y = EDGE + column * CELL, TOP + line * TALL
        fill = "#" + "".join(f"{round(255 * c):02X}" for c in blue(chance))
        new = ' class="n"' if before[first:end] != row.ids[first:end] else ""
        # A cell of several slots may go on over the line's end; there it is cut.
        wide = min(end - first, PER_LINE - column) * CELL
        parts.append(f'<rect{new} x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{TALL - 2}" fill="{fill}"/>')
        kind = "c l" if chance > 0.75 and text != PAD else "c p" if text == PAD else "c"
        parts.append(f'<text class="{kind}" x="{x + wide / 2:g}" y="{y + 20}">{escape(shown(text))}</text>')
    return "\n".join([*parts, "</g>"])


def shown(text: str) -> str:
    """The text as XML can hold it: a space that stays, and nothing that is not printable."""
    text = text.replace("\n", NEWLINE)
    return "".join("\N{NO-BREAK SPACE}" if c == " " else c if c.isprintable() else UNPRINTABLE for c in text)
