"""How time and memory grow with the rows: reading them, making pairs of stored answers, and scoring stored
answers, at 1, 10 and 100 times the rows. No model is asked.

Usage: python bench/growth.py [--json OUT.json] [--rows N]

`distill` and `evaluate` are run as they are; the answers that a model would write lie on disk already, so
nothing is sampled. Each measurement has a process of its own. Of time, the processor's seconds count, and the
exponent is that of its growth from 10 to 100 times the rows (1: linear). Of memory, the peak over what was
held before."""

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import cycle, islice
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
PARTS, SAMPLES = ("rows", "pairs", "evaluation"), 4


def completion(row, rng):
    "What a model might say: right and wrong, in and out of format"
    gold = row["answer"]
    said = (
        gold
        if rng.random() < 0.6
        else str(rng.randint(0, 9)) if row["kind"] == "number" else rng.choice("ABC")
    )
    thought = (
        f"I look at each cell of the picture and count. {rng.randint(0, 9)} of them are meant, so the answer"
        f" is {said}."
    )
    return rng.choice(
        [f"<think>{thought}</think><answer>{said}</answer>"] * 3
        + [f"{thought}\n\nAnswer: {said}", f"<think>{thought} {said}", thought]
    )


def prepare(folder, n):
    "`n` rows in a file, and the answers to them where `distill` and `evaluate` look for them"
    from specs_nb import world
    from specs_nb.core import EvalStage, PairsStage, write_json
    from specs_nb.data import Picture, to_png, write_rows

    few, rng = world.rows("train", 100), random.Random(0)
    rows = [{**r, "images": [Picture(to_png(i), i) for i in r["images"]]} for r in few]
    write_rows(
        ({**r, "id": f"{r['id']}-{i}"} for i, r in enumerate(islice(cycle(rows), n))), folder / "rows.arrow"
    )
    for names, where, size in (
        (("zero", "base"), "pairs", PairsStage().batch_size // SAMPLES),
        (("final-id",), "evaluation", EvalStage().batch_size // SAMPLES),
    ):
        for name in names:
            for i in range(0, n, size):
                write_json(
                    folder / where / f"samples/{name}-{i}.json",
                    [
                        [completion(few[k % len(few)], rng) for _ in range(SAMPLES)]
                        for k in range(i, min(i + size, n))
                    ],
                )


def work(part, folder, n):
    "What is measured"
    from specs_nb.core import EvalStage, PairsStage
    from specs_nb.data import Rows
    from specs_nb.evaluate import evaluate
    from specs_nb.formats import FORMATS
    from specs_nb.pairs import distill

    rows = Rows(folder / "rows.arrow")
    if part == "rows":
        return lambda: sum(r["images"][0].load() is not None for r in rows)
    if part == "pairs":
        return lambda: distill(
            "tiny",
            "tiny",
            rows,
            folder / part,
            PairsStage(n_prompts=n, n_samples=SAMPLES, max_pairs=n),
            FORMATS["think_answer"],
        )
    return lambda: evaluate(
        {"final": "tiny"},
        {"id": (rows, ["think_answer"] * n)},
        folder / part,
        EvalStage(n_samples=SAMPLES, greedy=False),
    )


def one(part, folder, n):
    "Processor seconds and peak memory of one part, in this process"
    if part == "prepare":
        return prepare(folder, n)
    (warm := folder / f"warm-{part}").mkdir()  # imports and what is made once are no growth
    prepare(warm, 8)
    work(part, warm, 8)()
    from specs_nb.core import peak_memory_gb, reset_peak_memory

    f = work(part, folder, n)
    reset_peak_memory()
    held, cpu = peak_memory_gb(), time.process_time()
    f()
    print(json.dumps(dict(cpu_s=time.process_time() - cpu, peak_mib=1024 * (peak_memory_gb() - held))))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--json", type=Path, default=Path(__file__).parent / "results/growth.json")
    p.add_argument("--rows", type=int, default=100, help="rows of the smallest")
    p.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        return one(a.one[0], Path(a.one[1]), int(a.one[2]))
    out = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread",
        python=platform.python_version(),
        seed=0,
        samples=SAMPLES,
        sizes=[a.rows * k for k in (1, 10, 100)],
    )
    found = {p: [] for p in PARTS}
    for n in out["sizes"]:
        with tempfile.TemporaryDirectory() as tmp:
            for part in ("prepare", *PARTS):
                r = subprocess.run(
                    [sys.executable, __file__, "--one", part, tmp, str(n)], capture_output=True, text=True
                )
                if r.returncode:
                    sys.exit(f"{part} with {n} rows: {r.stderr[-1500:]}")
                if part in found:
                    found[part].append(json.loads(r.stdout.splitlines()[-1]))
    for part, (small, mid, large) in found.items():
        kib = 1024 * (large["peak_mib"] - mid["peak_mib"]) / (out["sizes"][2] - out["sizes"][1])
        out[part] = dict(
            cpu_s=[x["cpu_s"] for x in found[part]],
            peak_mib=[x["peak_mib"] for x in found[part]],
            exponent=math.log10(large["cpu_s"] / mid["cpu_s"]),
            kib_a_row=kib,
        )
        print(
            f"{part:11} 100 times the rows: {large['cpu_s'] / small['cpu_s']:5.1f} times the time (exponent"
            f" {out[part]['exponent']:.2f}, {'linear' if out[part]['exponent'] < 1.15 else 'NOT linear'}),"
            f" {large['peak_mib']:,.0f} MiB against {small['peak_mib']:,.0f} ({kib:.1f} KiB a"
            f" row{'' if kib > .5 else ', flat'})",
            flush=True,
        )
    a.json.parent.mkdir(parents=True, exist_ok=True)
    a.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
