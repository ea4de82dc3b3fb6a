"""How fast grading is: plain answers a second, and LaTeX beside Math-Verify, measured in one run on one core.

Usage: python bench/grading.py [--json OUT.json]
"""

import argparse
import json
import logging
import os
import platform
import random
import time
from datetime import date
from importlib import metadata
from pathlib import Path

logging.disable(logging.WARNING)  # Math-Verify warns that its time-outs are off
from specs_nb import grading

GRADED = Path(__file__).parent.parent / "tests/data/graded.jsonl"


def seconds(f, pairs, best_of=3):
    "Best time of `f` over all pairs"

    def once():
        start = time.perf_counter()
        for p, g in pairs:
            f(p, g)
        return time.perf_counter() - start

    return min(once() for _ in range(best_of))


def fresh(f, *clear):
    "`f` with its caches emptied before each call"

    def g(p, q):
        for c in clear:
            c.cache_clear()
        return f(p, q)

    return g


def plain(n=20_000):
    "Answers a second: numbers and choices, each pair new to the cache"
    rng, out = random.Random(0), {}
    numbers = [(str(rng.randint(0, 9999)), f"{rng.randint(0, 9999)}") for _ in range(n)]
    choices = [
        (rng.choice(["{}", "({})", "{}.", "The answer is {}"]).format(rng.choice("ABCD")), rng.choice("ABCD"))
        for _ in range(n)
    ]
    for name, kind, pairs in (("number", "number", numbers), ("choice", "choice", choices)):
        uncached = grading._cached.__wrapped__
        out[f"{name}_per_second_uncached"] = n / seconds(
            lambda p, g: uncached(p, g, kind, None, None, None, 0.5), pairs
        )
        grading._cached.cache_clear()
        out[f"{name}_per_second_first_time"] = n / seconds(lambda p, g: grading.grade(p, g, kind), pairs, 1)
    repeated = numbers[:100] * (n // 100)
    out["number_per_second_repeated"] = n / seconds(lambda p, g: grading.grade(p, g, "number"), repeated)
    return out


def latex():
    "Seconds for the LaTeX cases of the table: ours, and Math-Verify alone with the answers in dollars"
    from math_verify import parse, parser, verify

    rows = [json.loads(line) for line in GRADED.open(encoding="utf-8")]
    pairs = [
        (r["prediction"], r["gold"])
        for r in rows
        if r["kind"] == "latex" and not grading.too_hard(r["prediction"]) and not grading.too_hard(r["gold"])
    ]
    dollars = lambda t: t if "$" in t or "\\boxed" in t else f"${t}$"
    alone = lambda p, g: verify(parse(dollars(g)), parse(dollars(p)))
    ours = lambda p, g: grading.grade(p, g, "latex")
    grading._warm()
    caches = (
        parser.parse_latex_cached,
        parser.extract_latex,
        grading.read_latex,
        grading._cached,
        grading.kind_of,
    )
    for f in (ours, alone):
        seconds(f, pairs, 1)  # warm up both parsers
    t_ours, t_alone = seconds(fresh(ours, *caches), pairs), seconds(fresh(alone, *caches), pairs)
    return {
        "latex_cases": len(pairs),
        "latex_ms_each_ours": 1000 * t_ours / len(pairs),
        "latex_ms_each_math_verify": 1000 * t_alone / len(pairs),
        "latex_speed_ratio": t_alone / t_ours,
    }


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--json", type=Path, default=Path(__file__).parent / "results/grading.json")
    to = p.parse_args().json
    results = {**plain(), **latex()}
    for k, v in results.items():
        print(f"{k:32} {v:12,.2f}")
    print(f"a LaTeX answer takes {1 / results['latex_speed_ratio']:.2f} of Math-Verify's time")
    about = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}",
        python=platform.python_version(),
        seed=0,
        versions={n: metadata.version(n) for n in ("math-verify", "sympy")},
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps({**about, **results}, indent=1) + "\n")
