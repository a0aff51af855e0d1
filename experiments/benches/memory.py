"""Memory of training by a formula, checked against what the toy model keeps."""
import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from experiments.benches.tools import report, saved_bytes
from helpers import common, training

ROOT = Path(__file__).resolve().parent.parent.parent

QWEN = {"Qwen2.5-1.5B": Qwen2Config(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                                    num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True),
        "Qwen3-8B": Qwen3Config(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                                num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)}


def sizes(c) -> tuple[int, int, int, int, int]:
    """D, Q, K, I and L of a Qwen2 or Qwen3: widths of the model, its queries, its keys, its feed-forward layers;
    its blocks."""
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return (c.hidden_size, c.num_attention_heads * head, c.num_key_value_heads * head, c.intermediate_size,
            c.num_hidden_layers)


def parameters(c) -> tuple[int, int]:
    """Of the root that is gathered for a whole pass (embedding, last norm, head) and of one block."""
    D, Q, K, I, _ = sizes(c)
    # norms of a query and a key; or biases
    extra = 2 * Q // c.num_attention_heads if c.model_type == "qwen3" else Q + 2 * K
    return c.vocab_size * D * (1 if c.tie_word_embeddings else 2) + D, 2 * D * Q + 2 * D * K + 3 * D * I + 2 * D + extra


def block_bytes(c, size: int) -> int:
    """What autograd keeps of one block for each token. size: bytes of an element, 2 or 4;
    norms keep float32 as well."""
    D, Q, K, I, _ = sizes(c)
    norm = 4 + size  # its input, converted, and its result before the weight
    rotated, heads = size * (Q + K), 4 * c.num_attention_heads  # as SDPA keeps them, and its sum for each head
    if c.model_type == "qwen3":  # a norm on each query and key
        rotated, heads = rotated + norm * (Q + K), heads + 4 * (c.num_attention_heads + c.num_key_value_heads)
    # two norms and what they give; queries and keys; values, SDPA's result and four of the feed-forward layer
    return 2 * D * (norm + size) + rotated + size * (K + Q + 4 * I) + heads + 8


def activation_bytes(c, size: int, tokens: int, responses: int, checkpointed: bool) -> int:
    """Kept between forward and backward of a micro-batch of so many padded tokens, so many of them in responses."""
    D, *_, L = sizes(c)
    return tokens * (L * (size * D if checkpointed else block_bytes(c, size)) + D * (4 + size)) + responses * D * size


def peak_bytes(c, processes: int, tokens: int, checkpointed: bool, sharded: bool = True) -> dict[str, float]:
    """GB of one process of train_grpo.py in bfloat16, by part. sharded=False: if each process held a whole model.

    gathered: weights and their gradients in bfloat16 and the buffer that sums those in float32;
    the reference's root stays.
    head: logits, log-probabilities, their gradient and what the entropy takes, 18 bytes in all.
    """
    root, block = parameters(c)
    P = root + sizes(c)[-1] * block
    parts = {"states": P * (16 + 2) / (processes if sharded else 1), "actor": 2 * P,
             "gathered": sharded * ((2 + 2 + 4) * (root + block) + 2 * root),
             "activations": activation_bytes(c, 2, tokens, tokens, checkpointed)
                            + checkpointed * tokens * block_bytes(c, 2),
             "head": training.HEAD_ROWS * c.vocab_size * 18}
    return {k: round(v / 1e9, 1) for k, v in (parts | {"all": sum(parts.values())}).items()}


def main(args: argparse.Namespace) -> None:
    folder = ROOT / "toy/sums_model"
    rows = [{"prompt_ids": [5] * 100, "response_ids": [6] * 400}] * 2
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
        for checkpointed in (False, True):
            with common.checkpointed(model, checkpointed):
                kept = saved_bytes(model, training.response_logprobs, model, rows)
            report(f"activations_{str(dtype)[6:]}" + "_checkpointed" * checkpointed, kept,
                   activation_bytes(model.config, dtype.itemsize, 1000, 800, checkpointed), "bytes",
                   reference_is="the formula")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    optimizer = training.make_optimizer(model, argparse.Namespace(lr=1e-5))
    training.response_logprobs(model, rows)[0].sum().backward()
    states = 2 * sum(p.nbytes for p in model.parameters())  # weights and gradients
    training.apply_gradients(model, optimizer, 1.0)
    states += sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    root, block = parameters(model.config)
    report("states", states, 16 * (root + model.config.num_hidden_layers * block), "bytes", reference_is="the formula")
    for name, processes, sharded in (("Qwen2.5-1.5B", 1, True), ("Qwen2.5-1.5B", 4, True), ("Qwen2.5-1.5B", 4, False),
                                     ("Qwen3-8B", 8, True), ("Qwen3-8B", 8, False)):
        for checkpointed in (False, True):
            print(json.dumps({"measure": "peak_computed", "model": name, "processes": processes, "sharded": sharded,
                              "checkpointed": checkpointed, "unit": "GB",
                              **peak_bytes(QWEN[name], processes, 16384, checkpointed, sharded)}))
