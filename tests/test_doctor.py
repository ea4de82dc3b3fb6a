"""The doctor's estimates for known shapes and what must be refused; the recipes parse and fit the machines
they name. Measured peaks are in test_doctor_measured.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from specs_nb.core import Config, SpecsError, builtin_configs, load_config, merge
from specs_nb.engines.models import FAMILIES, load_model, lora_config, random_model
from specs_nb.pipeline import check_names, main
from specs_nb.scale.doctor import (
    Machine,
    Prompt,
    _how,
    _span,
    activations,
    advise,
    around_adapters,
    batches,
    diagnose,
    disk,
    estimate,
    example_prompt,
    generation,
    known_config,
    missing,
    read_rate,
    shape_of,
    side_by_side,
    this_machine,
    training,
)

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
CARD = {
    "paper_7b": dict(gpus=8, memory=80, launcher="fsdp2"),
    "qwen7b_lora_80gb": dict(gpus=1, memory=80),
    "qwen7b_qlora_48gb": dict(gpus=1, memory=48),
    "qwen3b_qlora_24gb": dict(gpus=1, memory=24),
    "qwen3vl": dict(gpus=1, memory=80),
    "text_only": dict(gpus=1, memory=24),
}


def specs(*args):
    code = "import sys; from specs_nb.pipeline import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


# ---- recipes


@pytest.mark.parametrize("name", CARD)
def test_recipes_parse(name, monkeypatch):
    # the doctor says that it is missing; here only names matter
    monkeypatch.setattr("specs_nb.engines.vllm_engine.need_vllm", lambda: None)
    assert name in builtin_configs()
    config = load_config(name)
    check_names(config)
    assert config != Config()


@pytest.mark.parametrize("name", CARD)
def test_recipes_fit_the_cards_they_name(name):
    config, machine = load_config(name), this_machine(**CARD[name])
    for stage, p in estimate(
        config, machine, Prompt(), shape_of(config.model.path, known_config(config.model.path))
    ).items():
        assert p.peak < 0.95 * machine.memory, (stage, p)


def comments(name):
    "All comments of a shipped recipe as one line"
    lines = builtin_configs()[name].read_text().splitlines()
    return " ".join(" ".join(l.split("#", 1)[1].split()) for l in lines if "#" in l)


def learning(config, stage, shape, machine):
    "GiB that a trainer needs while vLLM sleeps, without CUDA's own"
    trainer, prompt = getattr(config, stage).trainer, example_prompt(config)
    new, micro = trainer["max_completion_length"], trainer["per_device_train_batch_size"]
    how = dict(_how(config, stage, machine), image_tokens=prompt.image)
    return training(shape, micro, prompt.tokens + new, new, **how).peak / GIB


@pytest.mark.parametrize("name", CARD)
def test_recipes_say_what_the_doctor_says(name):
    "The products of a step, how many sequences vLLM holds, and what the trainer needs while it sleeps"
    config, machine, said = load_config(name), this_machine(**CARD[name]), comments(name)
    shape = shape_of(config.model.path, known_config(config.model.path))
    for stage, words in batches(config, machine.gpus).items():
        assert words in said, stage
    for stage in ("zero", "final"):
        words = side_by_side(config, stage, shape, example_prompt(config), machine)
        assert words and words.removesuffix(" side by side") in said, words
        peak = learning(config, stage, shape, machine)
        assert f"its graphs: {peak:.1f} + 1.5 + CUDA 1.0 = {peak + 2.5:.1f}" in said, (stage, peak)


def facts_of(name, rate):
    "What the doctor says of a recipe on the card that it is for"
    return diagnose(load_config(name), this_machine(**CARD[name]), rate=read_rate(str(rate)))


def test_configuration_has_the_doctors_hours():
    hours = facts_of("qwen7b_qlora_48gb", ROOT / "bench/results/gpu_7b.json")["times"]
    zero, pairs, cold, final, evaluation = (f"{s / 3600:.1f}" for s in hours.values())
    said = f"zero {zero}, pairs {pairs}, cold start {cold}, final {final}, evaluation {evaluation}"
    text = " ".join((ROOT / "docs/configuration.md").read_text().split())
    assert f"at most {sum(hours.values()) / 3600:.0f} hours for `qwen7b_qlora_48gb`: {said}" in text


def test_one_gpu_has_the_doctors_table():
    facts = facts_of("qwen7b_lora_80gb", "generate=7000,train=7000")
    cells = json.loads((ROOT / "nbs/tutorials/20_one_gpu.ipynb").read_text())["cells"]
    text = "\n".join("".join(c["source"]) for c in cells)
    for stage, p in facts["parts"].items():
        beside = f"{p.vllm / GIB:.0f}" if p.vllm else "–"
        time = _span(facts["times"][stage])
        assert f"| `{stage}` | {p.peak / GIB:.0f} | {beside} | {time} |" in text, stage
    on_disk = disk(load_config("qwen7b_lora_80gb"), facts["shape"], local=False)
    assert f"{sum(on_disk.values()) / GIB:.0f} GiB for model and checkpoints" in text


def test_skypilots_disk_is_large_enough():
    size, said = re.search(
        r"disk_size: (\d+).* counts (\d+) GiB", (ROOT / "docs/examples/skypilot.yaml").read_text()
    ).groups()
    config = load_config("paper_7b")
    shape = shape_of(config.model.path, known_config(config.model.path))
    needed = sum(disk(config, shape, local=False, launcher="fsdp2").values())
    assert said == f"{needed / GIB:.0f}"
    assert int(size) * 1e9 > needed + 100e9, "room for data and libraries"


@pytest.mark.parametrize("name", sorted(set(CARD) - {"paper_7b"}))
def test_one_card_recipes_write_with_vllm(name):
    c = load_config(name)
    assert c.engine == "vllm"
    for stage in (c.zero, c.final):
        t = stage.trainer
        assert t["use_vllm"] and t["vllm_mode"] == "colocate" and t["vllm_enable_sleep_mode"]
        assert c.vllm.max_model_len == t["vllm_max_model_length"] >= 1024 + t["max_completion_length"]
        assert (stage.lora, stage.qlora) == ("qlora" not in name, "qlora" in name)


@pytest.mark.parametrize("name", CARD)
def test_every_key_of_a_recipe_has_its_reason(name):
    "A comment behind the key, or above it; what the second stage repeats was said in the first"
    seen, bare, told = set(), [], False
    for line in builtin_configs()[name].read_text().splitlines():
        text = line.strip()
        if not text or text.startswith("#"):
            told = bool(text)
            continue
        key = text.removeprefix("- ").split(":")[0]
        section = text.split("#")[0].strip().endswith((":", "&grpo"))
        if not (told or "#" in text or section or key in seen or text.startswith("-")):
            bare.append(key)
        seen.add(key)
        told = False
    # of two factors the first explains the product; Qwen2.5-VL-7B needs no word
    assert set(bare) <= {"gradient_accumulation_steps", "path"}, bare


def test_paper_with_servers_on_half_of_the_cards(monkeypatch, tmp_path):
    "The commented lines taken, those of the colocation left out, as the top of the file says"
    lines = []
    for line in builtin_configs()["paper_7b"].read_text().splitlines():
        if "# {servers} " in line:
            line = line.replace("# {servers} ", "")
        if not line.endswith("{colocate}"):
            lines.append(line)
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    config, machine = load_config(tmp_path / "mine.yaml"), this_machine(gpus=4, memory=80, launcher="fsdp2")
    monkeypatch.setattr("specs_nb.engines.vllm_engine.need_vllm", lambda: None)
    check_names(config)
    assert "sleep" not in str(config) and config.final.trainer["vllm_mode"] == "server"
    for stage, words in batches(config, 4).items():
        assert words.split(" (")[0] == batches(load_config("paper_7b"), 8)[stage].split(" (")[0]
    shape = shape_of(config.model.path, known_config(config.model.path))
    for stage, p in estimate(config, machine, Prompt(), shape).items():
        assert p.peak < 0.95 * machine.memory, (stage, p)


def test_paper_recipe_says_where_each_value_comes_from():
    lines = builtin_configs()["paper_7b"].read_text().splitlines()
    body = lines[next(i for i, l in enumerate(lines) if l.startswith("seed:")) :]
    head = body[: body.index("final:")]  # `final` repeats the values of `zero`
    unsaid, told = [], False
    for line in head:
        tagged = any(tag in line for tag in ("[paper]", "[fig]", "[note]", "[ours]"))
        if line.strip().startswith("#"):
            told |= tagged  # of the value below
        elif not line.strip().startswith("- ") and not line.rstrip().endswith((":", "&grpo")):
            if not (told or tagged):
                unsaid.append(line.split(":")[0].strip())
            told = False
    # the product with the line before is said there
    assert unsaid == ["gradient_accumulation_steps"] * 2
    c = load_config("paper_7b")
    assert (
        8 * c.final.trainer["per_device_train_batch_size"] * c.final.trainer["gradient_accumulation_steps"]
        == 128 * c.final.trainer["num_generations"]
    )
    assert (
        8
        * c.coldstart.trainer["per_device_train_batch_size"]
        * c.coldstart.trainer["gradient_accumulation_steps"]
        == 64
    )
    assert (
        c.final.steps,
        c.final.trainer["learning_rate"],
        c.coldstart.trainer["learning_rate"],
        c.coldstart.lam,
        c.final.trainer["max_completion_length"],
    ) == (800, 1e-6, 1e-6, 1.0, 10240)


# ---- shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_of_every_family(family, tmp_path):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    from peft import get_peft_model

    s, model = shape_of(random_model(family, tmp_path)), load_model(str(tmp_path))[0]
    assert s.total == model.num_parameters() and (s.vision > 0) == (family != "text") == bool(s.tower)
    assert (s.hidden, s.layers, s.q, s.kv) == (64, 2, 64, 32) and s.qk_norm == (
        family in ("qwen3-vl", "gemma3", "text")
    )
    assert 8 * s.lora[1] == sum(
        p.numel() for p in get_peft_model(model, lora_config(8)).parameters() if p.requires_grad
    )


def test_known_shapes_are_the_published_ones():
    assert shape_of("x", known_config("Qwen/Qwen2.5-VL-7B-Instruct")).total == 8_292_166_656
    assert shape_of("x", known_config("Qwen/Qwen2.5-VL-3B-Instruct")).total == 3_754_622_976
    assert shape_of("x", known_config("Qwen/Qwen3-VL-8B-Instruct")).total == 8_767_123_696
    assert shape_of("x", known_config("Qwen/Qwen3-VL-4B-Instruct")).total == 4_437_815_808


# ---- memory

SEVEN = shape_of("seven", known_config("Qwen/Qwen2.5-VL-7B-Instruct"))


def test_more_of_anything_needs_more():
    def peak(sequences=1, tokens=2048, **kw):
        return training(
            SEVEN, sequences, tokens, **{"train": "lora", "dtype": "bfloat16", "checkpoint": True, **kw}
        ).peak

    assert peak(2) > peak() < peak(tokens=4096)
    assert peak(dtype="float32") > peak() < peak(checkpoint=False)
    assert peak(train="qlora") < peak() < peak(train="full") < peak(train="full", reference=True)
    assert (
        peak(train="full", gpus=8, cut="fsdp2")
        < peak(train="full", gpus=8, cut="zero2")
        < peak(train="full", gpus=8)
    )
    assert (
        generation(SEVEN, 2, 100, 100).peak
        > generation(SEVEN, 1, 100, 100).peak
        < generation(SEVEN, 1, 100, 200).peak
    )


def test_advice_makes_it_fit():
    config = merge(Config(), {"workers": 1, "model": {"dtype": "bfloat16"}})
    machine = Machine(24 * GIB, 1, "24 GiB GPU", disk=10**15, base=GIB)
    shape = shape_of("x", known_config("Qwen/Qwen2.5-VL-3B-Instruct"))
    assert estimate(config, machine, Prompt(), shape)["coldstart"].peak > machine.memory
    words, fits = advise(config, "coldstart", machine, Prompt(), shape)
    assert fits
    for w in words.split(" and "):
        key, value = w.split(" (")[0].split(": ")
        values = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
        for part in reversed(key.split(".")):
            values = {part: values}
        config = merge(config, values)
    assert estimate(config, machine, Prompt(), shape)["coldstart"].peak <= machine.memory


def test_no_advice_where_none_helps():
    words, fits = advise(Config(), "zero", Machine(GIB / 2, 1, "toy"), Prompt(), SEVEN)
    assert words and not fits


def test_vllm_in_the_same_gpu_is_counted():
    t = dict(use_vllm=True, vllm_gpu_memory_utilization=0.5)
    machine = Machine(80 * GIB, 1, "80", base=GIB)

    def peak(**kw):
        return estimate(
            merge(
                Config(),
                {
                    "zero": {
                        "qlora": True,
                        "trainer": {"gradient_checkpointing": True, "per_device_train_batch_size": 1, **kw},
                    }
                },
            ),
            machine,
            Prompt(),
            SEVEN,
        )["zero"].peak

    assert peak(**t) > 40 * GIB + peak(use_vllm=True, vllm_mode="server") - 2 * GIB and peak(
        **t, vllm_enable_sleep_mode=True
    ) < peak(**t)


# ---- what is missing, and the command


def test_packages(monkeypatch):
    from specs_nb.scale import doctor

    have = {"bitsandbytes": "0.40", "vllm": "0.40.0"}
    monkeypatch.setattr(
        doctor,
        "_version_of",
        lambda name: have.get(name, "999" if name not in ("flash-attn", "vllm", "bitsandbytes") else None),
    )
    monkeypatch.setattr("importlib.metadata.requires", lambda name: [])
    config = merge(
        Config(),
        {"final": {"qlora": True, "trainer": {"use_vllm": True}}, "model": {"attn": "flash_attention_2"}},
    )
    said = " | ".join(missing(config, Machine(GIB)))
    assert (
        "bitsandbytes 0.40 is installed, qlora needs >=0.49" in said
        and "vllm 0.40.0 is installed" in said
        and "flash-attn is not installed" in said
    )


def test_fits(tmp_path):
    r = specs("doctor", "--run-dir", tmp_path / "r", "--memory", 32)
    assert (
        r.returncode == 0
        and "it fits" in r.stdout
        and "1,111,488 parameters" in r.stdout
        and not (tmp_path / "r").exists()
    ), r.stderr


def test_does_not_fit(tmp_path, capsys):
    assert main(["doctor", "--run-dir", str(tmp_path / "r"), "--memory", "1.2"]) == 2
    assert "specs: zero needs" in (err := capsys.readouterr().err) and "set zero.trainer." in err


def test_out_of_memory_in_a_stage(tmp_path, monkeypatch, capsys):
    import torch

    from specs_nb import pipeline

    def dies(run, stage):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(pipeline.DO, "zero", dies)
    assert main(["zero", "-c", "smoke", "--run-dir", str(tmp_path / "r")]) == 2
    assert (
        "out of memory in zero" in (err := capsys.readouterr().err)
        and "set zero.trainer." in err
        and "Traceback" not in err
    )


def test_disk_of_checkpoints_that_are_spread():
    "The model in float32, AdamW's two moments, and the gathered model; the final weights in 16 bits"
    full = merge(Config(), {"coldstart": {"lora": False}})
    one, eight = disk(full, SEVEN, True), disk(full, SEVEN, True, "fsdp2")
    assert eight["checkpoints"] == 4 * one["checkpoints"] // 3 == 16 * 4 * SEVEN.total
    assert one["models"] == (4 + 4 + 2) * SEVEN.total
    assert disk(Config(), SEVEN, True)["models"] < one["models"] - 3.9 * SEVEN.total, "an adapter is small"


def test_disk(tmp_path, monkeypatch):
    facts = diagnose(Config(), Machine(32 * GIB, disk=10 * 2**20, base=GIB), Prompt(64, 9))
    assert any("of disk" in p and "--run-dir" in p for p in facts["problems"])
    assert disk(Config(), SEVEN, False)["download"] == 2 * SEVEN.total and "download" not in disk(
        Config(), SEVEN, True
    )


@pytest.mark.parametrize(
    "args, said",
    [
        (["--gpus", "2"], "--memory 80"),
        (["--rate", "fast"], "--rate is written"),
        (["model.path=nobody/nothing"], "no model can be loaded"),
        (["zero.stpes=1"], "did you mean"),
    ],
)
def test_bad_words(args, said, tmp_path, capsys):
    import torch

    if torch.cuda.is_available() and "--gpus" in args:
        pytest.skip("there is a GPU")
    assert main(["doctor", "--run-dir", str(tmp_path / "r"), *args]) == 2 and said in capsys.readouterr().err


def test_rates(tmp_path):
    assert read_rate("generate=10,train=20") == {"generate": 10.0, "train": 20.0}
    (tmp_path / "g.json").write_text(json.dumps({"rates": {"generate": 5.0}}))
    assert read_rate(str(tmp_path / "g.json")) == {"generate": 5.0}
    with pytest.raises(SpecsError, match="no file of bench/gpu.py"):
        read_rate(str(tmp_path / "none.json"))


def test_time_from_an_earlier_run(tmp_path):
    "The stage's own seconds, by tokens"
    from specs_nb.core import Run, write_json
    from specs_nb.scale.doctor import times

    run = Run(tmp_path / "r", Config())
    run.save_config()
    run.close()
    write_json(tmp_path / "r/zero/stage.json", {"state": "done", "seconds": 30.0})
    assert times(Config(), Prompt(64, 9), run=tmp_path / "r") == {"zero": 30.0}
    twice = merge(Config(), {"zero": {"steps": 2 * Config().zero.steps}})
    assert times(twice, Prompt(64, 9), run=tmp_path / "r") == {"zero": 60.0}
    assert times(merge(Config(), {"model": {"path": "other/model"}}), Prompt(64, 9), run=tmp_path / "r") == {}


# ---- the bench


def test_bench_runs(tmp_path):
    "That the script works, and nothing else"
    r = subprocess.run(
        [
            sys.executable,
            ROOT / "bench/gpu.py",
            tmp_path / "g.json",
            "--shape",
            "tiny",
            "--device",
            "cpu",
            "--train",
            "qlora",
            "--steps",
            "1",
            "--sequences",
            "2",
            "--micro",
            "1",
            "--new",
            "4",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert r.returncode == 0, r.stderr[-2000:]
    d = json.loads((tmp_path / "g.json").read_text())
    assert (
        d["card"] == "CPU"
        and set(d["results"]) == {"distill 4 bits", "dpo qlora", "grpo qlora"}
        and "mfu" not in str(d["results"])
    )
    assert all(v["step_seconds"] > 0 and v["peak_gib"] > 0 for v in d["results"].values()) and set(
        d["rates"]
    ) == {"generate", "train"}


def test_pictures_made_smaller_are_counted_over_all_sources(tmp_path):
    from PIL import Image

    for name, n in (("mine", 300), ("other", 40)):
        (tmp_path / name).mkdir()
        lines = []
        for i in range(n):
            size = (120, 90) if i % 3 == 0 else (40, 30)
            Image.new("RGB", size, (i % 256, 7 * i % 256, len(name))).save(tmp_path / name / f"{i}.png")
            lines.append(
                json.dumps(dict(question=f"How many dots has {i}?", answer="3", images=[f"{i}.png"]))
            )
        (tmp_path / name / "data.jsonl").write_text("\n".join(lines))
    mine, other = tmp_path / "mine", tmp_path / "other"
    one = example_prompt(load_config(None, [f"data.source={mine}", "data.shrink_to=4000"]))
    assert "22 of 64 pictures made smaller" in one.how
    assert "smaller" not in example_prompt(load_config(None, [f"data.source={mine}"])).how
    both = f"data.sources=[{{source: {other}, weight: 9}}, {{source: {mine}, shrink_to: 4000}}]"
    found = example_prompt(load_config(None, [both]))
    assert "22 of 104 pictures made smaller" in found.how and found.image > one.image


# ---- float32 adapters in a model that computes in 16 bits


def live_bytes(work):
    "The most bytes that tensors made by `work` held at once; views and weights don't count"
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Watch(TorchDispatchMode):
        live, now, most = {}, 0, 0

        def gone(self, key):
            self.now -= self.live.pop(key)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            theirs = {t.untyped_storage()._cdata for t in tree_iter(args) if isinstance(t, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            for t in tree_iter(out):
                storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
                if storage is None or storage._cdata in theirs or storage._cdata in self.live:
                    continue
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
            return out

    with Watch() as watch:
        work()
    return watch.most


@pytest.mark.parametrize("bits", [32, 16])
def test_a_layer_made_anew_with_adapters(bits):
    "Two layers with 7B's proportions and LoRA: what lives at the worst moment, against the reckoning"
    import torch
    from peft import get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    h, f, batch, length = 224, 1184, 8, 200
    heads = dict(num_attention_heads=7, num_key_value_heads=7)
    config = Qwen2Config(hidden_size=h, intermediate_size=f, num_hidden_layers=2, vocab_size=1000, **heads)
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    model = get_peft_model(Qwen2ForCausalLM(config).to(dtype), lora_config(1)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.zeros(batch, length, dtype=torch.long)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bits == 16):
            out = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
            total = out.sum()
        total.backward()

    tokens, size, shape = batch * length, bits // 8, shape_of("x", config)
    _, one, kept = activations(h, f, h, 2, tokens, frozen=True, size=size)
    reckoned = 2 * kept + one + sum(around_adapters(shape, tokens, size)) + 2 * tokens * h * size
    assert live_bytes(step) == pytest.approx(reckoned, rel=0.06)
