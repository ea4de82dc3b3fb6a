"Models of every family through our own stages: text alone, adapters, 4 bits, and what is refused."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specs_nb import world
from specs_nb.core import ColdStartStage, GRPOStage, SpecsError, read_json
from specs_nb.engines.models import FAMILIES, is_4bit, load_model, load_processor, random_model
from specs_nb.formats import FORMATS

FMT = FORMATS["think_answer"]
GRPO = dict(
    per_device_train_batch_size=8,
    num_generations=4,
    max_completion_length=8,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    warmup_steps=0,
    gradient_checkpointing=False,
    bf16=False,  # on a GPU TRL's default is true
)
DPO = dict(
    per_device_train_batch_size=2, max_steps=1, learning_rate=1e-3, gradient_checkpointing=False, bf16=False
)
torch.backends.cudnn.allow_tf32 = False  # nor are a GPU's convolutions exact as they come


def built(family, tmp_path):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    return random_model(family, tmp_path / family)


def rows(n, eyes=True):
    return [r if eyes else {**r, "images": []} for r in world.rows("train", n)]


def length(completions, **kw):
    return [float(len(c[0]["content"])) for c in completions]


def pairs(n, eyes, tmp_path):
    from specs_nb.pairs import make_pairs, write_pairs

    said = [[("One, two.", "2")]] * n
    write_pairs(
        make_pairs(rows(n, eyes), said, said, FMT, ["drop_all_tags", "plain_answer"], n),
        tmp_path / "pairs.parquet",
    )
    return tmp_path / "pairs.parquet"


def moved(a, b):
    a, b = (load_model(str(p))[0].state_dict() for p in (a, b))
    return [k for k in a if not torch.equal(a[k], b[k])]


