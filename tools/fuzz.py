"""Fuzz the formats, the grader and the rewards with atheris: python tools/fuzz.py [seconds] (default 3600;
needs `pip install atheris`).

Coverage-guided: libFuzzer mutates byte strings, a quarter of which begin as answers from
tests/data/graded.jsonl, towards code not yet reached in specs_nb. What must hold for any input: no exception;
a verdict of True, False or None; an answer is never a *wrong* answer to itself; at most a second; whatever is
rendered reads back as it was or not at all; a text that does not parse is never paid for its format. A
finding is printed with its input and counted; fuzzing goes on."""

import faulthandler
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["specs_nb"]):
    from specs_nb.formats import FORMATS, boxed, find_answer
    from specs_nb.grading import consistent
    from specs_nb.inputs.compare import explain_grade, kind_of
    from specs_nb.rewards import accuracy_reward, format_reward, repetition_reward

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("choice", "number", "latex", "text", "set", "interval", "multi", "box")
CHOICES = (None, ["red", "blue", "green"], ["1", "2", "3", "4"])
# seconds for one call: the grader's own limit is one, and a finding should be the grader's, not a busy
# machine's
LIMIT = 1.5
found, calls, slowest = Counter(), Counter(), Counter()


def note(what, *values):
    found[what] += 1
    if found[what] <= 5:
        print(f"FINDING {what}: {values!r}"[:600], flush=True)


def timed(name, f, *args, **kw):
    calls[name] += 1
    t = time.process_time()
    try:
        return f(*args, **kw)
    except Exception as e:
        note(f"{name} raises {type(e).__name__}", e, args)
    finally:
        took = time.process_time() - t
        slowest[name] = max(slowest[name], took)
        if took > LIMIT:
            note(f"{name} is slow", took, [str(a)[:80] for a in args], [len(str(a)) for a in args])


def one(data):
    fdp = atheris.FuzzedDataProvider(data)
    kind, choices = fdp.PickValueInList(list(KINDS)), fdp.PickValueInList(list(CHOICES))
    size = len(data) // 2
    a, b = fdp.ConsumeUnicode(fdp.ConsumeIntInRange(0, size)), fdp.ConsumeUnicode(size)
    for gold, said in ((a, b), (a, a)):
        got = timed("grade", explain_grade, said, gold, kind, choices)
        if got is not None and got[0] not in (True, False, None):
            note("grade says", got, said, gold, kind)
        if got is not None and got[0] is False and said is gold:
            note("an answer is wrong to itself", gold, kind, choices, got)
    for name, f in FORMATS.items():
        parts = timed("parse", f.parse, b)
        if format_reward([b], format=name) != [0.5 if parts else 0]:
            note("format is paid without a parse", name, b)
        text = f.render(a, b)
        if (back := timed("parse", f.parse, text)) not in (None, (a.strip(), b.strip())):
            note("reads back as something else", name, a, b, back)
    timed("find_answer", find_answer, b), timed("boxed", boxed, b), timed("kind_of", kind_of, a), timed(
        "consistent", consistent, a, b, kind, choices
    )
    if (
        (paid := timed("accuracy", accuracy_reward, [b], [a], kind))
        and paid[0]
        and not FORMATS["think_answer"].parse(b)
    ):
        note("paid without a parse", a, b)
    timed("repetition", repetition_reward, [b])


def seeds(folder):
    "Prefix of three bytes picks kind, choices and split; the rest is text."
    for i, line in enumerate((ROOT / "tests/data/graded.jsonl").read_text(encoding="utf-8").splitlines()):
        d = json.loads(line)
        text = f"{d['gold']}{d['prediction']}".encode()[:400]
        (folder / f"{i}").write_bytes(text + bytes([len(str(d["gold"]).encode()) % 256, i % 3, i % 8]))
    for i, text in enumerate(f.render("Two red.", "2") for f in FORMATS.values()):
        (folder / f"f{i}").write_bytes(text.encode() + bytes([0, 0, 1]))


if __name__ == "__main__":
    faulthandler.enable()
    seconds, folder = int(sys.argv[1]) if len(sys.argv) > 1 else 3600, Path(tempfile.mkdtemp())
    seeds(folder)
    atheris.Setup(
        [
            sys.argv[0],
            str(folder),
            "-max_len=2000",
            "-timeout=600",
            "-rss_limit_mb=4096",
            "-print_final_stats=1",
            "-seed=1",
        ],
        lambda data: step(data),
    )
    end = time.time() + seconds

    def step(data):
        one(data)
        if time.time() > end:
            print(f"{seconds} s, {sum(calls.values()):,} calls: {dict(calls)}")
            print("slowest call in s of processor time:", {k: round(v, 3) for k, v in slowest.items()})
            print(f"findings: {sum(found.values())} {dict(found)}", flush=True)
            sys.stdout.flush()
            import os

            os._exit(1 if found else 0)

    atheris.Fuzz()
