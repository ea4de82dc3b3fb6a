"""How long a GRPO step takes: TRL's `GRPOTrainer` beside ours, the embedded model with the default
configuration, in one process on one thread.

Usage: python bench/grpo_step.py [--steps N] [--shape embedded|200|800] [--json OUT.json]

The two trainers take turns, a step each, with the same weights to begin with, the same batch and the same
seed. The first turn warms up and isn't counted. The processor's seconds are what counts, since on a machine
that others use too the clock on the wall measures them; both are kept. The floor is what the step can't do
without (each token of a prompt read once for eight answers, each token of an answer written once and scored
once, no padding, forward and backward), in floating-point operations, over the rate at which this machine
multiplies matrices of 1024 x 1024.

With `--shape 200` or `800` it is the training step of a recipe for a large model, on a small one (20 million
parameters, Qwen2.5-VL's form, float32, gradient checkpointing): one question with a prompt of 1,400 tokens
and a picture, eight answers of 200 or 800 tokens that are given and not written. Each step is taken in a
process of its own, so that its peak memory can be told."""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from transformers import TrainerCallback

from specs_nb import world
from specs_nb.core import Config, GRPOStage, peak_memory_gb, reset_peak_memory
from specs_nb.engines import fast
from specs_nb.engines.models import random_model
from specs_nb.formats import FORMATS
from specs_nb.grpo import grpo_trainer

SEED = 0


class Turns(TrainerCallback):
    "Lets a trainer take a step when it is its turn, and notes how long it took"

    def __init__(self, mine, other):
        self.mine, self.other, self.cpu, self.wall = mine, other, [], []

    def start(self, step):
        self.mine.acquire()
        torch.manual_seed(1000 * SEED + step)
        self.clocks = time.process_time(), time.perf_counter()

    def on_train_begin(self, args, state, control, **kw):
        self.start(state.global_step)

    def on_step_end(self, args, state, control, **kw):
        for times, clock, began in zip(
            (self.cpu, self.wall), (time.process_time, time.perf_counter), self.clocks
        ):
            times.append(clock() - began)
        self.other.release()
        self.start(state.global_step)

    def on_train_end(self, args, state, control, **kw):
        self.other.release()


def trainer(quick, steps):
    config = Config()
    config.zero.steps, config.zero.fast, config.zero.trainer["save_strategy"] = steps, quick, "no"
    return grpo_trainer(
        "tiny",
        world.rows("train", 8 * steps),
        Path(tempfile.mkdtemp()),
        config.zero,
        FORMATS[config.data.format],
        SEED,
        "zero",
    )


LARGE = dict(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=7,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=4096,
)


def recipe_trainer(quick, steps, length, prompt=1400):
    "A trainer of a recipe's shape whose eight answers of so many tokens are given"
    folder = Path(tempfile.mkdtemp())
    start = random_model("qwen2.5-vl", folder / "model", **LARGE)
    rows = world.rows("train", steps)
    rows = [{**r, "question": r["question"] + " 1" * ((prompt - 70) // 2)} for r in rows]
    how = dict(
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=length,
        gradient_checkpointing=True,
        save_strategy="no",
    )
    config = GRPOStage(steps=steps, fast=quick, trainer=how)
    t = grpo_trainer(start, rows, folder, config, FORMATS["think_answer"], SEED)
    draw = torch.Generator().manual_seed(SEED)
    answers = torch.randint(20, 400, (8, length), generator=draw).tolist()
    t._generate_single_turn = lambda *args, **kw: (answers, None)
    t.reward_funcs[:] = [lambda completions, **kw: [float(i) for i in range(len(completions))]] * 2
    return t


class Watch(TrainerCallback):
    "Seconds of the processor that a step takes"

    def on_step_begin(self, args, state, control, **kw):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kw):
        self.seconds = time.process_time() - self.start


def step_alone(name, length):
    "Print seconds and peak memory of one step, in this process"
    t, watch = recipe_trainer(name == "fast", 1, length), Watch()
    t.add_callback(watch)
    if name == "fast":
        t._fast("scoring")
        t._tried.add("scoring")  # what is compared with TRL once in a run is no part of a step
    gc.collect()
    reset_peak_memory()
    before = peak_memory_gb()
    t.train()
    peak = peak_memory_gb() - before
    facts = dict(
        cpu_s=watch.seconds,
        peak_gb=peak,
        prompt=t._buffered_inputs[0]["prompt_ids"].shape[1],
        parameters=sum(p.numel() for p in t.model.parameters()),
    )
    print("STEP", json.dumps(facts))


# the allocator gives memory back at once, else its hoard is measured too
GIVE_BACK = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")


def steps_alone(steps, length):
    "Both trainers by turns, each step in a process of its own"
    found = {"stock": [], "fast": []}
    for _ in range(steps):
        for name in found:
            command = [sys.executable, __file__, "--shape", length, "--alone", name]
            said = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **GIVE_BACK}
            ).stdout
            found[name].append(json.loads(said.rsplit("STEP", 1)[1]))
            print(name, found[name][-1], flush=True)
    first = found["fast"][0]
    out = dict(parameters=first["parameters"], prompt_tokens=first["prompt"])
    for name, steps in found.items():
        for key in ("cpu_s", "peak_gb"):
            out[f"{name}_{key}"] = statistics.median(x[key] for x in steps)
    for key in ("cpu_s", "peak_gb"):
        out[f"ratio_{key}"] = out[f"fast_{key}"] / out[f"stock_{key}"]
    return out


