"""Measures what the doctor estimates: the peak memory of a small random model on the CPU.

`measure` starts a process that builds a model of some 30 million parameters, trains it for two steps or lets
it answer, and reads the peak of its resident memory from the kernel, less what it held before the model was
there. The allocator is told to give memory back at once; otherwise its reserve would be measured too.
test_doctor_measured.py measures some of the `CASES`, bench/doctor.py all of them."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from specs_nb.scale.doctor import Parts, Shape, generation, shape_of, training

WIDE = dict(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=8192,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
_OF_DEEP = dict(num_hidden_layers=14, num_attention_heads=6, num_key_value_heads=6)
DEEP = dict(WIDE, hidden_size=384, intermediate_size=1536, **_OF_DEEP)
HEADS = dict(WIDE, num_attention_heads=16, num_key_value_heads=4, head_dim=32)
SEES = dict(
    family="qwen2.5-vl",
    text=HEADS,
    vision=dict(hidden_size=256, intermediate_size=512, depth=6, num_heads=4),
    image=280,
)
# family and fields of its text and vision model; kind (a plain loop: full, lora, generate; a stage's trainer:
# dpo, grpo) and for the trainers what they train; batch, tokens of a prompt, new tokens, checkpointing, and
# the side of the image
CASES = {
    "full": dict(kind="full", text=WIDE, batch=4, tokens=256),
    "full, one short sequence": dict(kind="full", text=WIDE, batch=1, tokens=64),
    "full, deep": dict(kind="full", text=DEEP, batch=2, tokens=512),
    "full, checkpointing": dict(kind="full", text=WIDE, batch=4, tokens=256, checkpoint=1),
    "lora": dict(kind="lora", text=WIDE, batch=4, tokens=256),
    "lora, deep, checkpointing": dict(kind="lora", text=DEEP, batch=2, tokens=512, checkpoint=1),
    "generate": dict(kind="generate", text=WIDE, batch=32, tokens=192, new=24),
    "generate, deep": dict(kind="generate", text=DEEP, batch=48, tokens=128, new=48),
    "full, images": dict(kind="full", batch=4, tokens=256, **SEES),
    "lora, images": dict(kind="lora", batch=4, tokens=256, **SEES),
    "dpo, lora": dict(kind="dpo", train="lora", text=WIDE, batch=2, new=30),
    "dpo, full": dict(kind="dpo", train="full", text=WIDE, batch=2, new=30),
    "grpo, full": dict(kind="grpo", train="full", text=WIDE, batch=8, new=48),
    "grpo, lora, checkpointing": dict(kind="grpo", train="lora", text=WIDE, batch=16, new=32, checkpoint=1),
}


# ---- in this process: a model is put to work, and the peak is read


def from_status(key):
    "What the system says of this process's memory, in bytes: `VmRSS` is now, `VmHWM` the peak"
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024


def settled():
    "Memory in bytes when what is free was given back; from here the peak is counted anew"
    import ctypes

    from specs_nb.core import reset_peak_memory

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = from_status("VmRSS")
    reset_peak_memory()
    return before


def text_batch(spec):
    "Random tokens, with padding as in every real batch"
    import torch

    ids = torch.randint(4, 400, (spec["batch"], spec["tokens"]))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return dict(input_ids=ids, attention_mask=mask)


def image_batch(spec, folder):
    "The same picture and a long text in each row, cut to the tokens that are asked for"
    from specs_nb import world
    from specs_nb.engines.models import load_processor

    n, length, side = spec["batch"], spec["tokens"], spec["image"]
    p = load_processor(folder)
    p.image_processor.size["longest_edge"] = side**2
    pixels = world.rows("train", 1)[0]["images"][0].resize((side, side))
    said = [{"type": "image"}, {"type": "text", "text": "a " * 2 * length}]
    chat = p.apply_chat_template([{"role": "user", "content": said}])
    batch = p(images=[[pixels]] * n, text=[chat] * n, return_tensors="pt")
    of_tokens = lambda v: v.ndim == 2 and v.shape[0] == n and v.shape[1] > length
    return {k: v[:, :length] if of_tokens(v) else v for k, v in batch.items()}


def answer(model, spec, batch):
    import torch

    new = dict(max_new_tokens=spec["new"], min_new_tokens=spec["new"])
    with torch.no_grad():
        model.eval().generate(**batch, **new, do_sample=True, top_k=0)


def train(model, spec, batch):
    "Two steps of plain training"
    import torch
    from peft import get_peft_model

    from specs_nb.engines.models import lora_config

    if spec["kind"] == "lora":
        model = get_peft_model(model, lora_config(spec.get("rank", 16)))
    if spec.get("checkpoint"):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    for _ in range(2):
        out = model(**batch, labels=batch["input_ids"])
        out.loss.backward()
        del out
        opt.step()
        opt.zero_grad()


def stage_settings(spec):
    "What both trainers are told"
    how = dict(
        per_device_train_batch_size=spec["batch"],
        learning_rate=1e-6,
        gradient_checkpointing=bool(spec.get("checkpoint")),
        save_strategy="no",
    )
    return dict(lora=spec["train"] == "lora", qlora=spec["train"] == "qlora", fast=False), how


def dpo(spec, folder, rows, tmp):
    "Two steps of the cold start's trainer; sequences and length of its last batch"
    from specs_nb.coldstart import coldstart_trainer
    from specs_nb.core import ColdStartStage
    from specs_nb.formats import FORMATS
    from specs_nb.pairs import make_pairs, read_pairs, write_pairs

    stage, how = stage_settings(spec)
    said = [[("one two three " * spec["new"], "1")]] * len(rows)
    fmt = FORMATS["think_answer"]
    write_pairs(make_pairs(rows, said, said, fmt, ["plain_answer"], len(rows)), tmp / "pairs.parquet")
    stage = ColdStartStage(trainer={**how, "max_steps": 2}, **stage)
    t, seen = coldstart_trainer(folder, read_pairs(tmp / "pairs.parquet"), tmp, stage), []
    loss = t.compute_loss

    def watched(model, inputs, *a, **kw):
        seen.append([*inputs["input_ids"].shape, 0])
        return loss(model, inputs, *a, **kw)

    t.compute_loss = watched
    t.train()
    return seen[-1]


def grpo(spec, folder, rows, tmp):
    "Two steps of GRPO's trainer; sequences, prompt and completion of its last batch"
    from specs_nb.core import GRPOStage
    from specs_nb.formats import FORMATS
    from specs_nb.grpo import grpo_trainer

    stage, how = stage_settings(spec)
    how |= dict(num_generations=4, max_completion_length=spec["new"])
    how["generation_kwargs"] = {"min_new_tokens": spec["new"]}
    stage = GRPOStage(steps=2, trainer=how, **stage)
    t, seen = grpo_trainer(folder, rows, tmp, stage, FORMATS["think_answer"]), []
    loss = t._compute_loss

    def watched(model, inputs):
        seen.append([*inputs["prompt_ids"].shape, inputs["completion_ids"].shape[1]])
        return loss(model, inputs)

    t._compute_loss = watched
    t.train()
    return seen[-1]


def run_stage(spec, folder):
    from specs_nb import world

    rows = [{**r, "images": []} for r in world.rows("train", 16)]
    return dict(dpo=dpo, grpo=grpo)[spec["kind"]](spec, folder, rows, Path(tempfile.mkdtemp()))


def build(spec, tmp):
    "A random model's folder and configuration"
    from specs_nb.engines.models import load_config_of, random_model

    folder = random_model(spec.get("family", "text"), tmp, **spec.get("text", {}))
    config = load_config_of(folder)
    for k, v in spec.get("vision", {}).items():
        setattr(config.vision_config, k, v)
    return folder, config


def work(spec, folder, config):
    "Do what a case asks for; the shape of a trainer's last batch"
    from specs_nb.engines.models import model_class

    if spec["kind"] in ("dpo", "grpo"):
        return run_stage(spec, folder)
    batch = image_batch(spec, folder) if spec.get("image") else text_batch(spec)
    do = answer if spec["kind"] == "generate" else train
    do(model_class(folder).from_config(config), spec, batch)


def measure_here(spec):
    """Peak in bytes, what was there before, the model's shape, and the shape of a trainer's last batch.

    A small model does the same first: libraries import parts of themselves only when these are called (PEFT
    brings 66 MiB with its first adapter), and keep buffers of their own. Neither is the model's."""
    import torch

    from specs_nb.engines.models import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = {**spec, "text": {}, "vision": {}, "image": 0, "tokens": 16}
    work(small, *build(small, Path(tempfile.mkdtemp()) / "s"))
    folder, config = build(spec, Path(tempfile.mkdtemp()) / "m")
    before = settled()
    seen = work(spec, folder, config)
    peak = from_status("VmHWM") - before
    return dict(peak=peak, base=before, shape=vars(shape_of(folder, config)), seen=seen)


