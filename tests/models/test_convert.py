import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlib.models import convert

gguf = pytest.importorskip("gguf", reason="converting takes the extra `models`")


def write_gguf(path, state):
    """Write a one-layer Llama in GGUF, as other programs do."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<e>", "a", "b", "ab", "c", "abc", "e", "f"])
    writer.add_token_types([3, 1, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in state.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_state():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    block = {
        "attn_q": (64, 64),
        "attn_k": (64, 64),
        "attn_v": (64, 64),
        "attn_output": (64, 64),
        "ffn_gate": (96, 64),
        "ffn_up": (96, 64),
        "ffn_down": (64, 96),
        "attn_norm": (64,),
        "ffn_norm": (64,),
    }
    state = {f"blk.0.{name}.weight": draw(*shape) for name, shape in block.items()}
    return state | {
        "token_embd.weight": draw(8, 64),
        "output_norm.weight": draw(64),
        "output.weight": draw(8, 64),
    }


def test_gguf_becomes_a_transformers_directory(tmp_path):
    state = random_state()
    write_gguf(tmp_path / "model.gguf", state)
    folder = tmp_path / "out"
    folder.mkdir()
    convert.convert_gguf(tmp_path / "model.gguf", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    saved = model.state_dict()
    for ours, theirs in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    ]:
        assert torch.equal(saved[ours], state[theirs].bfloat16())
    assert tokenizer("abca").input_ids == [5, 1]
