"""Tokenizers trained on the spot, and models of a few thousand random weights."""

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_bpe(corpus, special=(), size=300, around=None, pre_tokenizer=None):
    """A tokenizer such as GPT-2's; ``around`` is where a text stands, as "<s> $A"."""
    made = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizer or by_bytes
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(corpus, trainer)
    if around:
        ids = [(token, index) for index, token in enumerate(special)]
        made.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=ids
        )
    return made


def tiny_llama(vocab_size, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(sizes | changes)))


def tiny_bert(vocab_size, **sizes):
    return BertModel(BertConfig(vocab_size=vocab_size, **sizes)).eval()


def word_piece(folder, words, **options):
    """BERT's tokenizer with a token for each word."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return BertTokenizer(str(folder / "vocab.txt"), **options)
