"""Finding a concept's rows with the host's real tokenizers, in front of small random encoders of its own classes."""

from __future__ import annotations

import functools
import importlib
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.aura_t5
import comfy.text_encoders.cosmos
import comfy.text_encoders.flux
import comfy.text_encoders.hidream
import comfy.text_encoders.hunyuan_image
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.hydit
import comfy.text_encoders.lumina2
import comfy.text_encoders.omnigen2
import comfy.text_encoders.pixart_t5
import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.wan
import comfy.text_encoders.z_image
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.prompt import Concept, Span, bracketed, find_word
from comfyui_elrond.nodes import host
from comfyui_elrond.nodes.concept import EncodeConcept
from comfyui_elrond.nodes.host import text

te = comfy.text_encoders


def clip(width: int = 32) -> dict[str, Any]:
    return {"num_hidden_layers": 3, "hidden_size": width, "num_attention_heads": 2, "intermediate_size": 64}


def t5(width: int = 32) -> dict[str, Any]:
    return {"num_layers": 1, "d_model": width, "num_heads": 2, "d_kv": 16, "d_ff": 64}


def llama(vocabulary: int, heads: int = 1) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


@dataclass(frozen=True)
class Encoder:
    """A text encoder as a checkpoint of its family brings it.

    Attributes:
        family: as the pack calls it.
        tokenizer: the host's class.
        model: the host's class.
        sizes: small configurations of its parts, by the name that the host has for each.
        data: what the tokenizer takes from the checkpoint.
        options: further options of the host's class.
        causal: whether no row depends on later tokens.
        streams: how many tokens' rows a word of one token has.
    """

    family: str
    tokenizer: Any
    model: Any
    sizes: dict[str, dict[str, Any]]
    data: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    causal: bool = True
    streams: int = 1


def _sentencepiece() -> torch.Tensor:
    # Gemma's and mT5's vocabularies come with their checkpoints; AuraFlow's stands in for them.
    path = Path(te.aura_t5.__file__).parent / "t5_pile_tokenizer" / "tokenizer.model"
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


SPIECE = _sentencepiece()
# The host pads SD 3's CLIP rows to the width of its T5.
WIDE = t5(4096)
ENCODERS = {
    encoder.family: encoder
    for encoder in (
        Encoder("SD1", comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel, {"clip_l": clip()}),
        Encoder(
            "SDXL",
            comfy.sdxl_clip.SDXLTokenizer,
            comfy.sdxl_clip.SDXLClipModel,
            {"clip_l": clip(), "clip_g": clip(48)},
        ),
        Encoder(
            "SD3",
            te.sd3_clip.SD3Tokenizer,
            te.sd3_clip.sd3_clip(),
            {"clip_l": clip(), "clip_g": clip(48), "t5xxl": WIDE},
            causal=False,
            streams=2,
        ),
        Encoder("Flux", te.flux.FluxTokenizer, te.flux.flux_clip(), {"clip_l": clip(), "t5xxl": t5()}, causal=False),
        Encoder("PixArt", te.pixart_t5.PixArtTokenizer, te.pixart_t5.pixart_te(), {"t5xxl": t5()}, causal=False),
        Encoder("AuraT5", te.aura_t5.AuraT5Tokenizer, te.aura_t5.AuraT5Model, {"pile_t5xl": t5()}, causal=False),
        Encoder(
            "Hydit",
            te.hydit.HyditTokenizer,
            te.hydit.HyditModel,
            {"hydit_clip": clip(), "mt5xl": t5()},
            {"mt5xl.spiece_model": SPIECE},
            causal=False,
        ),
        Encoder(
            "Lumina",
            te.lumina2.LuminaTokenizer,
            te.lumina2.te(),
            {"gemma2_2b": llama(50304)},
            {"spiece_model": SPIECE},
        ),
        Encoder("ZImage", te.z_image.ZImageTokenizer, te.z_image.te(), {"qwen3_4b": llama(151936)}),
        Encoder("QwenImage", te.qwen_image.QwenImageTokenizer, te.qwen_image.te(), {"qwen25_7b": llama(152064)}),
        Encoder(
            "HunyuanImage",
            te.hunyuan_image.HunyuanImageTokenizer,
            te.hunyuan_image.te(byt5=False),
            {"qwen25_7b": llama(152064)},
        ),
        Encoder("Omnigen2", te.omnigen2.Omnigen2Tokenizer, te.omnigen2.te(), {"qwen25_3b": llama(151936)}),
        Encoder(
            "HiDream",
            te.hidream.HiDreamTokenizer,
            te.hidream.hidream_clip(),
            {"clip_l": clip(), "clip_g": clip(48), "t5xxl": t5(), "llama": llama(128320)},
            causal=False,
        ),
        Encoder("Cosmos", te.cosmos.CosmosT5Tokenizer, te.cosmos.te(), {"t5xxl": t5()}, causal=False),
        Encoder(
            "Wan",
            te.wan.WanT5Tokenizer,
            te.wan.te(),
            {"umt5xxl": t5()},
            {"spiece_model": SPIECE},
            causal=False,
        ),
        Encoder(
            "HunyuanVideo",
            te.hunyuan_video.HunyuanVideoTokenizer,
            te.hunyuan_video.hunyuan_video_clip(),
            {"clip_l": clip(), "llama": llama(128320)},
        ),
    )
}


