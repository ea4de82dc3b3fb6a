"""Another micro-batch with the same product: a checkpoint holds, in GRPO and in DPO, and the steps after it
are the same"""

import json

import pytest

from specs_nb.core import ColdStartStage, Config, GRPOStage, PairsStage, Stage, load_config
from specs_nb.pipeline import inputs, keys

STEPS = dict(
    save_steps=2,
    gradient_checkpointing=False,
    learning_rate=1e-4,
    lr_scheduler_type="constant",
    warmup_steps=0,
)


def micro(size, steps):
    return {**STEPS, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps}


def cut_off(stage, train, first, then):
    """Four steps in two parts: a stop is asked for after the second, and the rest is taken with another
    micro-batch"""
    from specs_nb import core

    def stop():
        core._asked.append("a test")  # at the first checkpoint

    with pytest.raises(core.Interrupted, match="step 3 of 4"):
        try:
            train(first, stop)
        finally:
            core._asked.clear()
    assert (stage / "checkpoints/checkpoint-3/trainer_state.json").exists()
    seen = []
    facts = train(then, lambda: seen.append(1))
    history = json.loads((stage / "history.json").read_text())
    state = json.loads((stage / "checkpoints/checkpoint-4/trainer_state.json").read_text())
    assert facts["steps"] == 4 == state["global_step"] and [h["step"] for h in history] == [1, 2, 3, 4]
    assert len(seen) == 1, "one checkpoint more: it went on at step 3, not from the start"
    return history


def test_grpo(tmp_path):
    from specs_nb.formats import FORMATS
    from specs_nb.grpo import train_grpo
    from specs_nb.world import rows

    def train(how, tick, out=tmp_path / "zero"):
        how = {**how, "num_generations": 4, "max_completion_length": 24}
        config = GRPOStage(steps=4, trainer=how)
        return train_grpo(
            "tiny", rows("train", 32), out, config, FORMATS["think_answer"], tick=tick, look_every=0
        )

    history = cut_off(tmp_path / "zero", train, micro(16, 1), micro(8, 2))
    train(micro(16, 1), None, tmp_path / "whole")
    whole = json.loads((tmp_path / "whole/history.json").read_text())
    for a, b in zip(history, whole):  # the same completions, to the last
        assert a["completions/mean_length"] == pytest.approx(b["completions/mean_length"]), (a, b)
        assert a["reward"] == pytest.approx(b["reward"])


def test_dpo(tmp_path):
    from specs_nb.coldstart import train_coldstart
    from specs_nb.formats import FORMATS
    from specs_nb.pairs import distill
    from specs_nb.world import rows

    how = PairsStage(n_samples=2, max_pairs=24, teacher="base", max_new_tokens=64)
    distill(
        "tiny",
        "tiny",
        rows("train", 96),
        tmp_path / "pairs",
        how,
        FORMATS["think_answer"],
        engine="transformers",
    )

    def train(how, tick, out=tmp_path / "cold"):
        config = ColdStartStage(loss="dpo", trainer={**how, "max_steps": 4})
        return train_coldstart("tiny", tmp_path / "pairs/pairs.parquet", out, config, tick=tick)

    history = cut_off(tmp_path / "cold", train, micro(4, 1), micro(2, 2))
    train(micro(4, 1), None, tmp_path / "whole")
    whole = json.loads((tmp_path / "whole/history.json").read_text())
    for a, b in zip(history, whole):  # the same pairs, in the same order
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)


@pytest.mark.parametrize("stage", ["zero", "coldstart", "final"])
def test_the_key_is_of_the_product(stage):
    small, large, other = (
        load_config(
            None,
            [
                f"{stage}.trainer.per_device_train_batch_size={size}",
                f"{stage}.trainer.gradient_accumulation_steps={steps}",
            ],
        )
        for size, steps in ((2, 8), (16, 1), (2, 4))
    )
    assert keys(small) == keys(large) and keys(small)[stage] != keys(other)[stage]


def test_an_older_run_is_kept_and_named(tmp_path, capsys):
    "As 0.1 wrote it: a key, and no table of what it is made of"
    (tmp_path / "zero/model").mkdir(parents=True)
    (tmp_path / "zero/model/config.json").write_text("{}")
    old = {"state": "done", "key": "0123456789abcdef", "versions": {}, "seconds": 12.0}
    (tmp_path / "zero/stage.json").write_text(json.dumps(old))
    stage = Stage(tmp_path / "zero", keys(Config())["zero"], ("model/config.json",), inputs(Config())["zero"])
    assert "made by an older version" in stage.why()
    stage.begin()
    said = capsys.readouterr().out
    assert "zero.before-1" in said and "specs clean" in said
    assert (tmp_path / "zero.before-1/model/config.json").exists() and stage.why() == "it was cut off"


@pytest.mark.parametrize("on", ["data.first_choice=0", "data.ignore=[A]"])
def test_an_option_that_is_off_is_no_input(on):
    "An upgrade that adds an option keeps trained stages, and a grid's too, whose folders are named by keys"
    assert on.partition("=")[0] not in inputs(Config())["zero"]
    changed = load_config(None, [on])
    assert on.partition("=")[0] in inputs(changed)["zero"] and keys(changed)["zero"] != keys(Config())["zero"]


def test_several_gpus_are_refused_before_anything_is_answered(tmp_path, monkeypatch):
    from specs_nb import pipeline
    from specs_nb.core import Run, SpecsError

    torch = pytest.importorskip("torch")
    run = Run(tmp_path, Config())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(
        SpecsError, match="zero: this machine has 8 GPUs.*--launcher ddp.*CUDA_VISIBLE_DEVICES=0"
    ):
        pipeline.run_stages(run, "report")
    assert not (tmp_path / "zero").exists()
    pipeline._one_gpu(run.config, ["zero"], "ddp")
    pipeline._one_gpu(run.config, ["pairs", "eval", "report"], "")  # answering needs no launcher
    pipeline._one_gpu(load_config(None, ["coldstart.loss=none"]), ["coldstart"], "")
    monkeypatch.setenv("WORLD_SIZE", "8")
    pipeline._one_gpu(run.config, ["zero"], "")  # one of a launcher's processes
    run.close()


def test_trainer_never_gets_to_see_several_gpus(monkeypatch):
    import transformers
    from trl import GRPOConfig

    from specs_nb.core import SpecsError
    from specs_nb.grpo import trainer_config

    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(SpecsError, match="final: this machine has 2 GPUs"):
        trainer_config(GRPOConfig, {}, "final.trainer", output_dir="x")