def train_or_let_go(t, gates):
    "Train; where that fails the other trainer isn't kept waiting for its turn"
    try:
        t.train()
    except Exception:
        for gate in gates:
            gate.release(1000)
        raise


def take_turns(steps):
    "Seconds of each step of both, and what each wrote"
    gates, both, threads = [threading.Semaphore(1), threading.Semaphore(0)], {}, []
    for i, name in enumerate(("stock", "fast")):
        t = trainer(name == "fast", steps)
        both[name] = t, Turns(gates[i], gates[1 - i])
        t.add_callback(both[name][1])
        threads.append(threading.Thread(target=train_or_let_go, args=(t, gates)))
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return both


def rate(size=1024, times=5):
    "Floating-point operations a second of a matrix product, the best of some, by the processor's seconds"
    a, b, seconds = torch.randn(size, size), torch.randn(size, size), []
    for _ in range(times):
        start = time.process_time()
        a @ b
        seconds.append(time.process_time() - start)
    return 2 * size**3 / min(seconds)


def needed(t):
    "Floating-point operations that the last step can't do without"
    from torch.utils.flop_counter import FlopCounterMode

    t.model.train()
    inputs = t._buffered_inputs[0]
    ids, mask = (torch.cat([inputs[f"prompt_{k}"], inputs[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    fields = {k: v for k, v in inputs.items() if k in fast._FIELDS}
    n, counts = inputs["completion_ids"].shape[1], []
    for grad in (False, True):
        with FlopCounterMode(display=False) as count, torch.set_grad_enabled(grad):
            logps = t._score(t.model, ids, mask, n, inputs["group"], fields)[0]
            if grad:
                logps.sum().backward()
        counts.append(count.get_total_flops())
    return sum(counts)


def facts_of(options):
    return dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread",
        shape=options.shape,
        seed=SEED,
        steps=options.steps,
        versions={p: importlib.metadata.version(p) for p in ("torch", "transformers", "trl")},
    )


def embedded(steps):
    "Seconds of both trainers with the embedded model, and the floor"
    both, out = take_turns(steps + 1), {}
    for name, (t, turns) in both.items():
        history = [h for h in t.state.log_history if "completions/mean_length" in h][1:]
        for clock in ("cpu", "wall"):
            out[f"{name}_{clock}_s"] = statistics.median(getattr(turns, clock)[1:])
        out[f"{name}_all_cpu_s"] = [round(x, 4) for x in turns.cpu[1:]]
        out[f"{name}_tokens"] = statistics.mean(h["completions/mean_length"] for h in history)
        out[f"{name}_longest"] = statistics.mean(h["completions/max_length"] for h in history)
    for clock in ("cpu", "wall"):
        out[f"ratio_{clock}"] = out[f"fast_{clock}_s"] / out[f"stock_{clock}_s"]
    out["needed_gflop"], out["gflop_per_s"] = needed(both["fast"][0]) / 1e9, rate() / 1e9
    out["floor_s"] = out["needed_gflop"] / out["gflop_per_s"]
    for name in both:
        out[f"{name}_times_the_floor"] = out[f"{name}_cpu_s"] / out["floor_s"]
    return out


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8, help="steps of each that count")
    parser.add_argument("--shape", default="embedded", choices=["embedded", "200", "800"])
    parser.add_argument("--alone", choices=["stock", "fast"], help=argparse.SUPPRESS)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        return step_alone(options.alone, int(options.shape))
    small = options.shape == "embedded"
    out = facts_of(options) | (
        embedded(options.steps) if small else steps_alone(options.steps, options.shape)
    )
    for k, v in out.items():
        print(f"{k:24} {v:.3f}" if isinstance(v, float) else f"{k:24} {v}")
    name = "grpo_step.json" if options.shape == "embedded" else f"grpo_step_{options.shape}.json"
    path = Path(options.json or Path(__file__).parent / "results" / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
