"A system message and a chat template's arguments reach every place that builds a prompt"

from pathlib import Path
from types import SimpleNamespace as NS

import pytest

from specs_nb import world
from specs_nb.core import ColdStartStage, Config, DataConfig, GRPOStage, ModelConfig, SpecsError
from specs_nb.engines.generate import Sampling, encode, prompt
from specs_nb.engines.models import load_processor, random_model
from specs_nb.engines.server import _chat_body
from specs_nb.engines.templates import check_chat
from specs_nb.engines.vllm_engine import VLLM
from specs_nb.formats import FORMATS

TA = FORMATS["think_answer"]
CHAT = dict(system="Be brief.", kwargs=dict(mood="calm"))
# what is given besides shows in the prompt
MOOD = "{% if mood is defined %}<mood>{{ mood }}</mood>\n{% endif %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A text model and one with eyes, whose templates say which argument they were given."
    out = {}
    for family in ("text", "qwen2.5-vl"):
        folder = Path(random_model(family, tmp_path_factory.mktemp(family)))
        file = folder / "chat_template.jinja"
        file.write_text(MOOD + file.read_text(encoding="utf-8"), encoding="utf-8")
        out[family] = str(folder)
    return out


def rows_for(family, n=8):
    rows = world.rows("train", n)
    return [{**r, "images": []} for r in rows] if family == "text" else rows


def expected(folder, row):
    "Our own prompt, with both in it."
    text = prompt(load_processor(folder, CHAT), row, TA.instruction)
    assert "<mood>calm</mood>" in text and "system\nBe brief.<|im_end|>" in text and "user\n" in text
    return text


@pytest.mark.parametrize("family", ["text", "qwen2.5-vl"])
def test_grpo_gives_the_same_prompt(models, family, tmp_path):
    from trl.data_utils import prepare_multimodal_messages

    from specs_nb.grpo import grpo_trainer

    rows = rows_for(family)
    stage = GRPOStage(
        steps=1, trainer=dict(per_device_train_batch_size=4, num_generations=2, max_completion_length=4)
    )
    trainer = grpo_trainer(models[family], rows, tmp_path, stage, TA, chat=CHAT)
    said = trainer.table[0]["prompt"]
    if rows[0]["images"]:
        said = prepare_multimodal_messages(said, images=rows[0]["images"])
    ids = trainer._tokenize_prompts([said])[0][0]
    processor = load_processor(models[family], CHAT)
    ours = encode(processor, [rows[0]], [TA.instruction])["input_ids"][0].tolist()
    assert "<mood>calm</mood>" in expected(models[family], rows[0]) and list(ids) == ours


@pytest.mark.parametrize("family", ["text", "qwen2.5-vl"])
def test_dpo_gives_the_same_prompt(models, family, tmp_path):
    from specs_nb.coldstart import coldstart_trainer
    from specs_nb.pairs import make_pairs, read_pairs, write_pairs

    rows, folder = rows_for(family), models[family]
    parts = [[("One.", "1")]] * len(rows)
    pairs = make_pairs(rows, parts, parts, TA, ["drop_all_tags"], 8, system=CHAT["system"])
    write_pairs(pairs, tmp_path / "pairs.parquet")
    stage = ColdStartStage(lora=False, trainer=dict(per_device_train_batch_size=2, max_steps=1))
    ds = read_pairs(tmp_path / "pairs.parquet")
    trainer = coldstart_trainer(folder, ds, tmp_path, stage, chat=CHAT)
    batch = next(iter(trainer.get_train_dataloader()))
    text = trainer.processing_class.batch_decode(batch["input_ids"][:1])[0]
    assert "<mood>calm</mood>" in text and "system\nBe brief.<|im_end|>" in text


def test_engines_give_the_same_prompt(models):
    folder = models["text"]
    row = rows_for("text", 1)[0]
    assert VLLM._prompt(NS(processor=load_processor(folder, CHAT)), row, TA.instruction) == {
        "prompt": expected(folder, row)
    }
    body = _chat_body(row, TA.instruction, Sampling(), chat=CHAT)
    assert body["chat_template_kwargs"] == {"mood": "calm"}
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert "chat_template_kwargs" not in _chat_body(row, TA.instruction, Sampling())
    shown = _chat_body(rows_for("eyes", 1)[0], TA.instruction, Sampling(), chat=CHAT)["messages"]
    assert [p["type"] for p in shown[-1]["content"]] == ["image_url", "text"]


def test_a_run_hands_both_to_its_models():
    from specs_nb.pipeline import _load

    data = DataConfig(system="Be brief.", chat_template_kwargs=dict(mood="calm"))
    assert _load(Config(data=data))["chat"] == CHAT and "chat" not in _load(Config())


def test_the_text_begins_once(models):
    "Llama's and Gemma's templates write the first token, and their tokenizers would write it again."
    from tokenizers.processors import TemplateProcessing

    tok = load_processor(models["text"])
    tok.chat_template = "{{ bos_token }}" + tok.chat_template
    tok.bos_token = "<|endoftext|>"
    first = ("<|endoftext|>", tok.bos_token_id)
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[first]
    )
    row = rows_for("text", 1)[0]
    assert tok(prompt(tok, row, "Go."))["input_ids"].count(tok.bos_token_id) == 2
    ids = encode(tok, [row], ["Go."])["input_ids"][0].tolist()
    assert ids.count(tok.bos_token_id) == 1
    assert VLLM._prompt(NS(processor=tok), row, "Go.") == {"prompt_token_ids": ids}


def test_a_template_that_eats_the_format_stops_a_run_before_it_trains(models, tmp_path):
    import shutil

    import trl

    from specs_nb.core import Run
    from specs_nb.pipeline import run_stages
    from specs_nb.scale.doctor import _chat_problems

    folder = tmp_path / "thinker"
    shutil.copytree(models["text"], folder)
    shipped = Path(trl.__file__).parent / "chat_templates/deepseek_r1_distill.jinja"
    (folder / "chat_template.jinja").write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    config = Config(model=ModelConfig(path=str(folder)), data=DataConfig(images="without"))
    with pytest.raises(SpecsError, match="removes <think> and </think>"):
        check_chat(config)
    assert "already opens <think>" in _chat_problems(config)[0]
    run = Run(tmp_path / "run", config)
    with pytest.raises(SpecsError, match="doesn't carry the format think_answer"):
        run_stages(run, "zero")
    run.close()
    assert not (tmp_path / "run/zero/model").exists()
    assert not (tmp_path / "run/zero/checkpoints").exists()


def test_a_stage_has_no_template_arguments_of_its_own():
    from specs_nb.pipeline import check_names

    stage = GRPOStage(trainer=dict(chat_template_kwargs=dict(mood="calm")))
    with pytest.raises(SpecsError, match="set data.chat_template_kwargs"):
        check_names(Config(zero=stage))
