"""What test_launch.py runs under launchers and without one: three steps of DPO and GRPO with the same batch
of 8 altogether, from the same data

With `pieces` as second word: DPO and GRPO of all weights under FSDP2; with `shipped`: a step of each with an
adapter on bfloat16 weights, as `fsdp2.yaml` has it. accelerate turns FSDP2 on for GPUs alone, so it is told
that gloo's processes are such. With `deepspeed` as third word the same under DeepSpeed."""

import random
import sys
from pathlib import Path

from specs_nb import world
from specs_nb.coldstart import train_coldstart
from specs_nb.core import ColdStartStage, GRPOStage, QuestionSampling, Validation
from specs_nb.engines.models import tokenizer_of
from specs_nb.engines.ranks import is_main, leave_group, rank, save_trained
from specs_nb.formats import CORRUPTIONS, FORMATS
from specs_nb.grpo import grpo_trainer, watch_held_out, watcher
from specs_nb.pairs import make_pairs, write_pairs

FORMAT, ROWS, N = FORMATS["think_answer"], world.rows("train", 24), rank()[1]


def same(steps=3, batch=8, **more):
    "The same settings for any number of processes; SGD, whose step is the gradient and nothing else"
    return dict(
        per_device_train_batch_size=batch // N,
        max_steps=steps,
        gradient_checkpointing=False,
        lr_scheduler_type="constant",
        save_strategy="no",
        optim="sgd",
        max_grad_norm=0.0,
        learning_rate=0.01,
        report_to="none",
        **more,
    )


def dpo(out, loss, lora=False, load=None, **more):
    good = [[(f"There are {i % 5} shapes that matter here.", r["answer"])] for i, r in enumerate(ROWS)]
    path = out / f"pairs-{rank()[0]}.parquet"
    write_pairs(make_pairs(ROWS, good, good, FORMAT, list(CORRUPTIONS)[:3], 24, 0), path)
    stage = ColdStartStage(loss=loss, lora=lora, lora_rank=4, trainer=same(**more))
    train_coldstart("tiny", path, out, stage, **(load or {}))


def canned(trainer):
    """Completions that follow from the question and the number within the group, whoever asks: sampling
    differs between ranks, the rest should not. In validation there is one answer to a question"""
    tok, k = tokenizer_of(trainer.processing_class), trainer.num_generations
    texts = [FORMAT.render("Look.", a) for a in ("1", "2", "yes", "no", "red")] + [
        "2",
        "It is 1. Answer: 1",
        "<think>no end",
        "<answer>3</answer>",
    ]
    ids = [tok(t)["input_ids"] + [tok.convert_tokens_to_ids("<|im_end|>")] for t in texts]

    def given(prompt_ids, *_):
        first, groups = rank()[0] * len(prompt_ids), k if trainer.model.training else 1
        return [
            random.Random(f"{list(map(int, p))}/{(first + i) % groups}").choice(ids)
            for i, p in enumerate(prompt_ids)
        ], None

    return given


def grpo(out, steps=3, given=canned, lora=False, load=None, held=(), chosen=None, **more):
    keys = same(steps, num_generations=4, max_completion_length=64, **more)
    stage = GRPOStage(steps=steps, lora=lora, lora_rank=4, trainer=keys, **(chosen or {}))
    rates = {r["id"]: i / len(ROWS) for i, r in enumerate(ROWS)}
    trainer = grpo_trainer("tiny", ROWS, out, stage, FORMAT, rates=rates, **(load or {}))
    if given:
        trainer._generate_single_turn = given(trainer)
    if held:
        watch_held_out(trainer, held, stage, FORMAT)
    trainer.add_callback(watcher("zero", steps, out / "history.json", ()))
    trainer.train()
    save(trainer, out / "model")


def save(trainer, folder):
    "`save_trained`, after a look at whether the weights really lie in pieces, where they should"
    from torch.distributed.tensor import DTensor

    if sys.argv[3:]:
        assert trainer.is_deepspeed_enabled, "it was not DeepSpeed"
    elif sys.argv[2:]:
        assert trainer.is_fsdp_enabled, "it was not FSDP2"
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
    save_trained(trainer, folder)


def pretend_gpus():
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    init = PartialState.__init__

    def told(self, *args, **kw):
        init(self, *args, **kw)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = told


def in_pieces(out):
    "The weights of each layer spread over the processes; the same numbers are expected as from one process"
    dpo(out / "dpo", "dpo")
    grpo(out / "grpo")


def as_shipped(out):
    "A step with a float32 adapter on bfloat16 weights; GRPO's answers are written by the model in pieces"
    how = dict(lora=True, load=dict(dtype="bfloat16"), bf16=True)
    dpo(out / "dpo", "dpo+sft", steps=1, **how)
    grpo(out / "grpo", steps=1, given=None, **how)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    if not is_main():
        sys.stdout = sys.stderr
    if sys.argv[2:]:
        from specs_nb import coldstart

        if not sys.argv[3:]:
            pretend_gpus()
        coldstart.save_trained = save
        dict(pieces=in_pieces, shipped=as_shipped)[sys.argv[2]](out)
        leave_group()
        sys.exit()
    dpo(out / "dpo", "dpo")
    # the SFT term is a mean over the tokens of a micro-batch: two of 4 on one process are what two processes
    # have
    dpo(out / "dpo+sft", "dpo+sft", **(dict(batch=4, gradient_accumulation_steps=2) if N == 1 else {}))
    grpo(out / "grpo")
    # groups that are replaced: a round of one question is four answers, two of each rank
    chosen = dict(sampling=QuestionSampling(by_pass_rate=True, refill=2.0), validate=Validation(every=2))
    grpo(out / "chosen", held=world.rows("train", 5, start=1000), chosen=chosen)
    leave_group()