def qwen3(layers: int) -> dict[str, Any]:
    return {**llama(151936), "num_hidden_layers": layers}


def _lens(family: str) -> Encoder:
    module = importlib.import_module("comfy.text_encoders.gpt_oss")

    class LensTEModel(module.lens_te()):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            # The host makes these when a checkpoint is loaded.
            for part in self.modules():
                if hasattr(part, "in_features") and getattr(part, "weight", None) is None:
                    shape = getattr(part, "_orig_shape", (part.out_features, part.in_features))
                    part.weight = torch.nn.Parameter(torch.zeros(shape))

    # GPT-OSS's vocabulary comes with its checkpoint; Qwen's stands in for it.
    folder = Path(te.qwen_image.__file__).parent / "qwen25_tokenizer"
    whole = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = tokenizers.decoders.ByteLevel()
    template = module._lens_render_chat("|").split("|<|end|>")[0]
    sizes = {**llama(201088), "head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 1}
    return Encoder(
        family,
        module.LensTokenizer,
        LensTEModel,
        {},
        {"tokenizer_json": torch.frombuffer(bytearray(whole.to_str().encode()), dtype=torch.uint8)},
        {
            "gpt_oss_config": sizes,
            "selected_layers": (1, 3),
            "txt_offset": len(whole.encode(template).ids),
        },
    )


def _newer(
    module: str, tokenizer: str, sizes: dict[str, Any], model: str = "te", family: str = "", **data: Any
) -> Callable[[str], Encoder]:
    def made(name: str) -> Encoder:
        found = importlib.import_module(f"comfy.text_encoders.{module}")
        return Encoder(family or name, getattr(found, tokenizer), getattr(found, model)(), sizes, data)

    return made


# Those that ComfyUI has had since 0.3.75.
NEWER: dict[str, Callable[[str], Encoder]] = {
    "Flux2": _newer("flux", "KleinTokenizer", {"qwen3_4b": qwen3(28)}, "klein_te"),
    "Ovis": _newer("ovis", "OvisTokenizer", {"qwen3_2b": llama(151936)}),
    "Kandinsky5": _newer("kandinsky5", "Kandinsky5TokenizerImage", {"qwen25_7b": llama(152064), "clip_l": clip()}),
    "Anima": _newer("anima", "AnimaTokenizer", {"qwen3_06b": llama(151936)}),
    "LongCatImage": _newer("longcat_image", "LongCatImageTokenizer", {"qwen25_7b": llama(152064)}),
    "Ideogram4": _newer("ideogram4", "Ideogram4Tokenizer", {"qwen3vl_8b": qwen3(37)}),
    "MageFlow": _newer("mage_flow", "MageFlowTokenizer", {"qwen3vl_4b": llama(151936)}),
    "Boogu": _newer("boogu", "BooguTokenizer", {"qwen3vl_8b": llama(151936)}),
    "JoyImage": _newer("joyimage", "JoyImageTokenizer", {"qwen3vl_8b": llama(151936)}),
    "Krea2": _newer("krea2", "Krea2Tokenizer", {"qwen3vl_4b": qwen3(36)}),
    "PixelDiT": _newer(
        "pixeldit",
        "PixelDiTGemma2Tokenizer",
        {"gemma2_2b": llama(50304)},
        "pixeldit_te",
        "PixelDiT",
        spiece_model=SPIECE,
    ),
    "Lens": _lens,
}
for _name, _make in NEWER.items():
    try:
        ENCODERS[_name] = _make(_name)
    except (ImportError, AttributeError):
        # The family fixture skips it by name.
        continue
CHATTY = (
    *("ZImage", "QwenImage", "HunyuanImage", "Omnigen2", "HunyuanVideo"),
    *(name for name in NEWER if name not in ("Anima", "PixelDiT")),
)


@functools.cache
def load(family: str, embeddings: str | None = None) -> Any:
    """The encoder as a CLIP, at random weights."""
    encoder = ENCODERS[family]
    made = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(encoder.tokenizer, encoder.model),
        embedding_directory=embeddings,
        tokenizer_data=dict(encoder.data),
        model_options={
            "dtype": torch.float32,
            **{f"{k}_model_config": v for k, v in encoder.sizes.items()},
            **encoder.options,
        },
    )
    made.cond_stage_model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in made.cond_stage_model.named_parameters():
        # Pictures in prompts are not our subject, and this part is large.
        if ".visual." in name:
            continue
        if weight.ndim < 2:
            weight.data = torch.full(weight.shape, 0.0 if name.endswith("bias") else 1.0)
            continue
        weight.data = torch.zeros(weight.shape)
        # Random in its first rows and columns only: SD 3's is 4096 wide. Weak beside the embeddings, as in a trained
        # encoder: a row is first of all about its own token.
        table = "embed" in name or "shared" in name
        part = weight.data[:, :64] if table else weight.data[:64, :64]
        part.copy_(torch.randn(part.shape, generator=generator) * (1 if table else 0.3 / part.shape[1] ** 0.5))
    return made


