"""What test_recipes.py starts: whole runs of shipped recipes, each with its own YAML and a small model in the
model's place. `walk_case.py OUT NAME…` leaves OUT/NAME.json for each recipe that came to its end

All recipes go through one process, so that torch, TRL and vLLM are imported once."""

import contextlib
import gc
import json
import random
import sys
import time
import traceback
from pathlib import Path

from specs_nb import generate, world
from specs_nb.core import Run, load_config, merge, write_json

DATA = Path(__file__).resolve().parent.parent / "data"
TOKENS = 48  # of a completion; the embedded model needs some 30
ROOM = 512  # tokens of a prompt and its completion
MICRO = 16  # completions a step

# ---- what can't be as shipped, and why. Everything else of a recipe is walked as it stands

STAND_INS = {
    "model.path": "7B doesn't fit here: a model of the same family, of a million parameters or fewer",
    "data": "the sets aren't here: rows of the same schema, drawn by tests/data/make.py, and few of them",
    "lengths": "completions of TOKENS and vLLM's length of ROOM; the small models' own context is 2,048",
    # 8 for pairs: a pair needs a right answer of both models to one question, and small ones have few
    "numbers": "two steps of MICRO completions, few questions, 8 and 2 samples; micro-batches as shipped",
    "vllm sleep": "vLLM's CPU build can't sleep: `imitate_sleep` fills its weights with NaN instead",
    "vllm share": "a CPU has no share of a card: 64 MiB for keys and values beside it, quickly set to zero",
    "answers": "in this process instead of one of their own for each model: it would import vLLM anew",
    "ranks": "one instead of paper_7b's eight; FSDP2 has a test of its own (test_launch.py)",
}


