import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>", "once", "upon", "a", "time", "there", "was", "."]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A transformers directory: a random Llama, and a tokenizer without padding."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def isolated(tmp_path, monkeypatch):
    """No folder named, an empty cache, and neither hub nor package index in reach."""
    monkeypatch.delenv("FTLIB_MODEL_DIR", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)

    def hub(*arguments, **options):
        raise OSError("hub out of reach\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", hub)

    def pip(*arguments, **options):
        raise AssertionError("pip was called")

    monkeypatch.setattr("subprocess.run", pip)
    return tmp_path
