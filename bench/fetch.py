"""What it costs to bring a GRPO step's questions to the trainer: rows decoded, seconds and host memory, TRL's
way and ours, at the recipes' batch shapes, with pictures of a megapixel. No model is trained: the fetch alone
is measured.

Usage: python bench/fetch.py [--json OUT.json] [--stock-batches N]

`ours` fetches all batches of a step and looks up the rows of one generation batch, as
`_generate_and_score_completions` does. `stock` is TRL's trainer as it comes; it holds every batch of a step
in memory, so only the first N of them are fetched and held (and one more: the loader is a batch ahead), and
the step's figures are those times (all + 1) / (N + 1). Each measurement has a process of its own. Memory is
the peak over what was held before. Of time, the processor's seconds count, since on a machine that others use
too the clock on the wall measures them; both are kept."""

import argparse
import io
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# rows of a micro-batch and accumulation steps (of a rank), 8 generations
SHAPES = {"qwen7b_qlora_48gb": (4, 32), "paper_7b": (2, 64)}
GENERATIONS, SIDE, QUESTIONS, SEED = 8, 1000, 64, 0


def picture(rng):
    "A drawn picture of a megapixel as a JPEG"
    from PIL import Image, ImageDraw

    image = Image.effect_noise((SIDE, SIDE), 10).convert("RGB")
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, size = rng.randrange(SIDE), rng.randrange(SIDE), rng.randrange(20, 200)
        draw.ellipse((x, y, x + size, y + size), fill=tuple(rng.randrange(256) for _ in range(3)))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def prepare(path):
    "Rows on disk, as a published set is stored"
    from specs_nb import world
    from specs_nb.data import decode, write_rows

    rng = random.Random(SEED)
    rows = world.rows("train", QUESTIONS)
    write_rows(({**r, "images": [decode(picture(rng))]} for r in rows), path)


def resident():
    "Bytes that this process holds now"
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    "The most that this process holds within, over what it held at the beginning"

    def __enter__(self):
        self.began, self.bytes, self.done = resident(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.005):
            self.bytes = max(self.bytes, resident() - self.began)

    def __exit__(self, *error):
        self.bytes = max(self.bytes, resident() - self.began)
        self.done.set()
        self.thread.join()


def measure(way, shape, path, stock_batches):
    "One way at one shape, in this process"
    import copy

    from datasets import Image
    from trl import GRPOConfig, GRPOTrainer

    from specs_nb.data import Rows, grpo_dataset
    from specs_nb.engines.models import load_model
    from specs_nb.engines.prompts import look_up, once_trainer
    from specs_nb.formats import FORMATS
    from specs_nb.rewards import format_reward

    micro, accumulation = SHAPES[shape]
    model, processor = load_model("tiny")
    args = GRPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        num_generations=GENERATIONS,
        max_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        seed=SEED,
    )
    rows = grpo_dataset(Rows(path), FORMATS["think_answer"].instruction, "think_answer")
    cls = once_trainer(GRPOTrainer) if way == "ours" else GRPOTrainer
    trainer = cls(model, format_reward, args, rows, processing_class=processor)
    decoded, stock = [], Image.decode_example

    def decode_example(self, *args, **kw):
        decoded.append(1)
        return stock(self, *args, **kw)

    Image.decode_example = decode_example
    n = accumulation if way == "ours" else min(stock_batches, accumulation)
    iterator = iter(trainer.get_train_dataloader())
    clocks = time.perf_counter, time.process_time
    with Peak() as fetch:
        began = [clock() for clock in clocks]
        batches, _ = trainer.get_batch_samples(iterator, n, "cpu")
        seconds, cpu = (clock() - b for clock, b in zip(clocks, began))
    with Peak() as use:
        began = [clock() for clock in clocks]
        batch = look_up(trainer.table, batches[0]) if way == "ours" else batches[0]
        # TRL copies the prompts with their pictures before it answers them
        pictures = copy.deepcopy([r["images"] for r in batch])
        seconds_used, cpu_used = (clock() - b for clock, b in zip(clocks, began))
    share = (accumulation + 1) / (n + 1)
    ids = {r["id"] for r in batch}
    assert len(pictures) == micro * accumulation and len(ids) == micro * accumulation // GENERATIONS
    return dict(
        shape=shape,
        way=way,
        questions=len(ids),
        batches_fetched=n,
        rows_fetched=sum(map(len, batches)),
        decoded=len(decoded),
        decoded_a_step=len(decoded) * share,
        cpu_s_a_step=cpu * share + cpu_used,
        wall_s_a_step=seconds * share + seconds_used,
        gib_a_step=(fetch.bytes * share + use.bytes) / 2**30,
    )


def in_a_process(way, shape, path, stock_batches):
    words = [sys.executable, __file__, "--one", way, shape, str(path), "--stock-batches", str(stock_batches)]
    out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def step_seconds():
    "Seconds of a GRPO step of 8 answers of 256 tokens, 7B in 4 bits, as measured on an H100"
    path = Path(__file__).parent / "results/gpu_7b.json"
    return json.loads(path.read_text())["results"]["grpo qlora"]["step_seconds"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", default=Path(__file__).parent / "results/fetch.json")
    parser.add_argument(
        "--stock-batches", type=int, default=2, help="batches of a step that TRL's way fetches and holds"
    )
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SHAPE", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.stock_batches)))
        sys.exit()
    out = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread",
        seed=SEED,
        pixels=SIDE**2,
        generations=GENERATIONS,
        versions={p: version(p) for p in ("datasets", "pillow", "transformers", "trl")},
        step_seconds=step_seconds(),
        results=[],
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.arrow"
        prepare(path)
        for shape in SHAPES:
            for way in ("stock", "ours"):
                r = in_a_process(way, shape, path, options.stock_batches)
                r["share_of_step"] = r["cpu_s_a_step"] / out["step_seconds"]
                out["results"].append(r)
                print(
                    f"{shape:18} {way:6} {r['questions']:3} questions  {r['decoded_a_step']:7.0f} decoded "
                    f" {r['cpu_s_a_step']:7.2f} s  {r['gib_a_step']:6.2f} GiB  {r['share_of_step']:.1%} of"
                    f" a step of {out['step_seconds']:.1f} s",
                    flush=True,
                )
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    Path(options.json).write_text(json.dumps(out, indent=1) + "\n")
    for r in out["results"]:
        if r["way"] == "ours":
            assert r["decoded"] == r["questions"], "each distinct picture is decoded once"
            assert r["gib_a_step"] <= 1, "at most 1 GiB above the model"
            assert r["share_of_step"] <= 0.02, "at most 2 % of a step"
