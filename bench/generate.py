"""How fast completions are written: transformers beside vLLM, the embedded model, in one run on one machine.

Usage: .venv-vllm/bin/python bench/generate.py [OUT.json]   (`make vllm` builds that environment; elsewhere it says so and measures nothing)

Each engine answers the same questions in batches of the same size, once to warm up and then three times; the best time counts. Tokens are those that
were really written. What starting takes is measured apart.
"""
import json, os, platform, sys, time
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from specs_nb import generate, world
from specs_nb.formats import FORMATS

QUESTIONS, HOW = 64, generate.Sampling(n=4, max_new_tokens=96, batch_size=64)


def measure(engine):
    "Seconds to start and tokens a second"
    rows, ask = world.rows("test", QUESTIONS), FORMATS["think_answer"].instruction
    start = time.perf_counter()
    e = generate.ENGINES[engine]("tiny", {}, {})
    started, size = time.perf_counter() - start, HOW.batch_size // HOW.n
    def once(seed):
        start, tokens = time.perf_counter(), 0
        for i in range(0, len(rows), size):
            some = rows[i:i + size]
            tokens += sum(len(c.ids) for d in e.sample(some, [ask] * len(some), HOW, seed + i) for c in d)
        return tokens / (time.perf_counter() - start), tokens
    once(0)
    runs = [once(1000 * k) for k in (1, 2, 3)]
    return {f"{engine}_starts_in_s": started, f"{engine}_tokens_per_second": max(r for r, _ in runs), f"{engine}_tokens": sum(t for _, t in runs)}


if __name__ == "__main__":
    if generate.vllm_version() is None:
        print("vLLM isn't installed here: `make vllm`, then .venv-vllm/bin/python bench/generate.py")
        sys.exit(0)
    results = {**measure("transformers"), **measure("vllm")}
    results["vllm_to_transformers"] = results["vllm_tokens_per_second"] / results["transformers_tokens_per_second"]
    for k, v in results.items(): print(f"{k:32} {v:12,.2f}")
    about = dict(date=str(date.today()), versions=[generate.ENGINES[e].version() for e in ("transformers", "vllm")], cores=os.cpu_count(), machine=platform.machine(),
                 completions_in_flight=HOW.batch_size, questions=QUESTIONS, samples=HOW.n)
    if len(sys.argv) > 1: Path(sys.argv[1]).write_text(json.dumps({**about, **results}, indent=1) + "\n")
