"""Small random models of the real architectures, and a tokenizer smaller than their embedding."""
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

ROWS, TOKENS = 160, 150  # embedding rows, tokenizer ids: ids 150..159 have a row and no token
SHAPE = {"vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}


def tiny_model(family: str, tied: bool = True, seed: int = 0):
    """A random model with attention that is far from uniform, so that a wrong mask or position shows."""
    config, cls = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
                   "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    extra = {"head_dim": 8} if family == "qwen3" else {}
    torch.manual_seed(seed)
    model = cls(config(**SHAPE, tie_word_embeddings=tied, initializer_range=0.15, **extra))
    model.set_attn_implementation("sdpa")
    return model.eval()


def tiny_tokenizer(chat: bool = True):
    """Every printable ASCII character is a token, ids 0..TOKENS-1; padding equals end-of-sequence."""
    vocab = {"<unk>": 0, "<eos>": 1}
    for ch in map(chr, [10, *range(32, 127)]):
        vocab[ch] = len(vocab)
    while len(vocab) < TOKENS:
        vocab[f"<extra{len(vocab)}>"] = len(vocab)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>",
                                   clean_up_tokenization_spaces=False)
    if chat:
        fast.chat_template = ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
                              "{% if add_generation_prompt %}[assistant]{% endif %}")
    return fast


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A saved tiny Qwen2 with a chat tokenizer, as --model takes it."""
    path = tmp_path_factory.mktemp("model") / "qwen2"
    tiny_model("qwen2").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
