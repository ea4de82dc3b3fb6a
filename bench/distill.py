"""How fast answers are written for self-distillation: transformers as people write it, ours on transformers,
and vLLM; the embedded model, in turn, in one run.

Usage: python bench/distill.py [--json OUT.json] [--rounds N] [--questions N]

Where .venv-vllm exists (`make vllm`), the same is measured there too, with vLLM: it pins a transformers and a
torch of its own, so only figures of one environment are compared. `ours` is what the package does by default
(`engine: auto`): the engine that `generate.pick_engine` picks. Batches are of 64 completions, 4 a question,
up to 96 tokens. The first round warms up and isn't counted. Tokens are those
that were really written; the processor's seconds count, since other work may share the machine."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
OTHER = Path(os.environ.get("VLLM_VENV") or ROOT / ".venv-vllm") / "bin/python"


def stock(rows, ask, how):
    "The loop that people write: chat template, processor, `generate`, `batch_decode`"
    import torch

    from specs_nb.data import conversation
    from specs_nb.engines.models import load_model

    model, processor = load_model("tiny")
    model.eval()
    ends = model.generation_config.eos_token_id

    def once(some, seed):
        torch.manual_seed(seed)
        talks = [
            [{
                "role": "user",
                "content": (
                    [{"type": "image"}] * len(r["images"])
                    + [{"type": "text", "text": conversation(r, ask)[0]["content"]}]
                ),
            }]
            for r in some
        ]
        texts = [processor.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in talks]
        inputs = processor(
            text=texts,
            images=[r["images"] for r in some],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        with torch.no_grad():
            out = model.generate(
                **inputs,
                do_sample=True,
                temperature=how.temperature,
                top_k=0,
                num_return_sequences=how.n,
                max_new_tokens=how.max_new_tokens,
            )
        new = out[:, inputs["input_ids"].shape[1] :]
        processor.batch_decode(new, skip_special_tokens=True)
        return sum(ids.index(ends) + 1 if ends in ids else len(ids) for ids in new.tolist())

    return once


def engine(name, ask, how):
    "One of the package's engines"
    from specs_nb import generate

    e = generate.ENGINES[name]("tiny", {}, {})
    return lambda some, seed: sum(len(c.ids) for d in e.sample(some, [ask] * len(some), how, seed) for c in d)


def measure(rounds, questions):
    "Tokens a second of each, in turn"
    import torch

    torch.set_num_threads(1)
    from specs_nb import generate, world
    from specs_nb.formats import FORMATS

    how, rows, ask = (
        generate.Sampling(n=4, max_new_tokens=96, batch_size=64),
        world.rows("test", questions),
        FORMATS["think_answer"].instruction,
    )
    names = ["transformers", *(["vllm"] if generate.supported(generate.vllm_version()) else [])]
    ways = {"stock": stock(rows, ask, how), **{n: engine(n, ask, how) for n in names}}
    auto, size, seen = generate.pick_engine()[0], how.batch_size // how.n, {w: [] for w in ways}
    for i in range(rounds + 1):
        for w in ways if i % 2 else reversed(ways):
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = sum(ways[w](rows[k : k + size], 1000 * i + k) for k in range(0, len(rows), size))
            if i:
                seen[w].append((tokens, time.perf_counter() - wall, time.process_time() - cpu))
    rate = {w: statistics.median(t / cpu for t, _, cpu in s) for w, s in seen.items()}
    return dict(
        versions={n: metadata.version(n) for n in ("torch", "transformers")}
        | ({"vllm": generate.vllm_version()} if "vllm" in ways else {}),
        auto=auto,
        tokens_per_cpu_second=rate,
        tokens_per_second={w: statistics.median(t / wall for t, wall, _ in s) for w, s in seen.items()},
        tokens={w: sum(t for t, *_ in s) for w, s in seen.items()},
        auto_to_best=rate[auto] / max(rate.values()),
        auto_to_stock=rate[auto] / rate["stock"],
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--json", type=Path, default=Path(__file__).parent / "results/distill.json")
    p.add_argument("--rounds", type=int, default=3, help="of each that count")
    p.add_argument("--questions", type=int, default=64)
    # this environment alone, as JSON on the last line
    p.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        return print(json.dumps(measure(a.rounds, a.questions)))
    out = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread",
        python=platform.python_version(),
        seed=0,
        questions=a.questions,
        rounds=a.rounds,
        in_flight=64,
    )
    pythons = {
        "here": sys.executable,
        **({"vllm": OTHER} if OTHER.exists() and OTHER.parent.parent != Path(sys.prefix) else {}),
    }
    for name, python in pythons.items():
        r = subprocess.run(
            [python, __file__, "--one", "--rounds", str(a.rounds), "--questions", str(a.questions)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if r.returncode:
            sys.exit(f"{name}: {r.stderr[-1500:]}")
        out[name] = found = json.loads(r.stdout.splitlines()[-1])
        print(
            f"{name}: auto is {found['auto']}, {found['auto_to_best']:.2f} of the best and"
            f" {found['auto_to_stock']:.2f} times stock transformers"
            f" ({', '.join(f'{w} {v:,.0f}' for w, v in found['tokens_per_cpu_second'].items())} tokens a CPU"
            " second)"
        )
    if "vllm" not in out:
        print("vLLM isn't measured: `make vllm` makes an environment for it")
    a.json.parent.mkdir(parents=True, exist_ok=True)
    a.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
