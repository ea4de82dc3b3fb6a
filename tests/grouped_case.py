"""What test_grouped.py runs by two processes and by one: two steps of GRPO with SGD, the same answers to 4
questions. By two: in rows with all answers, under checkpointing, in passes; by one: TRL as it is,
the step in one batch"""

import random
import sys
from pathlib import Path

import torch

from specs_nb import world
from specs_nb.core import GRPOStage
from specs_nb.engines.ranks import is_main, rank
from specs_nb.formats import FORMATS
from specs_nb.grpo import grpo_trainer


def canned(prompt_ids, *_, **__):
    "Answers that follow from the question and the number among all answers"
    start, answers = rank()[0] * len(prompt_ids), []
    for i, prompt in enumerate(prompt_ids):
        draw = random.Random(f"{list(map(int, prompt))}/{(start + i) % 6}")
        answers.append([draw.randrange(20, 400) for _ in range(draw.randrange(1, 13))])
    return answers, None


def first(completions, **kw):
    "Pays for nothing in particular"
    return [float(len(c[0]["content"]) % 5) for c in completions]


def main(out):
    n = rank()[1]
    how = dict(
        per_device_train_batch_size=12 // n if n > 1 else 24,
        gradient_accumulation_steps=2 if n > 1 else 1,
        num_generations=6,
        max_completion_length=12,
        gradient_checkpointing=n > 1,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
    )
    many = {"tokens_per_microbatch": 60} if n > 1 else {"fast": False}
    config = GRPOStage(steps=2, trainer=how, **many)
    folder = Path(out).parent / f"run{n}-{rank()[0]}"
    t = grpo_trainer("tiny", world.rows("train", 8), folder, config, FORMATS["think_answer"])
    t._generate_single_turn, t.reward_funcs[:] = canned, [first, first]
    passes = []
    if n > 1:
        score = t._score_pass
        t._score_pass = lambda *args: passes.append(1) or score(*args)
    start = t.model.lm_head.weight.detach().clone()
    t.train()
    if is_main():
        weights = dict(t.accelerator.unwrap_model(t.model).state_dict())
        moved = (weights["lm_head.weight"] - start).abs().max().item()
        logged = [
            {k: h[k] for k in ("loss", "entropy", "clip_ratio/low_min")} for h in t.state.log_history[:-1]
        ]
        torch.save({"weights": weights, "passes": len(passes), "moved": moved, "logged": logged}, out)


if __name__ == "__main__":
    main(sys.argv[1])
