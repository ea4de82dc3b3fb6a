"""How long a GRPO step takes: TRL's `GRPOTrainer` beside ours, the embedded model with the default
configuration, in one process on one thread.

Usage: python bench/grpo_step.py [--steps N] [--json OUT.json]

The two trainers take turns, a step each, with the same weights to begin with, the same batch and the same
seed. The first turn warms up and isn't counted. The processor's seconds are what counts, since on a machine
that others use too the clock on the wall measures them; both are kept. The floor is what the step can't do
without (each token of a prompt read once for eight answers, each token of an answer written once and scored
once, no padding, forward and backward), in floating-point operations, over the rate at which this machine
multiplies matrices of 1024 x 1024."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from transformers import TrainerCallback

from specs_nb import fast, world
from specs_nb.core import Config
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


def take_turns(steps):
    "Seconds of each step of both, and what each wrote"
    gates, both, threads = [threading.Semaphore(1), threading.Semaphore(0)], {}, []
    for i, name in enumerate(("stock", "fast")):
        t = trainer(name == "fast", steps)
        both[name] = t, Turns(gates[i], gates[1 - i])
        t.add_callback(both[name][1])
        threads.append(threading.Thread(target=t.train))
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
    group, first = fast._first_rows(inputs["group"])
    n, p = inputs["completion_ids"].shape[1], inputs["prompt_ids"].shape[1]
    fields = {
        k: v[:, :p] if k in fast.PER_TOKEN else v
        for k, v in inputs.items()
        if k in fast._FIELDS and k != "num_images"
    }
    images = fast.pick_images(fields, inputs["num_images"], first.tolist())
    # each answer by itself: no padding
    score = lambda: fast.score(t.model, ids, mask, n, group, images, first, parts=len(ids))[0]
    counts = []
    for grad in (False, True):
        with FlopCounterMode(display=False) as count, torch.set_grad_enabled(grad):
            logps = score()
            if grad:
                logps.sum().backward()
        counts.append(count.get_total_flops())
    return sum(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8, help="steps of each that count")
    parser.add_argument("--json", default=Path(__file__).parent / "results/grpo_step.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    both = take_turns(options.steps + 1)
    out = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread",
        seed=SEED,
        steps=options.steps,
        versions={p: importlib.metadata.version(p) for p in ("torch", "transformers", "trl")},
    )
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
    for k, v in out.items():
        print(f"{k:24} {v:.3f}" if isinstance(v, float) else f"{k:24} {v}")
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    Path(options.json).write_text(json.dumps(out, indent=1) + "\n")