@pytest.fixture
def pay(monkeypatch):
    from specs_nb import grpo

    monkeypatch.setattr(grpo, "resolve_rewards", lambda table: ([length], [1.0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_grpo_and_dpo(family, tmp_path, pay):
    "One step of each of TRL's trainers; with an adapter, only the language model moves"
    from specs_nb.coldstart import train_coldstart
    from specs_nb.grpo import train_grpo

    start, eyes = built(family, tmp_path), family != "text"
    facts = train_grpo(
        start, rows(4, eyes), tmp_path / "zero", GRPOStage(steps=1, lora=True, lora_rank=4, trainer=GRPO), FMT
    )
    assert facts["steps"] == 1
    went = moved(start, tmp_path / "zero/model")
    assert went and all("layers." in k and k.endswith("_proj.weight") and "vis" not in k for k in went)
    train_coldstart(
        start, pairs(2, eyes, tmp_path), tmp_path / "cold", ColdStartStage(lora=False, trainer=DPO)
    )
    assert moved(start, tmp_path / "cold/model")


@pytest.mark.parametrize("family", ["qwen2.5-vl", "text"])
def test_answers(family, tmp_path):
    from specs_nb.engines.generate import Sampling, sample_batch

    model, processor = load_model(built(family, tmp_path))
    texts = sample_batch(
        model, processor, rows(3, family != "text"), [FMT.instruction] * 3, Sampling(n=2, max_new_tokens=4)
    )
    assert [len(t) for t in texts] == [2, 2, 2]


def test_rows_without_images_through_a_vision_language_model(tmp_path, pay):
    from specs_nb.coldstart import train_coldstart
    from specs_nb.grpo import train_grpo

    assert (
        train_grpo("tiny", rows(4, False), tmp_path / "zero", GRPOStage(steps=1, trainer=GRPO), FMT)["steps"]
        == 1
    )
    assert (
        train_coldstart("tiny", pairs(2, False, tmp_path), tmp_path / "cold", ColdStartStage(trainer=DPO))[
            "steps"
        ]
        == 1
    )


def test_text_model_refuses_images(tmp_path, pay):
    from specs_nb.grpo import grpo_trainer

    with pytest.raises(SpecsError, match="text model, but row .* has images: set data.images"):
        grpo_trainer(built("text", tmp_path), rows(4), tmp_path, GRPOStage(steps=1, trainer=GRPO), FMT)


def test_a_frozen_tower_is_not_computed_backward(tmp_path, pay, monkeypatch):
    "Checkpointing makes TRL ask for gradients of the tower's input; without them the adapter's are the same"
    from specs_nb import grpo

    def gradients(name):
        t = grpo.grpo_trainer(
            "tiny",
            rows(4),
            tmp_path / name,
            GRPOStage(steps=1, lora=True, lora_rank=4, trainer={**GRPO, "gradient_checkpointing": True}),
            FMT,
        )
        t.model.train()
        t.current_gradient_accumulation_steps, asked = 1, []
        t.model.get_base_model().model.visual.patch_embed.register_forward_hook(
            lambda module, args, out: asked.append(out.requires_grad)
        )
        torch.manual_seed(0)
        inputs = t._prepare_inputs(next(iter(t.get_train_dataloader())))
        inputs["advantages"] = torch.linspace(
            -1, 1, len(inputs["advantages"]), device=inputs["advantages"].device
        )
        asked.clear()
        t._compute_loss(t.model, inputs).backward()
        return any(asked), {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}

    rested, mine = gradients("rested")
    monkeypatch.setattr(grpo, "skip_frozen_tower", lambda model: None)
    stock, theirs = gradients("stock")
    assert stock and not rested and mine.keys() == theirs.keys() and any(g.any() for g in mine.values())
    for n in mine:
        close = dict(rtol=1e-4, atol=1e-6) if torch.cuda.is_available() else {}  # sums in another order
        torch.testing.assert_close(mine[n], theirs[n], **close)


def watched(trainer):
    "A list that fills with whether the tower's output asked for gradients, as the trainer trains"
    asked, tower = [], trainer.model.get_base_model().model.visual
    look = lambda module, args, out: asked.append(torch.is_grad_enabled() and out.pooler_output.requires_grad)
    tower.register_forward_hook(look)
    return asked


@pytest.mark.parametrize("stage", ["zero", "coldstart"])
def test_a_frozen_tower_rests_as_long_as_is_trained(tmp_path, pay, stage):
    "`train` turns checkpointing on anew, and the tower would be read again and computed backward for nothing"
    from specs_nb.coldstart import coldstart_trainer
    from specs_nb.grpo import grpo_trainer
    from specs_nb.pairs import read_pairs

    if stage == "zero":
        settings = {**GRPO, "gradient_checkpointing": True}
        how = GRPOStage(steps=1, fast=False, lora=True, lora_rank=4, trainer=settings)
        trainer = grpo_trainer("tiny", rows(4), tmp_path, how, FMT)
    else:
        settings = {**DPO, "gradient_checkpointing": True, "max_steps": 1}
        how = ColdStartStage(lora=True, lora_rank=4, trainer=settings)
        trainer = coldstart_trainer("tiny", read_pairs(pairs(2, True, tmp_path)), tmp_path, how)
    asked = watched(trainer)
    trainer.train()
    assert asked and not any(asked)


def test_4_bit_stages_go_on_with_one_adapter(tmp_path, pay):
    """Cold start, then GRPO, both in 4 bits: the second trains the first one's adapter, and each merged model
    is what was trained"""
    from specs_nb.coldstart import train_coldstart
    from specs_nb.grpo import grpo_trainer, train_grpo

    train_coldstart(
        "tiny",
        pairs(4, True, tmp_path),
        tmp_path / "cold",
        ColdStartStage(qlora=True, lora_rank=4, trainer={**DPO, "max_steps": 2}),
    )
    stage = GRPOStage(steps=1, qlora=True, lora_rank=8, trainer=GRPO)
    trainer = grpo_trainer(str(tmp_path / "cold/model"), rows(4), tmp_path / "final", stage, FMT)
    assert is_4bit(trainer.model) and all(
        p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad
    )
    assert next(iter(trainer.model.peft_config.values())).r == 4, "the cold start's adapter, not a new one"
    train_grpo(str(tmp_path / "cold/model"), rows(4), tmp_path / "final", stage, FMT)
    words = torch.arange(4, 60)[None]
    for name in ("cold", "final"):
        whole, four = (
            load_model(str(tmp_path / name / "model"))[0],
            load_model(str(tmp_path / name / "model"), quantize=True)[0],
        )
        words = words.to(whole.device)
        with torch.no_grad():
            assert torch.allclose(whole(input_ids=words).logits, four(input_ids=words).logits, atol=1e-3)
    assert moved(tmp_path / "cold/model", tmp_path / "final/model")


def test_4_bit_run_cut_and_continued(tmp_path):
    from specs_nb.coldstart import train_coldstart

    config, path = ColdStartStage(
        qlora=True, lora_rank=4, trainer={**DPO, "max_steps": 4, "save_steps": 2}
    ), pairs(8, True, tmp_path)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_coldstart("tiny", path, tmp_path / "cut", config, tick=stop)
    for name in ("cut", "whole"):
        train_coldstart("tiny", path, tmp_path / name, config)
    from safetensors.torch import load_file

    cut, whole = (load_file(tmp_path / n / "model/adapter_model.safetensors") for n in ("cut", "whole"))
    close = dict(rtol=1e-3, atol=1e-5) if torch.cuda.is_available() else dict(rtol=0, atol=0)
    torch.testing.assert_close(cut, whole, **close)


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    "A cold start with LoRA on weights in 16 bits"
    from specs_nb.coldstart import train_coldstart

    tmp = tmp_path_factory.mktemp("cold")
    config = ColdStartStage(lora=True, lora_rank=4, trainer={**DPO, "max_steps": 2, "save_steps": 2})
    train_coldstart("tiny", pairs(4, True, tmp), tmp / "cold", config, dtype="bfloat16")
    return tmp / "cold"


def said(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 60, device=model.device)[None]).logits.float()


def test_an_adapter_on_16_bits_is_kept_and_goes_on(cold, tmp_path, pay):
    "Nothing is merged; the final stage trains the same adapter, or gets both as one model in float32"
    from specs_nb.engines.generate import Sampling, Transformers
    from specs_nb.grpo import grpo_trainer, train_grpo

    start = str(cold / "model")
    assert read_json(cold / "model/base.json")["base"] == "tiny"
    assert not list(cold.glob("**/model*.safetensors")), "no weights are written but the adapter's"
    stage = GRPOStage(steps=1, lora=True, lora_rank=8, trainer=GRPO)
    trainer = grpo_trainer(start, rows(4), tmp_path / "a", stage, FMT, dtype="bfloat16")
    assert next(iter(trainer.model.peft_config.values())).r == 4
    assert torch.equal(said(trainer.model.eval()), said(load_model(start, dtype="bfloat16")[0]))
    train_grpo(start, rows(4), tmp_path / "final", stage, FMT, dtype="bfloat16")
    assert moved(cold / "model", tmp_path / "final/model")
    full = GRPOStage(steps=1, lora=False, trainer=GRPO)
    whole = grpo_trainer(start, rows(4), tmp_path / "b", full, FMT, dtype="bfloat16").model
    assert whole.dtype == torch.float32 and not hasattr(whole, "peft_config")
    assert all(p.requires_grad for p in whole.parameters())
    assert torch.equal(said(whole.eval()), said(load_model(start)[0]))
    asked = Transformers(start, dict(dtype="bfloat16"), {})
    assert hasattr(asked.model, "peft_config"), "answered with base and adapter"
    drawn = asked.sample(rows(2), [FMT.instruction] * 2, Sampling(n=2, max_new_tokens=4), 0)
    assert [len(d) for d in drawn] == [2, 2]


def test_a_checkpoint_of_an_adapter_knows_its_base(cold):
    at = cold / "checkpoints/checkpoint-2"
    assert read_json(at / "base.json") == read_json(cold / "model/base.json")
    assert torch.equal(said(load_model(str(at))[0]), said(load_model(str(cold / "model"))[0]))


def test_names_of_transformers_4_are_refused(cold, tmp_path):
    "PEFT loads nothing of them and only warns: the model would answer as its base"
    import shutil

    from safetensors.torch import load_file, save_file

    old = shutil.copytree(cold / "model", tmp_path / "old")
    names = load_file(old / "adapter_model.safetensors")
    names = {n.replace("model.language_model.layers", "model.layers"): x for n, x in names.items()}
    save_file(names, old / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpecsError, match=r"keys have no place.*'base_model.model.model.layers.0"):
        load_model(str(old))


def test_a_run_that_was_moved_finds_its_base(cold, tmp_path):
    "A base within the run is found beside the adapter, wherever the folder lies now"
    import shutil

    from peft import get_peft_model

    from specs_nb.engines.models import base_of, lora_config, save_model

    save_model(*load_model(str(cold / "model")), tmp_path / "run/coldstart/model")
    model, processor = load_model(str(tmp_path / "run/coldstart/model"))
    save_model(get_peft_model(model, lora_config(4)), processor, tmp_path / "run/final/model")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert base_of(tmp_path / "elsewhere/final/model") == str(
        (tmp_path / "elsewhere/coldstart/model").resolve()
    )
    load_model(str(tmp_path / "elsewhere/final/model"))


def test_vllm_gets_a_whole_model(cold, capfd):
    from specs_nb.engines.models import is_adapter, whole_model
    from specs_nb.engines.vllm_engine import pick_engine, supported, vllm_version

    here = "vllm" if torch.cuda.is_available() and supported(vllm_version()) else "transformers"
    assert pick_engine("auto", str(cold / "model"))[0] == here
    path = whole_model(str(cold / "model"))
    assert (
        path == str(cold / "merged")
        and not is_adapter(path)
        and "% of what it changes" in capfd.readouterr().out
    )
    assert whole_model(str(cold / "model")) == path and not capfd.readouterr().out, "made once"


@pytest.mark.parametrize("family", ["tiny", "internvl", "text"])
def test_saved_weights_go_into_a_model_without_a_second_one(family, tmp_path, monkeypatch):
    "Names in files are others than in the model; they are translated without loading a model from them"
    from types import SimpleNamespace as NS

    from specs_nb import grpo

    start = "tiny" if family == "tiny" else built(family, tmp_path)
    trained, fresh = load_model(start)[0], load_model(start)[0]
    with torch.no_grad():
        for w in trained.parameters():
            w.add_(0.1)
    trained.save_pretrained(tmp_path / "checkpoint-1")
    monkeypatch.setattr(grpo, "last_checkpoint", lambda folder: str(tmp_path / "checkpoint-1"))
    monkeypatch.setattr(grpo, "model_class", lambda path: pytest.fail("a second model was loaded"))
    trainer = NS(model=fresh, is_fsdp_enabled=False, is_deepspeed_enabled=False, args=NS(output_dir=""))
    grpo.resume_point(trainer)
    for (name, a), b in zip(trained.named_parameters(), fresh.parameters()):
        assert torch.equal(a, b), name


def test_whole_weights_are_rounded_once_at_the_end(tmp_path):
    from types import SimpleNamespace as NS

    from specs_nb.engines.ranks import _dtype_to_write, save_trained

    assert _dtype_to_write("auto", 2e9) == "bfloat16" and _dtype_to_write("auto", 5e6) == "float32"
    model, processor = load_model("tiny")

    def save_pieces(to):
        model.save_pretrained(to)
        processor.save_pretrained(to)

    def trainer(pieces):
        return NS(
            model=load_model("tiny")[0],
            processing_class=processor,
            is_fsdp_enabled=pieces,
            is_deepspeed_enabled=False,
            save_model=save_pieces,
            accelerator=NS(wait_for_everyone=lambda: None),
        )

    for pieces in (False, True):
        folder = tmp_path / str(pieces) / "model"
        assert save_trained(trainer(pieces), folder, "bfloat16") == "bfloat16"
        assert (folder / "model.safetensors").stat().st_size < 2.6e6 and not list(
            folder.parent.glob(".gath*")
        )
        assert torch.equal(
            said(load_model(str(folder))[0]), said(load_model(str(folder), dtype="float32")[0])
        )
        assert read_json(folder / "config.json")["dtype"] == "bfloat16"
    assert (
        save_trained(trainer(True), tmp_path / "model", "auto") == "float32"
    ), "a small model stays as it is"
    assert not moved("tiny", tmp_path / "model")


def test_sizes_of_all_files_of_a_checkpoint_are_sealed(tmp_path):
    from specs_nb.grpo import last_checkpoint, seal

    at = tmp_path / "checkpoint-3"
    files = (
        "pytorch_model_fsdp.bin",
        "optimizer.bin",
        "global_step3/zero_pp_rank_0_optim_states.pt",
        "w_0/__0_0.distcp",
    )
    for name in (*files, "trainer_state.json", "rng_state_0.pth"):
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_text("12345678")
    seal(at)
    assert last_checkpoint(tmp_path) == str(at)
    for name in files:
        (at / name).write_text("1234")
        assert last_checkpoint(tmp_path) is None, name
        (at / name).write_text("12345678")


def test_weights_that_would_not_move_are_refused(tmp_path, pay):
    from specs_nb.coldstart import train_coldstart
    from specs_nb.grpo import train_grpo

    slow = {"learning_rate": 1e-6, "gradient_checkpointing": False}
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(SpecsError, match="model.dtype: float32 .* or zero.lora: true, or start with"):
            stage = GRPOStage(steps=1, trainer={**GRPO, **slow})
            train_grpo("tiny", rows(4), tmp_path / "zero", stage, FMT, stage="zero", dtype=dtype)
        with pytest.raises(SpecsError, match="coldstart trains all weights"):
            stage = ColdStartStage(lora=False, trainer={**DPO, **slow})
            train_coldstart("tiny", pairs(2, True, tmp_path), tmp_path / "cold", stage, dtype=dtype)


def test_options_of_an_adapter_reach_the_trainer(tmp_path, pay):
    from specs_nb.grpo import grpo_trainer

    how = dict(lora_rank=4, lora_alpha=4, lora_dropout=0.1, lora_targets=["q_proj"], lora_tower=True)
    model = grpo_trainer(
        "tiny", rows(4), tmp_path, GRPOStage(steps=1, lora=True, trainer=GRPO, **how), FMT
    ).model
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 4, 0.1)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("visual" in n for n in names)
    assert all("q_proj" in n for n in names if "language_model" in n)


def test_packages_that_are_asked_for_and_absent(monkeypatch, tmp_path):
    from specs_nb import models

    folder = built("text", tmp_path)
    monkeypatch.setattr(models, "_installed", lambda name: False)
    with pytest.raises(SpecsError, match="qlora needs bitsandbytes: pip install"):
        load_model(folder, quantize=True)
    with pytest.raises(SpecsError, match="flash_attention_2, but"):
        load_model(folder, attn="flash_attention_2")
    with pytest.raises(SpecsError, match="liger_kernel is not installed"):
        load_model(folder, liger="need")


def test_tokenizer_without_a_template(tmp_path):
    folder = Path(built("text", tmp_path))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SpecsError, match="no chat template"):
        load_processor(str(folder))


def test_not_a_model_that_talks(tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(SpecsError, match="vit is neither"):
        load_model(str(tmp_path))


def test_whole_run_of_a_text_model(tmp_path):
    """`specs run` on questions without pictures; the base can't answer any, so the run ends at the pairs and
    says why"""
    data = tmp_path / "data"
    data.mkdir()
    for f, k in (("data.jsonl", 1), ("test.jsonl", 2)):
        rows = [json.dumps({"question": f"What is {i} + {k}?", "answer": i + k}) + "\n" for i in range(8)]
        (data / f).write_text("".join(rows))
    r = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from specs_nb.pipeline import main; sys.exit(main())",
            "run",
            "-c",
            "smoke",
            "--run-dir",
            str(tmp_path / "r"),
            f"model.path={built('text', tmp_path)}",
            f"data.source={data}",
            "workers=1",
            "engine=transformers",
            "pairs.max_new_tokens=8",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert r.returncode == 2 and "no pair is left" in r.stderr, r.stderr[-2000:]
    assert read_json(tmp_path / "r/zero/stage.json")["state"] == "done" and is_text(tmp_path / "r/zero/model")


def is_text(folder):
    return json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
