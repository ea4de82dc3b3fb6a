"""What holds on a card, in minutes: SPECS on the embedded model, writing, GRPO and DPO at a large model's
shape, and the tests. Every part is a process of its own with its own time limit; what was found is kept,
whatever happens.

    python bench/gpu_truth.py --tiny --out truth.json        # here, with vLLM for CPUs: does each part run?
    python bench/gpu_truth.py --budget 300 --out truth.json  # on a card, in five minutes
    python bench/gpu_truth.py --parts grpo,dpo --shape 7b --out truth.json

`--parts` takes names or their beginnings (`smoke`, `write`, `grpo`, `dpo`, `tests`; `--list` names all). The
JSON file is written after every part: its state (`ok`, `failed`, `cut off`, `left out`), seconds, what it
found, the end of what it printed, and the traceback. A part that is cut off says where it stood.

Large models have random weights, drawn on the card from a configuration that the doctor carries; nothing is
fetched. Their tokenizer is the embedded one, its vocabulary filled up with words of no meaning. Random
weights hardly ever end an answer, so answers have full length."""

import argparse
import faulthandler
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"7b": "Qwen/Qwen2.5-VL-7B-Instruct", "3b": "Qwen/Qwen2.5-VL-3B-Instruct"}

# name → (most seconds, least seconds that are worth a start); in order of value
PARTS = {
    "smoke-vllm-lora": (170, 60),
    "write-vllm": (120, 40),
    "model": (90, 20),
    "grpo-vllm-lora": (130, 50),
    "dpo-lora": (110, 40),
    "write-transformers": (60, 25),
    "grpo-transformers-lora": (100, 40),
    "tests": (200, 30),
    "smoke-vllm-qlora": (170, 60),
    "dpo-qlora": (110, 40),
    "smoke-transformers": (100, 40),
    "grpo-transformers-stock": (100, 40),
    "grpo-vllm-qlora": (130, 50),
    "write-vllm-graphs": (200, 90),
}
NEEDS_MODEL = ("grpo", "dpo")

# vLLM without compiling and CUDA graphs, which take two minutes at 7B, and with room for one picture alone
EAGER = dict(enforce_eager=True, limit_mm_per_prompt={"image": 1, "video": 0})


# ---- what a part has to work with


class Found:
    "What a part has found: a dict whose file is written at every change"

    def __init__(self, path):
        self.path, self.facts = Path(path), {}

    def note(self, **facts):
        self.facts.update(facts)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.facts, default=str))
        part.replace(self.path)
        print("found", json.dumps(facts, default=str)[:600], flush=True)


