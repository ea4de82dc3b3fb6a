"""Does it help to choose the questions of a GRPO step? The embedded base with and without `sampling`: steps,
and completions, to a given accuracy on held-out questions.

Usage: python bench/sampling.py [--seeds 200 201 …] [--arms off rates refill both] [--steps N]
                                [--threshold A] [--json OUT.json]

Every arm of a seed begins with the same weights and has the same training and held-out questions. The pass
rates with which `rates` and `both` begin come from four sampled answers of the base to each training
question, as a data set's own column would; what they cost is counted in `completions_with_rates`. Accuracy is
strict (right, and in form), greedy, measured by `validate`; between two looks it is taken to change evenly. A
threshold that isn't reached is null. The threshold, 0.3, was chosen beforehand from the pilot in
docs/results/plan.md (seed 100: 0.25 of the training answers strict in steps 21 to 30, 0.32 in 31 to 40), and
the seeds are none of that plan's. Each run is written when it
ends, so that a stopped bench goes on."""

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from transformers import TrainerCallback

from specs_nb import world
from specs_nb.core import Config, QuestionSampling, Validation
from specs_nb.engines.generate import Sampling
from specs_nb.engines.jobs import Job, answer_all
from specs_nb.formats import FORMATS
from specs_nb.grpo import grpo_trainer, watch_held_out
from specs_nb.look import strict_rates

ARMS = dict(
    off=QuestionSampling(),
    rates=QuestionSampling(by_pass_rate=True),
    refill=QuestionSampling(refill=1.0),
    both=QuestionSampling(by_pass_rate=True, refill=1.0),
)
POOL, HELD, SAMPLES, RATE = 200, 128, 4, 1e-4
FMT = FORMATS["think_answer"]


def base_rates(rows, seed):
    "How often the base answers each question right, in form"
    ask = [Job("base", "tiny", rows, [FMT.instruction] * len(rows))]
    out, how = Path(tempfile.mkdtemp()), Sampling(SAMPLES, 1.0, 96, 256)
    return strict_rates(
        rows, answer_all(ask, how, seed, out, 1, {}, 1, "rates", engine="transformers")["base"], FMT
    )


class Said(TrainerCallback):
    "A line for each validation"

    def __init__(self, name):
        self.name = name

    def on_log(self, args, state, control, logs=None, **kw):
        if logs and "validate/accuracy" in logs:
            words = (
                f"{k.split('/')[-1]} {float(logs[k]):.3f}"
                for k in logs
                if k.startswith(("validate", "questions"))
            )
            print(f"{self.name} step {state.global_step}: {', '.join(words)}", flush=True)


def run(seed, arm, steps, every, rows, held, rates):
    "One training: its curve of (step, completions, accuracy, form)"
    stage = Config().zero
    stage.steps, stage.look, stage.sampling = steps, 0, ARMS[arm]
    stage.validate = Validation(every=every, rows=len(held))
    stage.trainer |= dict(save_strategy="no", learning_rate=RATE)
    known = rates if ARMS[arm].by_pass_rate else None
    t = grpo_trainer("tiny", rows, Path(tempfile.mkdtemp()), stage, FMT, seed, "zero", rates=known)
    watch_held_out(t, held, stage, FMT)
    t.add_callback(Said(f"seed {seed} {arm}"))
    t.train()
    size, written, curve, spread = t.args.generation_batch_size, 0, [], []
    for h in (h for h in t.state.log_history if "loss" in h):
        written += size + h.get("questions/extra", 0)
        spread.append(
            (h.get("questions/spread"), h.get("questions/spread_kept"), 1 - h["frac_reward_zero_std"])
        )
        if "validate/accuracy" in h:
            curve.append((h["step"], int(written), h["validate/accuracy"], h["validate/form"]))
    return dict(seed=seed, arm=arm, curve=curve, spread=spread, completions=int(written))


def reached(curve, threshold):
    "(steps, completions) at which the accuracy was reached; (None, None) if it wasn't"
    before = None
    for step, written, accuracy, _ in curve:
        if accuracy >= threshold:
            if before is None:
                return step, written
            part = (threshold - before[2]) / (accuracy - before[2])
            return tuple(round(x + part * (y - x), 1) for x, y in zip(before, (step, written)))
        before = step, written, accuracy
    return None, None


def facts(options):
    return dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread",
        versions={p: importlib.metadata.version(p) for p in ("torch", "transformers", "trl")},
        steps=options.steps,
        every=options.every,
        pool=POOL,
        held_out=HELD,
        completions_a_step=64,
        learning_rate=RATE,
        rates_cost=POOL * SAMPLES,
        threshold=options.threshold,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202, 203, 204])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=4, help="steps from one validation to the next")
    parser.add_argument("--threshold", type=float, default=0.3, help="accuracy to reach")
    parser.add_argument("--json", default=Path(__file__).parent.parent / "docs/results/sampling.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(options.json)
    out = json.loads(path.read_text()) if path.exists() else {"runs": []}
    for seed in options.seeds:
        missing = [a for a in options.arms if (seed, a) not in {(r["seed"], r["arm"]) for r in out["runs"]}]
        if not missing:
            continue
        rows = world.rows("train", POOL, seed)
        held = world.rows("train", HELD, seed, start=100_000)
        rates = base_rates(rows, seed) if {"rates", "both"} & set(missing) else {}
        for arm in missing:
            r = run(seed, arm, options.steps, options.every, rows, held, rates)
            steps, completions = reached(r["curve"], options.threshold)
            r |= dict(steps_to=steps, completions_to=completions)
            if ARMS[arm].by_pass_rate and completions is not None:
                r["completions_with_rates"] = completions + POOL * SAMPLES
            out = {**facts(options), "runs": [*out["runs"], r]}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(out, indent=1) + "\n")