def encode(clip: Any, prompt: str, concept: str = "", occurrence: int = 1) -> tuple[torch.Tensor, Any]:
    """(T, d) rows of a prompt and its first concept, about which the node has no doubt."""
    marked, report = EncodeConcept.execute(clip, prompt, concept, occurrence).args
    assert "warning" not in report
    tensor, memory = host.marked(marked)
    return tensor[0], memory.concepts[0]


def assert_rows(family: str, encoded: torch.Tensor, other: torch.Tensor, rows: tuple[int, ...]) -> None:
    """Another word at these rows changes them most, and none before them if the encoder is causal."""
    change = (encoded - other).norm(dim=1)
    for first, last in [(0, 77), (77, None)] if ENCODERS[family].streams == 2 else [(0, None)]:
        mine = [row - first for row in rows if row in range(len(change))[first:last]]
        assert sorted(change[first:last].topk(len(mine)).indices.tolist()) == mine
    if ENCODERS[family].causal:
        assert (change[: rows[0]] == 0).all()


@pytest.fixture(scope="module", autouse=True)
def _each_vocabulary_is_read_once() -> Iterator[None]:
    read = transformers.PreTrainedTokenizerBase.from_pretrained.__func__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "from_pretrained", classmethod(functools.cache(read)))
        yield


