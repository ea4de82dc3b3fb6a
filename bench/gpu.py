"""How fast and how large: distillation (answering), DPO and GRPO on a model of 7B's shape with random
weights, all weights or LoRA or QLoRA.

What an H100 said is in results/gpu_*.json. On a CPU with the embedded model it only shows that the script
works:

    python bench/gpu.py --shape tiny --device cpu           # seconds; figures that mean nothing for a GPU
    python bench/gpu.py gpu.json                            # the 7B shape on the GPU at hand, LoRA and QLoRA
    python bench/gpu.py --shape 3b --compare                # and TRL as it is beside our faster steps
    specs doctor -c qwen7b_lora_80gb --rate gpu.json        # its pace as the doctor's

Weights are drawn from the configuration, nothing is downloaded; they are written once to a temporary folder
(16 GiB for 7B) so that the stages' own code loads them. Random weights never end an answer, so every
completion has full length. The first step of each measurement is not counted. On a CPU `peak_gib` holds the
interpreter and its libraries too (0.9 GiB); on a GPU it is what torch allocated. MFU counts the model's own
arithmetic: 2 operations a weight and token for reading, 4 more for training all weights, 2 more for an
adapter's backward pass; attention over the sequence and recomputing (gradient checkpointing) are not in it.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

# dense bfloat16 TFLOP/s, makers' data sheets
PEAK = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "3090": 71}
NAMES = {"7b": "Qwen/Qwen2.5-VL-7B-Instruct", "3b": "Qwen/Qwen2.5-VL-3B-Instruct"}


def make(shape, folder, pixels, device):
    "A model of that shape with random weights and the embedded tokenizer, as a folder."
    import torch
    from transformers import AutoModelForImageTextToText

    from specs_nb.engines.models import load_config_of, load_processor
    from specs_nb.scale.doctor import known_config

    processor, tiny = load_processor("tiny"), load_config_of("tiny")
    processor.image_processor.size["longest_edge"] = max(168, pixels) ** 2
    processor.save_pretrained(folder)
    if shape == "tiny":
        from specs_nb.engines.models import resolve

        for f in ("config.json", "model.safetensors", "generation_config.json"):
            shutil.copy(Path(resolve("tiny")) / f, folder)
        return str(folder)
    config = known_config(NAMES[shape])
    for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, k, getattr(tiny, k))
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return str(folder)


def questions(n, pixels):
    "Drawn questions, their pictures enlarged."
    from specs_nb import world

    return [{**r, "images": [r["images"][0].resize((pixels, pixels))]} for r in world.rows("train", n)]


class Clock:
    "Seconds of each step after the first, and the peak memory."

    def __init__(self, cuda):
        self.cuda, self.at = cuda, []

    def start(self):
        import gc

        import torch

        from specs_nb.core import reset_peak_memory

        gc.collect()  # the last measurement's trainer holds itself, and its model
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak_memory()
        return self

    def tick(self):
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        self.at.append(time.perf_counter())

    @property
    def step(self):
        return statistics.median(b - a for a, b in zip(self.at[1:], self.at[2:]))

    def peak(self):
        import torch

        from specs_nb.core import peak_memory_gb

        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else peak_memory_gb()


def timed(trainer, clock):
    "Train, with a tick before the first step and after each."
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if not clock.at:
                clock.tick()

        def on_step_end(self, args, state, control, **kw):
            clock.tick()

    trainer.add_callback(Ticks())
    trainer.train()


def distill(start, a, how, load, shape, tmp, fast):
    "Answering: the prompts of one batch, each with `new` tokens."
    import torch

    from specs_nb.engines.generate import encode
    from specs_nb.engines.models import load_model
    from specs_nb.formats import FORMATS
    from specs_nb.scale.doctor import generation

    clock = Clock(a.device == "cuda").start()
    model, processor = load_model(start, quantize=how == "qlora", **load)
    rows = questions(a.sequences, a.pixels)
    inputs = encode(processor, rows, [FORMATS["think_answer"].instruction] * len(rows)).to(model.device)
    for _ in range(a.steps + 2):
        clock.tick()
        with torch.no_grad():
            model.generate(
                **inputs,
                max_new_tokens=a.new,
                min_new_tokens=a.new,
                do_sample=True,
                top_k=0,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
    prompt = inputs["input_ids"].shape[1]
    n = a.sequences * a.new
    expect = generation(
        shape,
        a.sequences,
        prompt,
        a.new,
        load["dtype"],
        how == "qlora",
        image_tokens=image_tokens(inputs, model) // len(rows),
    )
    return facts(
        clock, generated=n, trained=0, flops=2 * shape.total * (n + a.sequences * prompt), expect=expect
    )


def image_tokens(inputs, model):
    return int((inputs["input_ids"] == model.config.image_token_id).sum())


def dpo(start, a, how, load, shape, tmp, fast):
    "DPO + SFT: pairs of answers of some `new` tokens."
    from specs_nb.coldstart import coldstart_trainer
    from specs_nb.core import ColdStartStage
    from specs_nb.formats import FORMATS
    from specs_nb.pairs import make_pairs, read_pairs, write_pairs
    from specs_nb.scale.doctor import training

    words = "count the circles and the squares in each cell of the picture, then say which are more. "
    n, rows = a.micro * (a.steps + 2), questions(a.micro * (a.steps + 2), a.pixels)
    from specs_nb.engines.models import load_processor

    tok = load_processor(start).tokenizer
    reasoning = tok.decode(tok(words * (a.new // 8 + 1))["input_ids"][: a.new])
    said = [[(reasoning, "1")]] * n
    write_pairs(
        make_pairs(rows, said, said, FORMATS["think_answer"], ["plain_answer"], n), tmp / "pairs.parquet"
    )
    clock = Clock(a.device == "cuda").start()
    stage = ColdStartStage(
        lora=how == "lora",
        qlora=how == "qlora",
        trainer=dict(
            per_device_train_batch_size=a.micro,
            max_steps=a.steps + 2,
            learning_rate=1e-6,
            gradient_checkpointing=a.checkpoint,
            bf16=a.device == "cuda",
            save_strategy="no",
        ),
        fast=fast,
    )
    trainer = coldstart_trainer(start, read_pairs(tmp / "pairs.parquet"), tmp / "dpo", stage, **load)
    seen = []
    compute = trainer.compute_loss

    def listen(model, inputs, *args, **kw):
        seen.append((inputs["input_ids"].shape, image_tokens(inputs, trainer.model)))
        return compute(model, inputs, *args, **kw)

    trainer.compute_loss = listen
    timed(trainer, clock)
    (sequences, length), images = seen[-1]
    t = sequences * length
    expect = training(
        shape,
        sequences,
        length,
        train=how,
        rank=stage.lora_rank,
        dtype=load["dtype"],
        compute="bfloat16" if a.device == "cuda" else None,
        checkpoint=a.checkpoint,
        reference=how == "full",
        image_tokens=images // sequences,
        gpu=a.device == "cuda",
    )
    # + 2: the reference reads too
    return facts(clock, generated=0, trained=t, flops=(train_flops(how) + 2) * shape.total * t, expect=expect)


def grpo(start, a, how, load, shape, tmp, fast):
    "GRPO: one micro-batch of rollouts answered, scored and trained a step."
    from specs_nb.core import GRPOStage
    from specs_nb.formats import FORMATS
    from specs_nb.grpo import grpo_trainer
    from specs_nb.scale.doctor import generation, training

    clock = Clock(a.device == "cuda").start()
    stage = GRPOStage(
        steps=a.steps + 2,
        lora=how == "lora",
        qlora=how == "qlora",
        trainer=dict(
            per_device_train_batch_size=a.rollouts,
            num_generations=a.rollouts,
            max_completion_length=a.new,
            learning_rate=1e-6,
            gradient_checkpointing=a.checkpoint,
            bf16=a.device == "cuda",
            save_strategy="no",
        ),
        fast=fast,
    )
    trainer = grpo_trainer(
        start, questions(8, a.pixels), tmp / "grpo", stage, FORMATS["think_answer"], **load
    )
    seen, compute = [], trainer._compute_loss

    def listen(model, inputs):
        seen.append((
            inputs["prompt_ids"].shape,
            inputs["completion_ids"].shape,
            int((inputs["prompt_ids"] == trainer.model.config.image_token_id).sum()),
        ))
        return compute(model, inputs)

    trainer._compute_loss = listen
    timed(trainer, clock)
    (n, prompt), (_, new), images = seen[-1]
    learn = training(
        shape,
        n,
        prompt + new,
        new,
        train=how,
        rank=stage.lora_rank,
        dtype=load["dtype"],
        compute="bfloat16" if a.device == "cuda" else None,
        checkpoint=a.checkpoint,
        image_tokens=images // n,
        gpu=a.device == "cuda",
    )
    ask = generation(shape, n, prompt, new, load["dtype"], how == "qlora", image_tokens=images // n)
    ask.peak += learn.optimizer
    return facts(
        clock,
        generated=n * new,
        trained=n * (prompt + new),
        flops=shape.total * (2 * n * (prompt + new) + train_flops(how) * n * (prompt + new)),
        expect=max(learn, ask, key=lambda p: p.peak),
    )


def train_flops(how):
    return 6 if how == "full" else 4


def facts(clock, generated, trained, flops, expect):
    "What one measurement says; MFU is added where the card's peak is known."
    return dict(
        step_seconds=clock.step,
        generated_tokens=generated,
        trained_tokens=trained,
        tokens_per_second=(generated or trained) / clock.step,
        peak_gib=clock.peak(),
        predicted_gib=expect.peak / 2**30,
        tflops=flops / clock.step / 1e12,
    )


def show(name, r):
    print(
        f"{name:18}"
        + "  ".join(
            f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}"
            for k, v in r.items()
        ),
        flush=True,
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("out", nargs="?", help="JSON file")
    p.add_argument("--shape", choices=["7b", "3b", "tiny"], default="7b")
    p.add_argument("--device", choices=["cuda", "cpu"], help="cuda where there is one")
    p.add_argument(
        "--train", nargs="+", choices=["full", "lora", "qlora"], help="7b: lora qlora; tiny: all three"
    )
    p.add_argument(
        "--work", nargs="+", choices=["distill", "dpo", "grpo"], default=["distill", "dpo", "grpo"]
    )
    p.add_argument("--sequences", type=int, help="answers in flight (64; tiny 8)")
    p.add_argument("--micro", type=int, help="pairs in a DPO step (4; tiny 2)")
    p.add_argument("--rollouts", type=int, help="rollouts in a GRPO step (8; tiny 4)")
    p.add_argument("--new", type=int, help="tokens of an answer (1024; tiny 16)")
    p.add_argument("--pixels", type=int, help="side of the pictures (448: 256 tokens; tiny 84)")
    p.add_argument("--steps", type=int, default=3, help="measured steps, after one that is not counted")
    p.add_argument("--only", nargs="+", help="of these measurements only some, by name: 'dpo qlora'")
    p.add_argument("--compare", action="store_true", help="DPO and GRPO also by TRL as it is (fast: false)")
    p.add_argument(
        "--checkpoint", action=argparse.BooleanOptionalAction, help="gradient checkpointing (on; tiny off)"
    )
    a = p.parse_args()
    small = a.shape == "tiny"
    if a.checkpoint is None:
        a.checkpoint = not small
    for name, large, little in (
        ("sequences", 64, 8),
        ("micro", 4, 2),
        ("rollouts", 8, 4),
        ("new", 1024, 16),
        ("pixels", 448, 84),
        ("train", ["lora", "qlora"], ["full", "lora", "qlora"]),
    ):
        if getattr(a, name) is None:
            setattr(a, name, little if small else large)
    import torch

    if a.device != "cpu" and not torch.cuda.is_available():
        print(
            "no CUDA GPU here, so nothing is measured; --shape tiny --device cpu shows that the script works"
        )
        return 1 if a.device else 0
    a.device = a.device or "cuda"
    if a.device == "cpu" and torch.cuda.is_available():
        sys.exit("--device cpu beside a GPU: hide it with CUDA_VISIBLE_DEVICES=")
    from specs_nb.core import versions
    from specs_nb.scale.doctor import shape_of

    card = torch.cuda.get_device_name(0) if a.device == "cuda" else "CPU"
    peak = next((v for k, v in PEAK.items() if k in card), None)
    load = dict(
        dtype="bfloat16" if a.device == "cuda" else "float32", attn="auto" if a.device == "cuda" else "sdpa"
    )
    out = dict(
        card=card,
        shape=a.shape,
        date=time.strftime("%Y-%m-%d"),
        versions=versions(),
        settings={k: v for k, v in vars(a).items() if k != "out"},
        results={},
    )
    with tempfile.TemporaryDirectory() as tmp:
        start = make(a.shape, Path(tmp) / "model", a.pixels, a.device)
        shape = shape_of(start)
        for work in a.work:
            for how in (
                a.train if work != "distill" else [h for h in ("lora", "qlora") if h in a.train] or ["lora"]
            ):
                for fast in [True, False] if a.compare and work != "distill" else [True]:
                    name = (
                        f"{work} {how}{'' if fast else ' stock'}"
                        if work != "distill"
                        else f"distill {'4 bits' if how == 'qlora' else load['dtype']}"
                    )
                    if a.only and name not in a.only:
                        continue
                    try:
                        r = globals()[work](start, a, how, load, shape, Path(tmp), fast)
                    except torch.OutOfMemoryError as e:
                        r = dict(out_of_memory=" ".join(str(e).split())[:200])
                    if peak and "tflops" in r:
                        r["mfu"] = r["tflops"] / peak
                    out["results"][name] = r
                    if (
                        not fast
                        and "step_seconds" in r
                        and "step_seconds" in (ours := out["results"].get(f"{work} {how}", {}))
                    ):
                        ours["to_stock"] = ours["step_seconds"] / r["step_seconds"]
                    show(name, r)
                    # what is measured stays, whatever happens next
                    if a.out:
                        Path(a.out).write_text(json.dumps(out, indent=1) + "\n")
    ok = {k: r for k, r in out["results"].items() if "tokens_per_second" in r}
    out["rates"] = {
        n: max(r["tokens_per_second"] for k, r in ok.items() if k.startswith(w))
        for n, w in (("generate", "distill"), ("train", "dpo"))
        if any(k.startswith(w) for k in ok)
    }
    if a.out:
        Path(a.out).write_text(json.dumps(out, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