class Watch:
    """The most of the card's memory that was taken at once, by whatever process, in GiB; 0 without a card. A
    clock's phases are noted as they pass, so that a part that is cut off has said where its time went"""

    def __init__(self, found=None, clock=None, every=0.1):
        self.peak, self.over, self.every = 0.0, threading.Event(), every
        self.found, self.clock = found, clock

    def __enter__(self):
        threading.Thread(target=self.look, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.over.set()

    def look(self):
        import torch

        turns = 0
        while not self.over.wait(self.every):
            if torch.cuda.is_available():
                free, whole = torch.cuda.mem_get_info()
                self.peak = max(self.peak, (whole - free) / 2**30)
            turns += 1
            if self.clock and turns % 50 == 0:
                by = {k: round(v, 2) for k, v in list(self.clock.by.items())}
                self.found.note(so_far=dict(by, running=self.clock.running[-1]), device_peak_gib=self.peak)


def on_card():
    import torch

    return torch.cuda.is_available()


def load_words(a):
    "Keywords of `load_model`: 16 bits on a card"
    return dict(dtype="float32" if a.tiny or not on_card() else "bfloat16", attn="sdpa" if a.tiny else "auto")


def questions(n, pixels):
    "Drawn questions, their pictures enlarged"
    from specs_nb import world

    return [{**r, "images": [r["images"][0].resize((pixels, pixels))]} for r in world.rows("train", n)]


def large_config(a):
    "The configuration of the shape"
    from specs_nb.engines.models import load_config_of
    from specs_nb.scale.doctor import known_config

    return load_config_of("tiny") if a.tiny else known_config(NAMES[a.shape])


def set_special_tokens(config, tok):
    "The configuration's special tokens as the tokenizer numbers them, which differs by transformers' version"
    vision = dict(image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end")
    for name, word in vision.items():
        setattr(config, f"{name}_token_id", tok.convert_tokens_to_ids(f"<|{word}|>"))
    for name in ("bos", "eos", "pad"):
        setattr(config.text_config, f"{name}_token_id", getattr(tok, f"{name}_token_id"))


def fill_vocabulary(folder, size):
    "Give every token of the model's a word, so that whatever it writes can be read"
    path = folder / "tokenizer.json"
    d = json.loads(path.read_text())
    # a special token that the vocabulary doesn't name is given the next free number
    d["model"]["vocab"] |= {t["content"]: t["id"] for t in d["added_tokens"]}
    known = set(d["model"]["vocab"].values())
    d["model"]["vocab"] |= {f"~{i}": i for i in range(size) if i not in known}
    path.write_text(json.dumps(d, ensure_ascii=False))


def shape_folder(a):
    "The folder of the shape: configuration and processor, without weights"
    from specs_nb.engines.models import load_processor

    folder = Path(a.work) / f"shape-{'tiny' if a.tiny else a.shape}"
    if not (folder / "config.json").exists():
        processor, config = load_processor("tiny"), large_config(a)
        processor.image_processor.size["longest_edge"] = max(168, a.pixels, a.dpo_pixels) ** 2
        processor.save_pretrained(folder)
        if not a.tiny:
            fill_vocabulary(folder, config.text_config.vocab_size)
        config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
        config.dtype = load_words(a)["dtype"]
        config.save_pretrained(folder)
        set_special_tokens(config, load_processor(str(folder)).tokenizer)
        config.save_pretrained(folder)
    return folder


def random_model(a):
    "A model of the shape, its weights drawn where it will work"
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(shape_folder(a))
    words = load_words(a)
    with torch.device("cuda" if on_card() else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, words["dtype"]))
    return model.eval()


def model_folder(a):
    "The folder of `model`; raises if that part has not been done"
    folder = Path(a.work) / "model"
    if not (folder / "whole").exists():
        raise SystemExit("there is no model: the part `model` failed, or was left out")
    return str(folder)


# ---- the parts


def model(a, found):
    "The random model as a folder, since the stages load from one"
    start, folder = time.perf_counter(), Path(a.work) / "model"
    shape = "tiny" if a.tiny else a.shape
    if (folder / "whole").exists() and (folder / "whole").read_text() == shape:
        found.note(there_already=shape)  # `--work` named a folder of an earlier run
        return
    m = random_model(a)
    found.note(drawn_s=time.perf_counter() - start, parameters=sum(p.numel() for p in m.parameters()))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(shape_folder(a), folder)
    m.save_pretrained(folder)
    (folder / "whole").write_text(shape)
    size = sum(f.stat().st_size for f in folder.iterdir())
    found.note(written_s=time.perf_counter() - start, gib=size / 2**30, where=a.work)


def smoke_config(a, engine, how):
    "The smoke recipe with an engine and an adapter"
    import yaml

    c = yaml.safe_load((ROOT / "specs_nb/configs/smoke.yaml").read_text())
    c |= dict(workers=1, engine=engine, model=dict(dtype=load_words(a)["dtype"]), report_to="none")
    for name in ("zero", "coldstart", "final"):
        c[name][how] = True
    if engine == "vllm":
        c["vllm"] = dict(max_model_len=512, options=EAGER)
        if on_card():
            c["vllm"] |= dict(gpu_memory=0.3)
        for name in ("zero", "final"):
            c[name]["trainer"] |= dict(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3)
            if on_card():
                c[name]["trainer"]["vllm_enable_sleep_mode"] = True
    return c


def smoke(a, found):
    "`specs run -c smoke` with an engine and an adapter"
    import yaml

    from specs_nb.pipeline import main

    _, engine, *how = a.part.split("-")
    config = smoke_config(a, engine, how[0] if how else "lora")
    path, run = Path(a.work) / f"{a.part}.yaml", Path(a.work) / a.part
    path.write_text(yaml.safe_dump(config))
    found.note(config=config, run=str(run))
    code = main(["run", "-c", str(path), "--run-dir", str(run)])
    found.note(exit=code, report=(run / "report.html").exists())
    if code:
        raise SystemExit(f"specs ended with {code}")


def stages_of(run):
    "State, seconds and phases of each stage of a run, also of one that was cut off"
    out = {}
    for file in sorted(Path(run).glob("*/stage.json"), key=lambda f: f.stat().st_mtime):
        info = json.loads(file.read_text())
        keep = ("state", "seconds", "seconds_by", "peak_gpu_gb", "steps", "pairs")
        out[file.parent.name] = {k: info[k] for k in keep if k in info}
    metrics = Path(run) / "eval/metrics.json"
    if metrics.exists():
        out["accuracy"] = {
            m: round(s["id"]["accuracy"]["mean"], 3)
            for m, s in json.loads(metrics.read_text()).items()
            if "accuracy" in s.get("id", {})
        }
    return out


def in_flight(a):
    return (2, 8) if a.tiny else (64, 256, 1024)


def prompts_for(a, n, processor):
    "vLLM's prompts of `n` questions, each with a picture"
    from specs_nb.engines.generate import encode
    from specs_nb.engines.vllm_engine import one_per_image
    from specs_nb.formats import FORMATS

    out = []
    for row in questions(n, a.pixels):
        ids = encode(processor, [row], [FORMATS["think_answer"].instruction])["input_ids"][0].tolist()
        picture = {"multi_modal_data": {"image": row["images"]}}
        out.append({"prompt_token_ids": one_per_image(ids, processor), **picture})
    return out


def write_vllm(a, found, eager=True):
    "vLLM's pace: tokens a second with so many answers in flight, eight to a question"
    from specs_nb.engines.models import load_processor
    from specs_nb.engines.vllm_engine import end_vllm, real_stdout, running, settle

    folder = shape_folder(a)
    processor = load_processor(str(folder))
    words = dict(settle(), enforce_eager=True) if eager else settle()
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    with real_stdout(), Watch() as watch:
        llm = LLM(
            model=str(folder),
            load_format="dummy",
            dtype=load_words(a)["dtype"],
            max_model_len=512 if a.tiny else 2048,
            max_num_seqs=max(in_flight(a)),
            gpu_memory_utilization=0.85,
            limit_mm_per_prompt=EAGER["limit_mm_per_prompt"],
            disable_log_stats=True,
            **words,
        )
        running(llm, True)
        found.note(start_s=time.perf_counter() - start, eager=eager)
        prompts = prompts_for(a, max(in_flight(a)) // min(8, max(in_flight(a))), processor)
        found.note(prompt_tokens=len(prompts[0]["prompt_token_ids"]), pixels=a.pixels)
        for n in (in_flight(a)[0], *in_flight(a)):  # the first of all is a warm-up
            each = min(8, n)
            how = SamplingParams(
                n=each, temperature=1.0, max_tokens=a.write_tokens, ignore_eos=True, detokenize=False
            )
            began = time.perf_counter()
            out = llm.generate(prompts[: n // each], how, use_tqdm=False)
            seconds = time.perf_counter() - began
            written = sum(len(c.token_ids) for o in out for c in o.outputs)
            found.note(
                **{
                    f"at_{n}": dict(tokens=written, seconds=seconds, tokens_per_s=written / seconds),
                    "prompt_tokens": len(out[0].prompt_token_ids),
                }
            )
    found.note(device_peak_gib=watch.peak)
    end_vllm()


def write_vllm_graphs(a, found):
    write_vllm(a, found, eager=False)


def write_transformers(a, found):
    "transformers' pace with 64 answers in flight: `generate`, and our writing that reads a prompt once"
    import torch

    from specs_nb.engines.fast import write
    from specs_nb.engines.generate import encode
    from specs_nb.engines.models import load_processor
    from specs_nb.formats import FORMATS

    m, processor = random_model(a), load_processor(str(shape_folder(a)))
    n = in_flight(a)[0]
    rows = questions(max(1, n // 8), a.pixels)
    inputs = encode(processor, rows, [FORMATS["think_answer"].instruction] * len(rows)).to(m.device)
    each, new = min(8, n), a.write_tokens

    def generate():
        fixed = dict(max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0)
        m.generate(
            **inputs, **fixed, num_return_sequences=each, pad_token_id=processor.tokenizer.pad_token_id
        )

    def ours():
        write(m, dict(inputs), each, new, [])

    for name, do in (("generate", generate), ("ours", ours)):
        for _turn in range(2):  # the first is a warm-up
            began = time.perf_counter()
            with torch.no_grad():
                do()
            if on_card():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        tokens = len(rows) * each * new
        found.note(**{name: dict(tokens=tokens, seconds=seconds, tokens_per_s=tokens / seconds)})
    found.note(peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_card() else None)


def steps_by_phase(clock, found):
    "A callback that notes seconds by phase of each step"
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, **kw):
            self.before, self.steps = dict(clock.turn()), []

        def on_step_end(self, args, state, control, **kw):
            now = dict(clock.turn())
            spent = {k: now[k] - self.before.get(k, 0) for k in now}
            self.before = now
            self.steps.append({k: round(v, 3) for k, v in spent.items() if v >= 0.001})
            found.note(steps=self.steps)

    return Steps()


def mean_step(steps, skip=1):
    "Mean seconds by phase of all steps but the first ones, and their sum"
    later = steps[skip:] or steps
    by = {k: sum(s.get(k, 0) for s in later) / len(later) for k in sorted({k for s in later for k in s})}
    return dict(by, whole=sum(by.values()))


def recipe(a, folder, **stages):
    "A configuration of a run, for the doctor"
    from specs_nb.core import load_config

    config = load_config("smoke")
    config.model.path, config.model.dtype, config.model.attn = folder, *load_words(a).values()
    for name, stage in stages.items():
        setattr(config, name, stage)
    return config


def expected(a, folder, parts, rows, *names, **stages):
    "The doctor's estimate of the peak, in GiB, parts and all"
    from dataclasses import asdict

    from specs_nb.engines.generate import encode
    from specs_nb.engines.models import load_processor
    from specs_nb.formats import FORMATS
    from specs_nb.scale import doctor

    config, machine = recipe(a, folder, **stages), doctor.this_machine(a.work)
    config.pairs.max_new_tokens = a.dpo_tokens
    processor = load_processor(folder)
    ids = encode(processor, rows[:1], [FORMATS["think_answer"].instruction])["input_ids"][0]
    prompt = doctor.Prompt(len(ids), int((ids == processor.image_token_id).sum()))
    found = parts(config, *names, doctor.shape_of(folder), prompt, machine)
    gib = {k: round(v / 2**30, 2) for k, v in asdict(found).items() if v}
    return dict(gib, with_base=round((found.peak + machine.base) / 2**30, 2), prompt=len(ids))


def grpo_stage(a, vllm, how, fast):
    from specs_nb.core import GRPOStage

    rollouts, micro = (16, 8) if a.tiny else (64, 8)
    trainer = dict(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rollouts // micro,
        num_generations=8,
        max_completion_length=a.grpo_tokens if vllm else a.grpo_tokens_transformers,
        learning_rate=1e-6,
        gradient_checkpointing=True,
        save_strategy="no",
        bf16=on_card(),
    )
    if vllm:
        trainer |= dict(use_vllm=True, vllm_mode="colocate", vllm_max_model_length=512 if a.tiny else 2048)
        trainer |= dict(vllm_gpu_memory_utilization=a.share, vllm_enable_sleep_mode=on_card())
    return GRPOStage(steps=3 if vllm else 2, trainer=trainer, fast=fast, **{how: True})


def grpo(a, found):
    "GRPO steps of 64 answers, phases apart, and their memory against the doctor's estimate"
    import torch

    from specs_nb.core import VLLMConfig, count_seconds
    from specs_nb.engines.vllm_engine import end_vllm
    from specs_nb.formats import FORMATS
    from specs_nb.grpo import go_on, grpo_trainer
    from specs_nb.scale.doctor import grpo_parts

    _, engine, how = a.part.split("-")
    vllm, fast = engine == "vllm", how != "stock"
    how = "lora" if how == "stock" else how
    folder, rows, stage = model_folder(a), questions(16, a.pixels), grpo_stage(a, vllm, how, fast)
    found.note(stage=stage.trainer, fast=fast, shape="tiny" if a.tiny else a.shape)
    found.note(doctor=expected(a, folder, grpo_parts, rows, "zero", zero=stage))
    clock = count_seconds()
    options = VLLMConfig(options=EAGER) if vllm else None
    with Watch(found, clock) as watch:
        trainer = grpo_trainer(
            folder, rows, Path(a.work) / a.part, stage, FORMATS["think_answer"], vllm=options, **load_words(a)
        )
        found.note(start_s=clock.turn()["other"])
        if on_card():
            torch.cuda.reset_peak_memory_stats()
        watch.peak = 0.0
        steps = steps_by_phase(clock, found)
        trainer.add_callback(steps)
        go_on(trainer)
    # the check after the first step hands the weights over, so the second needn't
    found.note(
        step=mean_step(steps.steps, 2 if vllm else 1),
        device_peak_gib=watch.peak,
        log=trainer.state.log_history[-2:],
    )
    if on_card():
        found.note(torch_peak_gib=torch.cuda.max_memory_allocated() / 2**30)
    tokens = 64 if not a.tiny else 16
    tokens *= trainer.args.max_completion_length
    found.note(tokens=tokens, written_per_s=tokens / max(1e-9, found.facts["step"].get("write", 0)))
    del trainer
    end_vllm()


def make_pairs_file(a, folder, n):
    "Pairs of answers of some `dpo_tokens` tokens, as the pairs stage leaves them"
    from specs_nb.engines.models import load_processor
    from specs_nb.formats import FORMATS
    from specs_nb.pairs import make_pairs, write_pairs

    words = "count the circles and the squares in each cell of the picture, then say which are more. "
    tok = load_processor(folder).tokenizer
    reasoning = tok.decode(tok(words * (a.dpo_tokens // 8 + 1))["input_ids"][: a.dpo_tokens])
    said, path = [[(reasoning, "1")]] * n, Path(a.work) / f"{a.part}.parquet"
    rows = questions(n, a.dpo_pixels)
    write_pairs(make_pairs(rows, said, said, FORMATS["think_answer"], ["plain_answer"], n), path)
    return path, rows


def named_ranges(model):
    "Name the vision tower and the language model in a profile"
    from torch.profiler import record_function

    def name(module, text):
        open_ranges = []

        def begin(*_):
            open_ranges.append(record_function(text))
            open_ranges[-1].__enter__()

        def end(*_):
            if open_ranges:
                open_ranges.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    for path, module in model.named_modules():
        last = path.rsplit(".", 1)[-1]
        if last in ("visual", "language_model"):
            name(module, f"## {last}")
        if last == "attn" and ".visual." in f".{path}":
            name(module, "## visual attention")


def totals_by_name(events):
    "Calls, milliseconds and milliseconds without what is within, of each name; events of one thread nest"
    names, open_events = {}, []
    for name, start, end in sorted(events, key=lambda e: (e[1], -e[2])):
        while open_events and open_events[-1][1] <= start:
            open_events.pop()
        calls, whole, own = names.get(name, (0, 0, 0))
        names[name] = calls + 1, whole + end - start, own + end - start
        if open_events:
            outer = open_events[-1][0]
            calls, whole, own = names[outer]
            names[outer] = calls, whole, own - (end - start)
        open_events.append((name, end))
    return {n: (calls, whole / 1e6, own / 1e6) for n, (calls, whole, own) in names.items()}


def largest(totals, at, n=15):
    "Rows of the names that took most"
    rows = sorted(totals.items(), key=lambda item: -item[1][at])[:n]
    return [dict(name=k[:90], calls=c, ms=round(ms, 2), own_ms=round(own, 2)) for k, (c, ms, own) in rows]


def profile_table(prof, seconds):
    """Where a step's time went: by device and by CPU, and how many kernels were launched. torch's own tables
    take minutes with so many events"""
    threads, kernels, ranges = {}, [], []
    for e in prof.profiler.kineto_results.events():
        name, start = e.name(), e.start_ns()
        one = name, start, start + e.duration_ns()
        on_cpu = str(e.device_type()).endswith("CPU")
        if name.startswith("##"):
            ranges.append((f"{name} on the {'CPU' if on_cpu else 'card'}", *one[1:]))
        if on_cpu:
            threads.setdefault(e.start_thread_id(), []).append(one)
        elif not name.startswith("##"):
            kernels.append(one)
    cpu = {}
    for events in threads.values():
        for name, found in totals_by_name(events).items():
            cpu[name] = tuple(a + b for a, b in zip(cpu.get(name, (0, 0, 0)), found, strict=True))
    launches = {n: c for n, c in cpu.items() if "LaunchKernel" in n}
    return dict(
        seconds=seconds,
        events=sum(map(len, threads.values())) + len(kernels),
        launches=sum(c[0] for c in launches.values()),
        launch_cpu_ms=round(sum(c[2] for c in launches.values()), 1),
        device_busy_s=sum(end - start for _, start, end in kernels) / 1e9,
        attention_calls=cpu.get("aten::scaled_dot_product_attention", (0,))[0],
        ranges=largest({n: c for n, c in totals_by_name(ranges).items()}, 1),
        by_device=largest(totals_by_name(kernels), 1),
        by_cpu=largest(cpu, 2),
    )


def profiled(trainer, at, found):
    "A callback that profiles step number `at`"
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    class Profiled(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if state.global_step == at - 1:
                named_ranges(trainer.model)
                kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_card()
                self.prof, self.start = profile(activities=kinds), time.perf_counter()
                self.prof.__enter__()

        def on_step_end(self, args, state, control, **kw):
            if state.global_step == at:
                if on_card():
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - self.start
                found.note(profiled_s=seconds)
                self.prof.__exit__(None, None, None)
                found.note(profile=profile_table(self.prof, seconds))

    return Profiled()


def dpo(a, found):
    "DPO steps of four pairs: time, memory against the doctor's estimate, and a profile of the last"
    import torch

    from specs_nb.coldstart import coldstart_trainer
    from specs_nb.core import ColdStartStage, count_seconds
    from specs_nb.grpo import go_on
    from specs_nb.pairs import read_pairs
    from specs_nb.scale.doctor import dpo_parts, shape_of

    how, steps, micro = a.part.split("-")[1], 3, 2 if a.tiny else 4
    folder, clock = model_folder(a), count_seconds()
    pairs, rows = make_pairs_file(a, folder, steps * micro)
    settings = dict(per_device_train_batch_size=micro, max_steps=steps, learning_rate=1e-6, bf16=on_card())
    settings |= dict(gradient_checkpointing=True, save_strategy="no")
    stage = ColdStartStage(trainer=settings, **{how: True})
    found.note(stage=settings, shape="tiny" if a.tiny else a.shape, pixels=a.dpo_pixels)
    found.note(doctor=expected(a, folder, dpo_parts, rows, coldstart=stage))
    trainer = coldstart_trainer(folder, read_pairs(pairs), Path(a.work) / a.part, stage, **load_words(a))
    found.note(start_s=sum(clock.turn().values()), reference_s=clock.by.get("score"))
    if on_card():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seen, compute = [], trainer.compute_loss

    def listen(model, inputs, *args, **kw):
        seen.append(tuple(inputs["input_ids"].shape))
        return compute(model, inputs, *args, **kw)

    trainer.compute_loss = listen
    by = steps_by_phase(clock, found)
    for callback in (by, profiled(trainer, steps, found)):
        trainer.add_callback(callback)
    go_on(trainer)
    step = mean_step(by.steps[:-1])  # the last was slowed down by the profiler
    sequences, length = seen[-2]
    # forward, and backward through frozen weights; checkpointing reads once more; the reference was asked
    # before
    each = shape_of(folder).total * sequences * length / step["whole"] / 1e12
    found.note(step=step, sequences=sequences, length=length, tflops=4 * each, tflops_with_recompute=6 * each)
    if on_card():
        found.note(torch_peak_gib=torch.cuda.max_memory_allocated() / 2**30)


class Heard:
    "pytest's results as they come"

    def __init__(self, found):
        self.found, self.counts, self.bad, self.slow = found, {}, {}, []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            kind = report.outcome if report.when == "call" else f"{report.outcome} in {report.when}"
            self.counts[kind] = self.counts.get(kind, 0) + 1
            if report.failed:
                self.bad[report.nodeid] = str(report.longreprtext)[-2500:]
        if report.duration > 5:
            self.slow.append((report.nodeid, round(report.duration, 1)))
        self.found.note(counts=self.counts, bad=self.bad, slow=self.slow)


def tests(a, found):
    "The tests that a card may decide differently"
    import pytest

    files = ["tests/test_fast.py", "tests/test_coldstart.py", "tests/test_models.py", "tests/engines"]
    os.chdir(ROOT)
    words = ["-q", "--tb=short", "-p", "no:cacheprovider", *files]
    if a.tiny:  # here it is enough that they are found
        words += ["-k", "test_why or test_rows_of_text_alone or test_known"]
    found.note(exit=int(pytest.main(words, plugins=[Heard(found)])))


DO = {
    "smoke": smoke,
    "model": model,
    "write-vllm": write_vllm,
    "write-vllm-graphs": write_vllm_graphs,
    "write-transformers": write_transformers,
    "grpo": grpo,
    "dpo": dpo,
    "tests": tests,
}


def the_part(name):
    return DO.get(name) or DO[name.split("-")[0]]


def preload(part):
    "Import what a part needs, without a look at the card: done while the part before is at work"
    import transformers  # noqa: F401

    from specs_nb.engines.vllm_engine import settle

    if "vllm" in part or part.startswith("grpo"):
        settle()
    if "vllm" in part and "smoke" not in part:
        from vllm import LLM  # noqa: F401
    if part.startswith(("grpo", "dpo")):
        from trl import DPOTrainer, GRPOTrainer  # noqa: F401


def run_part(a):
    "In a process of its own: do a part, and keep what it found"
    from specs_nb.scale.launch import die_with_parent

    die_with_parent()
    found = Found(a.found)
    try:
        if a.ahead:
            preload(a.part)
            go = sys.stdin.readline()
            if not go:
                return 1  # the parent is gone, or the part is left out
            faulthandler.dump_traceback_later(max(1.0, float(go) - 2))  # where it stood, if it is cut off
        the_part(a.part)(a, found)
        return 0
    except BaseException:
        found.note(traceback=traceback.format_exc()[-6000:])
        raise


# ---- the parent


def settings_of(a):
    "Sizes that nobody asked for: small ones for `--tiny`"
    sizes = dict(
        pixels=(84, 448),
        dpo_pixels=(84, 1008),
        write_tokens=(8, 128),
        grpo_tokens=(16, 256),
        grpo_tokens_transformers=(16, 64),
        dpo_tokens=(16, 256),
    )
    for name, (small, large) in sizes.items():
        if getattr(a, name) is None:
            setattr(a, name, small if a.tiny else large)


def wanted(a):
    "Parts and their limits in seconds, in the order that was asked for, with the model where one needs it"
    limits = {}
    for word in (a.parts or ",".join(PARTS)).split(","):
        asked, _, seconds = word.partition(":")
        found = [asked] if asked in PARTS else [name for name in PARTS if name.startswith(asked)]
        if not asked or not found:
            sys.exit(f"no part {asked!r}; there are {', '.join(PARTS)}")
        for name in found:
            if name.startswith(NEEDS_MODEL):
                limits.setdefault("model", PARTS["model"][0])
            limits.setdefault(name, float(seconds or a.limit or PARTS[name][0]))
    return limits


def tail(path, size=5000):
    "The end of what was printed, of a progress bar its last state"
    text = Path(path).read_bytes()[-40 * size :].decode(errors="replace")
    lines = text.replace("\r\n", "\n").strip("\n").split("\n")
    return "\n".join(line.rsplit("\r", 1)[-1] for line in lines)[-size:]


def environment():
    "The environment of a part"
    extra = dict(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    extra["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    if find_spec("flashinfer") is None:
        extra["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    return {
        **extra,
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "PYTHONPATH": extra["PYTHONPATH"],
    }


def begin(name, a, words):
    "A part's process, that waits for its turn"
    home = Path(a.work)
    found, log = home / f"{name}.json", home / f"{name}.log"
    cmd = [sys.executable, str(Path(__file__).resolve()), *words]
    cmd += ["--part", name, "--work", a.work, "--found", str(found), "--ahead"]
    with log.open("wb") as out:
        streams = dict(stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT)
        child = subprocess.Popen(cmd, **streams, env=environment(), start_new_session=True, cwd=home)
    child.found, child.log = found, log
    return child


def end(child):
    "No process of a part is left"
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def do_part(child, seconds):
    "Give a part its turn, and keep what it left"
    start, code = time.monotonic(), None
    try:
        child.stdin.write(f"{seconds}\n".encode())
        child.stdin.close()
    except OSError:  # it has fallen already
        pass
    try:
        code = child.wait(seconds)
        state = "failed" if code else "ok"
    except subprocess.TimeoutExpired:
        state = "cut off"
    end(child)
    facts = json.loads(child.found.read_text()) if child.found.exists() else {}
    if run := facts.get("run"):
        facts["stages"] = stages_of(run)
        shutil.rmtree(run, ignore_errors=True)
    taken = round(time.monotonic() - start, 1)
    return dict(
        state=state, code=code, seconds=taken, limit=round(seconds), found=facts, printed=tail(child.log)
    )


def headline(name, r):
    "A part in a line"
    f, out = r.get("found", {}), []
    for stage, s in f.get("stages", {}).items():
        if "seconds" in s:
            out.append(f"{stage} {s['seconds']:.0f} s{'' if s.get('state') == 'done' else ' (not done)'}")
    for key, v in f.items():
        if isinstance(v, dict) and "tokens_per_s" in v:
            out.append(f"{key} {v['tokens_per_s']:,.0f} tokens/s")
    if "step" in f:
        parts = sorted(((k, v) for k, v in f["step"].items() if k != "whole"), key=lambda p: -p[1])
        out.append(
            f"step {f['step']['whole']:.2f} s ({', '.join(f'{k} {v:.2f}' for k, v in parts if v >= 0.005)})"
        )
    if "torch_peak_gib" in f:
        out.append(f"peak {f['torch_peak_gib']:.1f} GiB, doctor {f.get('doctor', {}).get('peak', 0):.1f}")
    if f.get("device_peak_gib"):
        out.append(f"device {f['device_peak_gib']:.1f} GiB")
    if "profile" in f:
        p = f["profile"]
        out.append(
            f"profiled {p['seconds']:.2f} s, device busy {p['device_busy_s']:.2f}, {p['launches']} launches"
        )
    if "counts" in f:
        out.append(", ".join(f"{v} {k}" for k, v in f["counts"].items()))
    if "written_s" in f:
        out.append(f"{f['gib']:.1f} GiB in {f['written_s']:.0f} s")
    if r["state"] == "failed":
        lines = [line for line in f.get("traceback", "").splitlines() if line.strip()]
        out.append(lines[-1][:200] if lines else r.get("printed", "")[-200:].replace("\n", " "))
    return f"{name:24} {r['state']:8} {r.get('seconds', 0):5.0f} s  {'; '.join(out)}"


def save(a, report):
    if a.out:
        part = Path(a.out).with_suffix(".part")
        part.write_text(json.dumps(report, indent=1, default=str) + "\n")
        part.replace(a.out)


def about():
    "Card, versions and where the package comes from"
    import torch

    import specs_nb
    from specs_nb.core import machine, versions

    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    date = time.strftime("%Y-%m-%d %H:%M")
    return dict(card=card, machine=machine(), versions=versions(), date=date, package=specs_nb.__version__)


def options():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", help="JSON file, written after every part")
    p.add_argument(
        "--parts",
        help="parts or their beginnings, with commas between; NAME:60 for other seconds; all without it",
    )
    p.add_argument("--list", action="store_true", help="name the parts with their limits, and end")
    p.add_argument(
        "--budget", type=float, default=540, help="seconds for all; a part that doesn't fit is left out"
    )
    p.add_argument("--limit", type=float, help="seconds for each part, instead of its own limit")
    p.add_argument("--tiny", action="store_true", help="a tiny shape, to see that every part runs")
    p.add_argument("--shape", choices=list(NAMES), default="3b", help="of the random model")
    p.add_argument("--share", type=float, default=0.35, help="of the card for vLLM beside a trainer")
    for name in (
        "pixels",
        "dpo-pixels",
        "write-tokens",
        "grpo-tokens",
        "grpo-tokens-transformers",
        "dpo-tokens",
    ):
        p.add_argument(f"--{name}", type=int)
    p.add_argument("--work", help="folder for models and logs; in memory where there is room")
    p.add_argument("--part", help=argparse.SUPPRESS)
    p.add_argument("--found", help=argparse.SUPPRESS)
    p.add_argument("--ahead", action="store_true", help=argparse.SUPPRESS)
    return p


def work_folder(a):
    "A folder in memory if a large model has room there"
    need = 1 if a.tiny else {"3b": 10, "7b": 20}[a.shape]
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free > need * 2**30
    return tempfile.mkdtemp(prefix="truth-", dir=shm if roomy and not a.tiny else None)


def do_parts(a, argv, report, start):
    "All parts, one after the other; the next one's process starts while one is at work"
    limits = wanted(a)
    names = list(limits)
    for i, name in enumerate(names):
        left = a.budget - (time.monotonic() - start) - 3
        child = a.children.get(name) or begin(name, a, argv)
        a.children[name] = child
        if left < min(limits[name], 5 if a.tiny else PARTS[name][1]):
            report["parts"][name] = dict(state="left out", why=f"{left:.0f} s are left")
            end(child)
        else:
            if names[i + 1 :] and not a.tiny:
                a.children[names[i + 1]] = begin(names[i + 1], a, argv)
            if i == 0:
                report.update(about())
            report["parts"][name] = do_part(child, min(left, limits[name]))
        save(a, report)
        print(headline(name, report["parts"][name]), flush=True)


def main(argv):
    a = options().parse_args(argv)
    settings_of(a)
    if a.part:
        return run_part(a)
    if a.list:
        print("\n".join(f"{name:26} at most {most} s" for name, (most, _) in PARTS.items()))
        return 0
    start, mine = time.monotonic(), not a.work
    a.work = a.work or work_folder(a)
    Path(a.work).mkdir(parents=True, exist_ok=True)
    report = dict(settings=dict(vars(a)), parts={})
    save(a, report)
    a.children = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; what was found is kept"))
    try:
        do_parts(a, argv, report, start)
    finally:
        for child in a.children.values():
            end(child)
        report["seconds"] = round(time.monotonic() - start, 1)
        save(a, report)
        if mine:
            shutil.rmtree(a.work, ignore_errors=True)
    print(f"\n{report.get('card')}, {report['seconds']:.0f} s")
    print("\n".join(headline(name, r) for name, r in report["parts"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