@pytest.fixture(params=[*ENCODERS, *(name for name in NEWER if name not in ENCODERS)])
def family(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


def usable(family: str) -> str:
    if family not in ENCODERS:
        pytest.skip(f"this host has no {family}")
    if not _tells_words_apart(family):
        pytest.skip(f"with transformers {transformers.__version__} the host's {family} tokenizer joins words")
    return family


@functools.cache
def _tells_words_apart(family: str) -> bool:
    return any("red" in token.text for token in host.EncodedPrompt(load(family), "a red dog").tokens)


def test_encoders_are_named_after_their_families() -> None:
    assert [host.family_of(load(name)) for name in ENCODERS] == [encoder.family for encoder in ENCODERS.values()]


@pytest.mark.parametrize(
    ("name", "family"),
    [("SDXLClipModel", "SDXL"), ("FluxTEModel_", "Flux"), ("PixelDiTTE_", "PixelDiT"), ("HiDreamO1TE", "HiDreamO1")],
)
def test_what_hosts_add_to_a_familys_name_is_left_out(name: str, family: str) -> None:
    assert host.family_of(SimpleNamespace(cond_stage_model=type(name, (), {})())) == family


@pytest.mark.parametrize("text", ["a photo of a {} in the park", "{}", "two cars, a {}."])
def test_another_word_changes_the_concepts_rows_most(family: str, text: str) -> None:
    encoded, concept = encode(load(family), text.format("[dog]"))
    assert len(concept.rows) == ENCODERS[family].streams * (2 if len(concept.rows) > ENCODERS[family].streams else 1)
    other, _ = encode(load(family), text.format("[cat]"))
    assert encoded.shape == other.shape
    assert_rows(family, encoded, other, concept.rows)
    stock = host.encode(load(family), text.format("dog"))[0][0][0]
    assert torch.equal(stock, encoded)


@pytest.mark.parametrize(
    ("prompt", "concept", "pieces"),
    [
        ("a chiaroscuro dog", "chiaroscuro", "chiaroscuro"),
        ("Dogs and a DOG, there", "dog", "dog"),
        ("a dog, and dogs.", "dogs", "dogs"),
        ("a red dog runs", "red  Dog", "reddog"),
        ("a (dog:1.3) runs", "dog", "dog"),
        ("in a t-shirt, really", "t-shirt", "t-shirt"),
        ("the year 1984 again", "1984", "1984"),
    ],
)
def test_awkward_words(family: str, prompt: str, concept: str, pieces: str) -> None:
    _, found = encode(load(family), prompt, concept)
    # Every stream has the whole concept and nothing else.
    assert "".join(found.tokens).lower().replace("(", "") == pieces * ENCODERS[family].streams


def test_a_word_of_several_pieces_has_their_rows(family: str) -> None:
    _, found = encode(load(family), "a [chiaroscuro] dog")
    streams = ENCODERS[family].streams
    assert len(found.rows) >= 2 * streams
    for stream in range(streams):
        rows = [row for row in found.rows if (row >= 77) == (stream == 1)] if streams == 2 else list(found.rows)
        assert rows == list(range(rows[0], rows[0] + len(rows)))


def test_one_of_several_rows(family: str) -> None:
    whole = encode(load(family), "a [chiaroscuro] dog")[1]

    def row(number: int) -> Any:
        marked = EncodeConcept.execute(load(family), "a [chiaroscuro] dog", "", 1, number).args[0]
        return host.marked(marked)[1].concepts[0]

    for place in range(len(whole.rows)):
        assert row(place + 1) == Concept("chiaroscuro", whole.rows[place : place + 1], whole.tokens[place : place + 1])
    with pytest.raises(ElrondError, match=f"'chiaroscuro' has {len(whole.rows)} rows, and no row 99"):
        row(99)


def test_a_repeated_word_is_the_first_unless_asked(family: str) -> None:
    first = encode(load(family), "a dog, a cat, a dog", "dog")[1]
    second = encode(load(family), "a dog, a cat, a dog", "dog", 2)[1]
    assert first == encode(load(family), "a [dog], a cat, a dog")[1]
    assert second == encode(load(family), "a dog, a cat, a [dog]")[1]
    assert second.rows[0] > first.rows[-1] or ENCODERS[family].streams > 1
    encoded = encode(load(family), "a dog, a cat, a [dog]")[0]
    assert_rows(family, encoded, encode(load(family), "a dog, a cat, a [cow]")[0], second.rows)
    with pytest.raises(ElrondError, match="2 times, so occurrence 3"):
        encode(load(family), "a dog, a cat, a dog", "dog", 3)


@pytest.mark.parametrize("family", CHATTY)
def test_the_template_of_a_chat_model_is_not_the_prompt(family: str) -> None:
    usable(family)
    for word in ("user", "describe", "assistant", "system", "im_start"):
        with pytest.raises(ElrondError, match="is not in the prompt 'a red dog'"):
            encode(load(family), "a red dog", word)
    text = "the user of a {} image"
    encoded, found = encode(load(family), text.format("[color]"))
    assert_rows(family, encoded, encode(load(family), text.format("[shape]"))[0], found.rows)


@pytest.mark.parametrize("family", [*CHATTY, "Hydit"])
def test_scripts_without_spaces(family: str) -> None:
    usable(family)
    encoded, found = encode(load(family), "公园里的[狗]在跑")
    assert found.tokens == ("狗",)
    assert_rows(family, encoded, encode(load(family), "公园里的[猫]在跑")[0], found.rows)


@pytest.mark.parametrize("family", ["SD1", "SDXL"])
def test_prompts_of_several_chunks(family: str) -> None:
    text = "very " * 80 + "big {} here"
    encoded, found = encode(load(family), text.format("[dog]"))
    # 75 words a chunk, after its start token.
    assert found.rows == (77 + 1 + 6,)
    assert_rows(family, encoded, encode(load(family), text.format("[cat]"))[0], found.rows)
    # A word cut in two by the end of a chunk.
    _, found = encode(load(family), "very " * 74 + "[chiaroscuro]")
    assert found.rows[:2] == (75, 78)
    assert "".join(found.tokens) == "chiaroscuro"


def test_textual_inversions(tmp_path: Path) -> None:
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    for name, sign in (("mine", 1), ("yours", -1)):
        safetensors.torch.save_file({"emb_params": sign * vectors}, tmp_path / f"{name}.safetensors")
    clip = load("SD1", str(tmp_path))
    encoded, found = encode(clip, "a embedding:mine dog, a dog", "dog")
    assert found.rows == (5,)
    assert_rows("SD1", encoded, encode(clip, "a embedding:mine cat, a dog", "cat")[0], found.rows)
    encoded, found = encode(clip, "a dog by embedding:mine here", "embedding:mine")
    assert found.rows == (4, 5, 6)
    assert_rows("SD1", encoded, encode(clip, "a dog by embedding:yours here", "embedding:yours")[0], found.rows)


# Words of one to many tokens, of several scripts.
WORDS = (
    *("dog", "cat", "boy", "3", "poster", "dogs", "cathedral", "chiaroscuro", "sfumatos", "pompadours", "wolf pack"),
    *("naïve", "fiancé", "jalapeño", "smörgåsbord", "crème brûlée", "แมว", "ช้าง", "กระต่าย", "猫", "鳥"),
)


@pytest.mark.parametrize(
    ("prompt", "concept", "text"),
    [
        ("1girl, solo, a [girl] smiling", "", "girl"),
        ("1girl, a girl", "girl", "girl"),
        ("long_hair, red [hair]", "", "hair"),
        ("source_anime, an [anime] poster", "", "anime"),
        ("[dog]s and a dog", "", "dogs"),
        ("(masterpiece:1.2), [2] dogs", "", "2"),
        ("((a) big [dog]:1.2), dog (b:0.8)", "", "dog"),
        (r"\(dog\) [dog] \(dog\)", "", "dog"),
        ("a [(dog:1.3)], a dog", "", "dog"),
        ("cafe\u0301 [cafe\u0301]", "", "café"),
        ("a cafe\u0301", "café", "café"),
        ("dog's 'dog' \"[dog]\" dog's", "", "dog"),
    ],
)
def test_the_rows_change_with_the_word_at_that_place(family: str, prompt: str, concept: str, text: str) -> None:
    """And not with any other: other words of as many tokens are put there."""
    encoded, found = encode(load(family), prompt, concept)
    plain, (span,) = (prompt, [find_word(prompt, concept)]) if concept else bracketed(prompt)
    for word in (word for word in WORDS if word != text):
        try:
            other, same = encode(load(family), f"{plain[: span.start]}[{word}]{plain[span.stop :]}")
        except ElrondError:
            # This encoder does not know its letters.
            continue
        if same.rows == found.rows:
            break
    assert_rows(family, encoded, other, found.rows)
    read = unicodedata.normalize("NFKC", "".join(found.tokens)).lower().strip("(\"'")
    assert read == text * ENCODERS[family].streams or family not in ("SD1", "SDXL", "SD3", "Flux")


def test_ligatures(family: str) -> None:
    """Some tokenizers read them as the letters that they join."""
    found = encode(load(family), "a fish, a [\ufb01sh] swims")[1]
    assert encode(load(family), "a cat, a \ufb01sh swims", "fish")[1].tokens == found.tokens
    assert "fish" in unicodedata.normalize("NFKC", "".join(found.tokens))
    if family in ("Flux", "PixArt", "Cosmos"):
        assert found.rows == encode(load(family), "a fish, a [fish] swims")[1].rows


def test_one_place_in_both_of_sd3s_streams() -> None:
    for prompt in ("long_hair, red [hair]", "source_anime, an [anime] poster"):
        _, found = encode(load("SD3"), prompt)
        assert found.tokens[0] == found.tokens[1]
    assert encode(load("SD1"), "1girl, solo, a [girl] smiling")[1].rows == (7,)


@pytest.mark.parametrize("family", ["SD1", "SDXL", "ZImage", "QwenImage", "Omnigen2"])
def test_thai_has_no_spaces(family: str) -> None:
    usable(family)
    _, found = encode(load(family), "ภาพของ[แมว]สีดำ")
    assert encode(load(family), "ภาพของแมวสีดำ", "แมว")[1] == found
    assert "แมว" in "".join(found.tokens)


@pytest.mark.parametrize("family", ["Flux", "SD3"])
def test_a_word_that_the_encoder_has_no_token_for(family: str) -> None:
    with pytest.raises(ElrondError, match="t5xxl does not read '狗' in the prompt: it has no token for it"):
        encode(load(family), "公园里的[狗]在跑")


def test_a_word_beyond_the_end_of_what_is_read() -> None:
    with pytest.raises(ElrondError, match=r"does not read 'dog' in the prompt: .* or stops before it"):
        encode(load("HiDream"), "very " * 200 + "[dog]")
    # The end that is cut off differs with the word that is put in its place.
    encoded, found = encode(load("HiDream"), "very big [dog]" + " very" * 200)
    assert found.tokens == ("dog",)
    assert_rows("HiDream", encoded, encode(load("HiDream"), "very big [cat]" + " very" * 200)[0], found.rows)


@pytest.mark.parametrize("family", ["SD1", "SDXL", "SD3", "Flux", "PixArt", "HiDream"])
def test_embeddings_of_another_width_have_no_rows(family: str, tmp_path: Path) -> None:
    for name, count in (("wide", 1), ("wider", 3)):
        vectors = torch.ones(count, 40 + count)
        safetensors.torch.save_file({"emb_params": vectors}, tmp_path / f"{name}.safetensors")
    made = load(family, str(tmp_path))
    for prompt in ("embedding:wide style, a [{}]", "embedding:wider embedding:wide style, a [{}], a dog"):
        encoded, found = encode(made, prompt.format("dog"))
        assert set(found.tokens) == {"dog"} and len(found.rows) == ENCODERS[family].streams
        assert_rows(family, encoded, encode(made, prompt.format("cat"))[0], found.rows)
    with pytest.raises(ElrondError, match=r"does not read 'embedding:wide' in the prompt: .* leaves it out"):
        encode(made, "a dog by [embedding:wide]")
    assert family not in ("SD1", "SDXL") or encode(made, "embedding:wide style, a [dog]")[1].rows == (4,)


def test_an_embedding_that_one_of_two_encoders_reads(tmp_path: Path) -> None:
    """SDXL's encoders lie side by side: a word has the rows of both."""
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    safetensors.torch.save_file({"emb_params": vectors}, tmp_path / "narrow.safetensors")
    made = load("SDXL", str(tmp_path))
    encoded, found = encode(made, "embedding:narrow style, a [dog] runs")
    other = encode(made, "embedding:narrow style, a [cat] runs")[0]
    assert found.rows == (4, 6)
    change = (encoded - other).abs()
    assert change[:4].max() == 0 and change[4, :32].max() == 0
    assert change[4, 32:].max() > 0 and change[6, :32].max() > 0
    assert encode(made, "a dog by [embedding:narrow]")[1].rows == (4, 5)


@pytest.mark.parametrize("family", ["SD1", "SDXL", "SD3", "Flux"])
def test_a_word_is_not_looked_for_in_the_name_of_an_embedding(family: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({"emb_params": torch.ones(2, 32)}, tmp_path / "bad-hands.safetensors")
    for made in (load(family), load(family, str(tmp_path))):
        _, found = encode(made, "embedding:bad-hands, hands", "hands")
        assert found == encode(made, "embedding:bad-hands, [hands]")[1]
        assert set(found.tokens) == {"hands"}


def test_a_model_that_reads_the_prompt_itself_is_refused() -> None:
    try:
        module = importlib.import_module("comfy.text_encoders.hidream_o1")
    except ImportError:
        pytest.skip("this host has no HiDreamO1")
    made = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(module.HiDreamO1Tokenizer, module.HiDreamO1TE))
    with pytest.raises(ElrondError, match="reads the prompt inside its diffusion model"):
        encode(made, "a [dog]")


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_rows_of_another_word_are_doubted(family: str, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = host.EncodedPrompt(load(family), "a big old dog in the park")
    right = encoded.concept(Span(10, 13))
    assert encoded.doubt([right]) == ""
    wrong = replace(right, rows=tuple(row + shift for row in right.rows))
    # As if the encoder had its rows elsewhere.
    rows = host.EncodedPrompt._rows
    monkeypatch.setattr(host.EncodedPrompt, "_rows", lambda self, *given: [row + shift for row in rows(self, *given)])
    assert "other rows change" in encoded.doubt([wrong])


def test_a_word_without_weight_is_doubted() -> None:
    report = EncodeConcept.execute(load("SD1"), "a ([dog]:0) in the park", "", 1).args[1]
    assert "may have no weight" in report


@pytest.mark.parametrize(("clips", "t5"), [(True, False), (False, True)])
def test_sd3_without_one_of_its_encoders(clips: bool, t5: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Encoder(
        "SD3",
        te.sd3_clip.SD3Tokenizer,
        te.sd3_clip.sd3_clip(clip_l=clips, clip_g=clips, t5=t5),
        ENCODERS["SD3"].sizes,
        causal=clips,
    )
    monkeypatch.setitem(ENCODERS, "SD3", part)
    made = load.__wrapped__("SD3")
    encoded, found = encode(made, "a photo of a [dog] in the park")
    assert len(found.rows) == 1
    assert_rows("SD3", encoded, encode(made, "a photo of a [cat] in the park")[0], found.rows)


def test_tokenizers_of_newer_hosts() -> None:
    class Plain:
        def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
            return " ".join(f"<{token}>" for token in token_ids)

    class Wrapper:
        tokenizer = Plain()

        def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
            raise AssertionError("It leaves tokens out.")

    for own in (Plain(), Wrapper()):
        wrapper = SimpleNamespace(clip="clip_x", clip_x=SimpleNamespace(tokenizer=own))
        assert text.decoder_of(wrapper, "x")([1, 2]) == "<1> <2>"
    with pytest.raises(ElrondError, match="does not know how this CLIP cuts text"):
        text.decoder_of(SimpleNamespace(clip_x=SimpleNamespace(tokenizer=object())), "x")
