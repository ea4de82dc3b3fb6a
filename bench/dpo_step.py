"""A step of the cold start, ours beside TRL's own, in turn in one process; and the whole stage with what is
computed beforehand.

Usage: python bench/dpo_step.py [--json OUT.json] [--rounds N] [--seed N]"""

import argparse
import datetime
import json
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.disable(logging.WARNING)
BATCH, STEPS, EPOCHS = 16, 25, 4  # four epochs of 400 pairs


def pairs(folder, n, seed):
    "A few distilled pairs of the embedded world, repeated up to `n`: their number changes no step's cost"
    from datasets import concatenate_datasets

    from specs_nb import world
    from specs_nb.core import PairsStage
    from specs_nb.formats import FORMATS
    from specs_nb.pairs import distill, read_pairs

    distill(
        "tiny",
        "tiny",
        world.rows("train", 64, seed=seed),
        folder,
        PairsStage(n_samples=4, max_pairs=64),
        FORMATS["think_answer"],
        seed=seed,
    )
    few = read_pairs(folder / "pairs.parquet")
    return concatenate_datasets([few] * -(-n // len(few))).select(range(n))


def clock(f):
    "Wall seconds and the process's own CPU seconds of a call, and what it returned"
    wall, cpu = time.perf_counter(), time.process_time()
    found = f()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def measure(ds, folder, rounds, seed, **stage):
    """Median seconds of a step of both, in turn, with fetching and preparing the batch; and of the making of
    both trainers"""
    from specs_nb.coldstart import coldstart_trainer
    from specs_nb.core import ColdStartStage

    made, step = {}, {"stock": [], "ours": []}
    for name in ("warm up", "stock", "ours"):  # the first pays for imports
        config = ColdStartStage(fast=name != "stock", **stage)
        made[name] = clock(
            lambda: coldstart_trainer(
                "tiny", ds if name != "warm up" else ds.select(range(BATCH)), folder / name, config, seed
            )
        )
    trainers = {name: made[name][2] for name in step}
    batches = {}
    for name, trainer in trainers.items():
        trainer.model.train()
        trainer.create_optimizer_and_scheduler(STEPS * EPOCHS)
        trainer.current_gradient_accumulation_steps = 1
        batches[name] = iter(trainer.get_train_dataloader())
    losses = {name: [] for name in step}
    for i in range(rounds + 1):
        for name in ("stock", "ours") if i % 2 else ("ours", "stock"):
            trainer = trainers[name]

            def one():
                loss = trainer.training_step(trainer.model, next(batches[name])).item()
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
                return loss

            wall, cpu, loss = clock(one)
            losses[name].append(loss)
            if i:
                step[name].append((wall, cpu))
    gap = max(abs(a - b) for a, b in zip(*losses.values()))
    assert gap < 1e-3, f"the two trained differently: {gap}"
    wall, cpu = (
        {name: statistics.median(s[k] for s in found) for name, found in step.items()} for k in (0, 1)
    )
    begin, begin_cpu = (made["ours"][k] - made["stock"][k] for k in (0, 1))
    stages = {name: STEPS * EPOCHS * cpu[name] + (begin_cpu if name == "ours" else 0) for name in step}
    return dict(
        step_seconds=wall,
        step_cpu_seconds=cpu,
        step_ratio=wall["ours"] / wall["stock"],
        step_cpu_ratio=cpu["ours"] / cpu["stock"],
        reference_seconds=begin,
        reference_cpu_seconds=begin_cpu,
        stage_cpu_seconds=stages,
        stage_ratio=stages["ours"] / stages["stock"],
        largest_difference_of_losses=gap,
        rounds=rounds,
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--json", default=str(Path(__file__).parent / "results/dpo_step.json"), help="where to")
    p.add_argument("--rounds", type=int, default=12, help="timed steps of each")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        ds = pairs(folder / "pairs", BATCH * STEPS, a.seed)
        out = {
            "lora": measure(ds, folder / "lora", a.rounds, a.seed),
            "full": measure(ds, folder / "full", a.rounds, a.seed, lora=False),
        }
    finally:
        shutil.rmtree(folder)
    out = dict(
        date=str(datetime.date.today()),
        machine=f"{os.cpu_count()} CPU cores",
        threads=1,
        seed=a.seed,
        python=platform.python_version(),
        versions={n: version(n) for n in ("torch", "transformers", "trl", "peft")},
        pairs=BATCH * STEPS,
        batch=BATCH,
        epochs=EPOCHS,
        **out,
    )
    Path(a.json).parent.mkdir(parents=True, exist_ok=True)
    Path(a.json).write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    for name in ("lora", "full"):
        r = out[name]
        print(
            f"{name}: a step takes {r['step_ratio']:.2f} of TRL's time ({r['step_cpu_ratio']:.2f} by CPU"
            f" time; {r['step_cpu_seconds']['ours']:.3f} against {r['step_cpu_seconds']['stock']:.3f} s), the"
            f" stage with the reference's pass {r['stage_ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
