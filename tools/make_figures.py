"""Draw the README's two pictures into docs/assets: the five stages, and a scene with two answers.

One SVG file serves light and dark pages: it asks the reader's browser which one it is.
"""

import base64
import html
import io
import textwrap
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "docs/assets"

STYLE = """
<style>
  svg { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
  .box { fill: #ffffff; stroke: #8a9099; }
  .rl { stroke: #0072b2; stroke-width: 2; }
  .cold { stroke: #008f68; stroke-width: 2; }
  .name { fill: #20242a; font-size: 15px; font-weight: 600; }
  .says { fill: #4b5159; font-size: 12.5px; }
  .code { fill: #20242a; font-family: ui-monospace, Consolas, monospace; font-size: 12.5px; }
  .arrow { stroke: #8a9099; stroke-width: 1.6; fill: none; }
  .head { fill: #8a9099; }
  .good { fill: #008f68; } .bad { fill: #b3261e; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #161b22; stroke: #6e7681; }
    .rl { stroke: #62bbff; } .cold { stroke: #3fd0a4; }
    .name, .code { fill: #e6edf3; } .says { fill: #a7b0ba; }
    .arrow { stroke: #6e7681; } .head { fill: #6e7681; }
    .good { fill: #3fd0a4; } .bad { fill: #ff9b8f; }
  }
</style>"""

STAGES = [  # name, kind of box, what happens there
    ("1 · GRPO-zero", "rl", "a short reinforcement learning on the base: form comes first"),
    ("2 · pairs", "", "two right answers to a question; the form of one is broken"),
    ("3 · cold start", "cold", "DPO + λ·SFT on the pairs, with LoRA: learn the form alone"),
    ("4 · final GRPO", "rl", "the same from there, for longer: learn to be right"),
    ("5 · evaluation", "", "trained form, other forms, other pictures; with intervals"),
]


def page(width, height, body, title):
    "An SVG file with a title that a screen reader reads."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img"><title>{html.escape(title)}</title>{STYLE}\n{body}\n</svg>\n'
    )


def words(x, y, text, kind, wide=0, step=16):
    "Text, wrapped where it is too wide."
    lines = textwrap.wrap(text, wide) if wide else [text]
    return "\n".join(
        f'<text x="{x}" y="{y + step * i}" class="{kind}">{html.escape(line)}</text>'
        for i, line in enumerate(lines)
    )


def arrow(x1, y1, x2, y2):
    "A straight arrow to the right."
    return (
        f'<path class="arrow" d="M{x1} {y1} L{x2 - 6} {y2}"/><path class="head" d="M{x2} {y2} l-8 -4 v8 z"/>'
    )


def stages():
    "The five stages from left to right, and the base model that three of them begin with."
    width, gap, top = 158, 22, 56
    body = [words(10, 26, "base VLM", "name")]
    body.append('<path class="arrow" d="M20 34 V45"/><path class="head" d="M20 54 l-4 -8 h8 z"/>')
    for i, (name, kind, says) in enumerate(STAGES):
        x = 10 + i * (width + gap)
        body.append(f'<rect class="box {kind}" x="{x}" y="{top}" width="{width}" height="104" rx="8"/>')
        body.append(words(x + 12, top + 26, name, "name"))
        body.append(words(x + 12, top + 50, says, "says", 22))
        if i:
            body.append(arrow(x - gap, top + 52, x, top + 52))
    note = "the base writes the rejected answers, and is DPO's reference"
    x2, x3 = 10 + width + gap + width / 2, 10 + 2 * (width + gap) + width / 2
    body.append(f'<path class="arrow" d="M96 22 H{x3} V45"/>')
    body.append(f'<path class="head" d="M{x3} 54 l-4 -8 h8 z"/>')
    body.append(f'<path class="arrow" d="M{x2} 22 V45"/><path class="head" d="M{x2} 54 l-4 -8 h8 z"/>')
    body.append(words(x3 + 12, 26, note, "says"))
    return page(10 + 5 * width + 4 * gap + 10, 172, "\n".join(body), "The five stages of SPECS")


def running_total(q):
    "Careful reasoning as the embedded model writes it: cell by cell what an object counts, and the sum."
    from specs_nb import world

    total, cells = 0, []
    for thing in q.scene.items:
        value = world.worth(thing, q.about)
        total += value
        cells.append(f"{world.name(thing)} {value} {total}" if value else "no")
    named = " and ".join(f"{sel.shape or sel.colour} {value}" for sel, value in q.about)
    return f"Count {named}: {', '.join(cells)}. So {total}."


def is_short(q):
    "Two rules and four objects: it fits into the picture, and a rule counts more than one object."
    counted = [t for t in q.scene.items if any(t in sel for sel, _ in q.about)]
    return len(q.about) == 2 and len(q.scene.objects()) == 4 and len(counted) == 3


def scene():
    "A drawn scene with its question, and a pair of answers that differ in form alone."
    from specs_nb import world
    from specs_nb.formats import CORRUPTIONS, FORMATS

    q = next(q for q in (world.ask("train", 3, i) for i in range(500)) if is_short(q))
    out = io.BytesIO()
    world.picture(q.scene, scale=2).save(out, "png")
    data = base64.b64encode(out.getvalue()).decode()
    chosen = FORMATS["think_answer"].render(running_total(q), q.answer)
    answers = [
        ("chosen", "good", chosen),
        ("rejected", "bad", CORRUPTIONS["drop_think_tags"](chosen)),
    ]
    body = [
        f'<image x="10" y="10" width="168" height="168" href="data:image/png;base64,{data}"/>',
        '<rect x="10" y="10" width="168" height="168" class="box" style="fill:none"/>',
        words(196, 26, q.text, "name"),
    ]
    for i, (name, kind, text) in enumerate(answers):
        y = 40 + 72 * i
        body.append(f'<rect class="box" x="196" y="{y}" width="694" height="66" rx="6"/>')
        body.append(words(208, y + 19, name, f"name {kind}"))
        body.append(words(208, y + 38, " ".join(text.split()), "code", 88))
    return page(900, 188, "\n".join(body), "A scene with a question and a pair of answers")


if __name__ == "__main__":
    for name, draw in (("specs", stages), ("pair", scene)):
        (ASSETS / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(f"docs/assets/{name}.svg")
