"""Half a model, an adapter alone, a folder without a chat template: one line that names the file, before
anything is trained"""

import json
import shutil
from pathlib import Path

import pytest

from specs_nb.core import Config, ModelConfig, SpecsError
from specs_nb.engines.models import load_model, load_processor, lora_config, random_model
from specs_nb.engines.templates import check_chat


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Path(random_model("text", tmp_path_factory.mktemp("whole")))


def cut(name, share=0.5):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return change


def without(name):
    return lambda folder: (folder / name).unlink()


def without_a_shard(folder):
    from safetensors import safe_open

    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (folder / "model.safetensors").rename(folder / first)
    with safe_open(folder / first, "pt") as f:
        where = {name: (first, second)[i % 2] for i, name in enumerate(f.keys())}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))


def without_a_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.gate_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


CASES = {
    "half weights": (cut("model.safetensors"), "model.safetensors is cut off or damaged"),
    "empty weights": (cut("model.safetensors", 0), "model.safetensors is cut off or damaged"),
    "no weights": (without("model.safetensors"), "no file named model.safetensors"),
    "no shard": (without_a_shard, "lacks 1 of its files of weights, such as model-00002"),
    "a weight less": (without_a_weight, "gate_proj.weight, and would be random numbers"),
    "half config": (cut("config.json"), "config.json is cut off or isn't JSON"),
    "no config": (without("config.json"), "has no config.json"),
    "half tokenizer": (cut("tokenizer.json"), "tokenizer.json is cut off or isn't JSON"),
    "no tokenizer": (without("tokenizer.json"), "makes no tokens of words"),
    "half generation config": (cut("generation_config.json"), "generation_config.json is cut off"),
    "half template": (cut("chat_template.jinja"), "chat template of .* is cut off or broken"),
    "no template": (without("chat_template.jinja"), "has no chat template"),
}


@pytest.mark.parametrize("name", CASES)
def test_half_a_model_is_named(name, whole, tmp_path):
    change, said = CASES[name]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    change(folder)
    with pytest.raises(SpecsError, match=said) as e:
        load_model(str(folder))
    assert "\n" not in str(e.value)


def test_eyes_without_a_template(tmp_path):
    folder = Path(random_model("qwen2.5-vl", tmp_path))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SpecsError, match="has no chat template"):
        load_processor(str(folder))


def test_an_adapter_alone(whole, tmp_path):
    from peft import get_peft_model

    get_peft_model(load_model(str(whole))[0], lora_config(4)).save_pretrained(tmp_path)
    load_model(str(tmp_path))  # with its base it can answer
    cut("adapter_model.safetensors")(tmp_path)
    with pytest.raises(SpecsError, match="adapter_model.safetensors is cut off or damaged"):
        load_model(str(tmp_path))
    noted = tmp_path / "adapter_config.json"
    noted.write_text(noted.read_text().replace(str(whole), "no/such-model"))
    with pytest.raises(SpecsError, match="no/such-model"):
        check_chat(Config(model=ModelConfig(path=str(tmp_path))))


def test_a_run_says_so_in_one_line(whole, tmp_path, capsys):
    from specs_nb.pipeline import main

    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    cut("tokenizer.json")(folder)
    assert main(["zero", "-c", "smoke", "--run-dir", str(tmp_path / "run"), f"model.path={folder}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "tokenizer.json is cut off" in said[0]
    assert not (tmp_path / "run/zero/checkpoints").exists()