def small(config, model, text):
    "A recipe with what can't be as shipped replaced; see STAND_INS"

    def grpo(stage):
        micro = stage.trainer["per_device_train_batch_size"]
        steps = MICRO // micro
        own = dict(max_completion_length=TOKENS, gradient_accumulation_steps=steps, save_steps=1)
        for key, value in (("steps_per_generation", steps), ("vllm_max_model_length", ROOM)):
            if key in stage.trainer:
                own[key] = value
        return dict(steps=2, trainer=own)

    data = dict(n_train=32, n_test=4)
    if config.data.sources:
        data["sources"] = [{**s, "path": str(DATA / s["source"])} for s in config.data.sources]
    elif config.data.path:
        data["path"] = str(DATA / config.data.source)
    else:
        data["source"] = str(text)
    micro = config.coldstart.trainer["per_device_train_batch_size"]
    cold = dict(gradient_accumulation_steps=8 // micro, max_steps=2, save_steps=1)
    return merge(
        config,
        dict(
            model=dict(path=str(model)),
            data=data,
            vllm=dict(
                max_model_len=ROOM if config.vllm.max_model_len else 0,
                options={**config.vllm.options, "kv_cache_memory_bytes": 2**26},
            ),
            zero=grpo(config.zero),
            pairs=dict(n_prompts=32, n_samples=8, max_pairs=32, max_new_tokens=TOKENS),
            coldstart=dict(trainer=cold),
            final=grpo(config.final),
            eval=dict(n_samples=2, max_new_tokens=TOKENS),
        ),
    )


# ---- small models that answer


def text_folder(out):
    "Questions without pictures in a folder of one's own"
    out.mkdir(parents=True)
    rng = random.Random(0)
    for name, n in (("data.jsonl", 48), ("test.jsonl", 8)):
        with open(out / name, "w") as f:
            for i in range(n):
                a, b, where = rng.randint(0, 2), rng.randint(0, 2), f"{name[0]}{i}"
                asked = f"In house {where} are {a} cats and {b} dogs. How many animals are there?"
                f.write(json.dumps(dict(id=where, question=asked, answer=str(a + b))) + "\n")
    return out


def taught(family, folder, steps=150):
    """A random model of a family that has learnt to write small numbers, in form or not: a recipe needs some
    right answers, and a random model gives none"""
    import torch

    from specs_nb.engines.generate import encode
    from specs_nb.engines.models import load_model, random_model, save_model, tokenizer_of
    from specs_nb.formats import FORMATS

    fmt, rng = FORMATS["think_answer"], random.Random(0)
    model, processor = load_model(random_model(family, folder))
    tok = tokenizer_of(processor)
    rows = [dict(r, images=r["images"] if family != "text" else []) for r in world.rows("train", 16)]
    asked = encode(processor, rows, [fmt.instruction] * len(rows))

    def said():
        a = str(rng.randint(0, 4))
        return (fmt.render("I count.", a) if rng.random() < 0.7 else f"Answer: {a}") + "<|im_end|>"

    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        new = tok([said() for _ in rows], return_tensors="pt", padding=True, padding_side="right")
        ids, seen = new["input_ids"], new["attention_mask"]
        whole = {**asked, "input_ids": torch.cat([asked["input_ids"], ids], 1)}
        whole["attention_mask"] = torch.cat([asked["attention_mask"], seen], 1)
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = torch.cat([asked["mm_token_type_ids"], torch.zeros_like(ids)], 1)
        labels = torch.full_like(whole["input_ids"], -100)
        labels[:, -ids.shape[1] :] = ids.masked_fill(seen == 0, -100)
        loss = model(**whole, labels=labels).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        if loss < 0.22:
            break
    save_model(model, processor, folder)
    print(family, "taught:", round(loss.item(), 2), flush=True)
    return folder


def family_of(path):
    "Which small model stands for a recipe's"
    return "tiny" if "Qwen2.5-VL" in path else "qwen3-vl" if "Qwen3-VL" in path else "text"


# ---- vLLM's sleep


def imitate_sleep():
    """`vllm.LLM` takes `enable_sleep_mode`; at level 2 its weights are lost, and it may not be asked before
    they have been sent again. What happened is noted in the list that is returned"""
    import vllm

    seen, start, ask = [], vllm.LLM.__init__, vllm.LLM.generate

    def lose(model):
        for p in model.parameters():
            p.data.fill_(float("nan"))

    def begin(self, *args, enable_sleep_mode=False, **kw):
        self.may_sleep = enable_sleep_mode
        start(self, *args, **kw)

    def sleep(self, level=1, **kw):
        assert self.may_sleep, "it was started without enable_sleep_mode"
        self.asleep = {"weights", "kv_cache"}
        seen.append(f"sleep {level}")
        if level == 2:
            self.apply_model(lose)

    def wake_up(self, tags=None):
        self.asleep = getattr(self, "asleep", set()) - set(tags or ("weights", "kv_cache"))
        seen.append("wake " + " ".join(tags or ["all"]))

    def generate(self, *args, **kw):
        assert not getattr(self, "asleep", None), f"vLLM is asked while its {self.asleep} sleep"
        return ask(self, *args, **kw)

    vllm.LLM.__init__, vllm.LLM.generate = begin, generate
    vllm.LLM.sleep, vllm.LLM.wake_up = sleep, wake_up
    return seen


# ---- the walk


def walk(name, out, models, sleeps):
    "One recipe from zero to the report; facts to be asserted"
    from specs_nb.pipeline import run_stages

    shipped = load_config(name)
    family = family_of(shipped.model.path)
    if family not in models:
        models[family] = taught(family, out / "models" / family) if family != "tiny" else "tiny"
    config = small(shipped, models[family], out / "text")
    sleeps.clear()
    begun = time.time()
    with contextlib.closing(Run(out / name, config)) as run:
        what = run_stages(run, "report")
    stages = {s: json.loads((out / name / s / "stage.json").read_text()) for s in what}
    return dict(
        seconds=round(time.time() - begun, 1),
        what=what,
        states={s: d["state"] for s, d in stages.items()},
        cost={s: d["seconds"] for s, d in stages.items()},
        sleeps=list(sleeps),
    )


if __name__ == "__main__":
    out, names = Path(sys.argv[1]), sys.argv[2:]
    text_folder(out / "text")
    from specs_nb.engines.vllm_sync import settle

    settle()
    generate._processes = lambda engine, workers: (1, False)
    sleeps, models = imitate_sleep(), {}
    for name in names:
        gc.collect()
        gc.freeze()  # or vLLM's start and end look through all that was imported, seven times an engine
        try:
            facts = walk(name, out, models, sleeps)
        except BaseException as e:
            facts = dict(error=f"{type(e).__name__}: {e}", trace=traceback.format_exc())
        write_json(out / f"{name}.json", facts)
        print(name, facts.get("seconds"), facts.get("cost") or facts["trace"], flush=True)
