"""Qwen2.5-VL's vision tower on one picture, all windows at once against one call a window: time and calls.

    python bench/tower.py [--layers 8] [--width 320] [--pixels 1008]

Without a card the tower is narrower than Qwen2.5-VL's (32 layers of 1,280); on one it has the real shape."""

import argparse
import time

import torch

import specs_nb.engines.tower as tower


def attention_calls(run):
    "How often a run calls attention"
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kw):
        calls.append(1)
        return attention(*args, **kw)

    torch.nn.functional.scaled_dot_product_attention = counted
    try:
        run()
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
    return len(calls)


def main():
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    card = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--layers", type=int, default=32 if card else 8)
    p.add_argument("--width", type=int, default=1280 if card else 320)
    p.add_argument("--pixels", type=int, default=1008, help="of a side of the picture")
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    config = Qwen2_5_VLVisionConfig(
        depth=a.layers, hidden_size=a.width, num_heads=16, intermediate_size=2 * a.width, out_hidden_size=512
    )
    config.fullatt_block_indexes = list(range(7, a.layers, 8))
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    device = "cuda" if card else "cpu"
    model = Qwen2_5_VisionTransformerPretrainedModel(config).to(device, torch.bfloat16 if card else None)
    side = a.pixels // 14
    grid = torch.tensor([[1, side, side]], device=device)
    patches = torch.randn(side**2, 3 * 2 * 14 * 14, device=device, dtype=model.dtype)

    def run():
        with torch.no_grad():
            return model(patches, grid_thw=grid).pooler_output

    def set_to(name):
        for layer in model.modules():
            if hasattr(layer, "qkv"):
                layer.config._attn_implementation = name

    tower.batch_windows(model)
    seconds, calls, outs = {"sdpa": [], tower.NAME: []}, {}, {}
    for round_ in range(a.rounds + 1):
        for name in seconds:  # in turn, since other work on the machine comes and goes
            set_to(name)
            clock = time.perf_counter if card else time.process_time
            start = clock()
            outs[name] = run()
            if card:
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(clock() - start)
    for name in seconds:
        set_to(name)
        calls[name] = attention_calls(run)
    apart, together = (sorted(s)[len(s) // 2] for s in seconds.values())
    error = float((outs["sdpa"] - outs[tower.NAME]).norm() / outs["sdpa"].norm())
    where = torch.cuda.get_device_name(0) if card else "CPU"
    print(
        f"{where}, {a.layers} layers of {a.width}, {a.pixels}×{a.pixels} pixels, relative error {error:.1e}"
    )
    print(f"one call a window: {apart:.3f} s, {calls['sdpa']} calls")
    print(
        f"all windows at once: {together:.3f} s, {calls[tower.NAME]} calls, {together / apart:.2f} of the"
        " time"
    )
    return dict(card=where, apart=apart, together=together, calls=calls, error=error)


if __name__ == "__main__":
    main()