# ---- from outside


def measure(spec):
    "What `measure_here` finds in a process of its own, as JSON"
    alone = dict(
        MALLOC_MMAP_THRESHOLD_="65536",
        MALLOC_TRIM_THRESHOLD_="65536",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        CUDA_VISIBLE_DEVICES="",
    )
    command = [sys.executable, __file__, json.dumps(spec)]
    r = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **alone})
    if r.returncode:
        raise RuntimeError(f"measuring failed: {r.stderr[-2000:]}")
    return json.loads(r.stdout.strip().splitlines()[-1])


def predict(
    spec: dict,  # of `CASES`
    measured: dict,  # from `measure`; of it the shapes are used, not the peak
) -> Parts:  # without base
    "What the doctor says of a case"
    shape = Shape(**{**measured["shape"], "lora": {1: measured["shape"]["lora"]["1"]}})
    how = dict(checkpoint=bool(spec.get("checkpoint")), gpu=False)
    if spec["kind"] in ("dpo", "grpo"):
        n, prompt, new = measured["seen"]
        both = spec["kind"] == "dpo" and spec["train"] == "full"  # a model beside it, for reference
        learn = training(shape, n, prompt + new, reference=both, train=spec["train"], **how)
        ask = generation(shape, n, prompt, new)
        ask = replace(ask, peak=ask.peak + learn.optimizer)
        return learn if spec["kind"] == "dpo" or learn.peak > ask.peak else ask
    if spec.get("image"):
        how["image_tokens"] = (spec["image"] // 28) ** 2
    if spec["kind"] == "generate":
        return generation(shape, spec["batch"], spec["tokens"], spec["new"])
    return training(shape, spec["batch"], spec["tokens"], train=spec["kind"], tiled=False, **how)


if __name__ == "__main__":
    print(json.dumps(measure_here(json.loads(sys.argv[1]))))
