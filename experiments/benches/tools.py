"""What the measures share: clocks, bytes that autograd keeps, one JSON line per measure."""
import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM, Qwen2Config


def random_qwen2(args: argparse.Namespace, device: torch.device):
    """Random weights. On a CPU a small model in which the head holds about 15 % of the multiplications, as it does in
    Qwen2.5-1.5B; on a GPU the shape of Qwen2.5-1.5B itself."""
    torch.manual_seed(0)
    shape = {"vocab_size": 6144, "hidden_size": 256, "intermediate_size": 1472, "num_hidden_layers": 6,
             "num_attention_heads": 4}
    if device.type == "cuda":
        shape = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                 "num_attention_heads": 12}
    config = Qwen2Config(**shape, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def clock() -> float:
    """Seconds. Those of this process alone where a CPU is used with one thread: others on the machine do not count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.process_time()


def timed(function, *args) -> float:
    start = clock()
    function(*args)
    return clock() - start


def saved_bytes(model, function, *args) -> int:
    """Largest number of bytes that autograd keeps alive for a backward at any time:
    distinct storages, without the model's."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    users, live, peak = {}, 0, 0

    class Saved:  # autograd holds it for as long as it needs the tensor
        def __init__(self, t: torch.Tensor):
            nonlocal live, peak
            self.t, self.key, self.size = t, t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
            if self.key not in own:
                live += 0 if users.get(self.key) else self.size
                users[self.key] = users.get(self.key, 0) + 1
                peak = max(peak, live)

        def __del__(self):
            nonlocal live
            if self.key not in own:
                users[self.key] -= 1
                live -= 0 if users[self.key] else self.size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.t):
        function(*args)
    return peak


def report(measure: str, ours: float, reference: float, unit: str, **facts) -> None:
    print(json.dumps({"measure": measure, "ours": ours, "reference": reference, "ratio": round(reference / ours, 3),
                      "unit": unit, **facts}), flush=True)
