"""pretrained.py and families.py: foreign weights in and out. The oracles are transformers, and a round trip."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ar2diff
import fast
import pretrained
import sample
import train
from checkpoint import load, load_model, save
from cost import count_params
from data import text_file, tokenizer_json
from data.tokenizer import get_tokenizer
from draws import forbidden_ids, noise_tokens
from model import ADDED_BY_CONVERSION, ModelConfig, Transformer
from pretrained import read_folder, write_folder

transformers = pytest.importorskip("transformers")
from eval import parity  # noqa: E402

FAMILIES = {"gpt2": "gpt2", "llama": "llama 3: grouped, scaled rope"}
FAMILIES |= {"qwen2": "qwen2: qkv bias, tied", "qwen3": "qwen3: qk norm, head_dim"}
EOS = 259  # <|endoftext|> in the tiny tokenizer, the last of its ids


def tiny_tokenizer() -> str:
    pieces = [*(bytes([i]) for i in range(256)), b"th", b"the", b" the", b""]
    return json.dumps(tokenizer_json.byte_level_json(pieces, {EOS: "<|endoftext|>"}, split_words=True))


def source(folder: Path, family: str, tokenizer: bool = True, **settings):
    """A folder as transformers writes it, with 300 rows for a tokenizer of 260 ids; and transformers' model of it."""
    theirs = parity.build(FAMILIES.get(family, family), folder, **dict(eos_token_id=EOS) | settings)
    if tokenizer:
        (folder / "tokenizer.json").write_text(tiny_tokenizer(), encoding="utf-8")
    return theirs


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """(a folder, what transformers makes of it), one of each family. Not to be written to."""
    folder = tmp_path_factory.mktemp(request.param) / "source"
    return folder, source(folder, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "source"
    source(folder, "llama")
    return folder


@pytest.fixture
def copy(llama, tmp_path, monkeypatch):
    """A folder that may be damaged, as `source` in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "source")
    return Path("source")


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def ids(*shape: int, below: int = EOS) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(1))


# Logits


@pytest.mark.parametrize("case", parity.CASES)
def test_logits_and_greedy_texts_are_those_of_transformers(case):
    found = parity.measure(case)
    assert found["relative"] <= parity.LIMIT and found["greedy_same"] == parity.GREEDY, found
    assert found["half_relative"] > 10 * found["relative"]  # rounding is told apart from what is found here


def test_old_logits_are_bit_equal_with_and_without_the_new_rows(made):
    """The same tensors, once with the rows that the source has and once with ours behind them."""
    grown = read_folder(made[0]).model
    rows = 300
    settings = asdict(grown.cfg) | dict(vocab_size=rows)
    weights = {n: t[:rows] if n in ("tok.weight", "head.weight") else t for n, t in grown.state_dict().items()}
    small = pretrained.assemble(ModelConfig(**settings), weights)
    text = ids(2, 24)
    with torch.no_grad():
        before, after = small(text[:, :0], text), grown(text[:, :0], text)
    assert grown.cfg.vocab_size == 384 and torch.equal(before[..., :EOS], after[..., :EOS])


def test_what_is_said_of_text_moves_by_no_more_than_the_docstring_says():
    """n new rows at the mean of V: each is at most 1 / V likely, whatever the state that is read out."""
    torch.manual_seed(0)
    m = ModelConfig(vocab_size=200, n_ordinary=160, pad_id=160, sep_id=161, mask_id=162, block_size=4)
    table = torch.randn(200, 16)
    pretrained._fill_reserved(table, 160, m)
    probability = (torch.randn(1000, 16) * 3 @ table.T).softmax(-1)
    assert (probability[:, 160:] <= 1 / 160).all() and (probability[:, :160].sum(-1) >= 1 - 40 / 160).all()


def test_reserved_rows_start_as_documented(made):
    model = read_folder(made[0]).model
    m = model.cfg
    assert (m.n_ordinary, m.pad_id, m.sep_id, m.mask_id, m.eos_id) == (260, 260, 261, 262, EOS)
    old = load_file(made[0] / "model.safetensors")
    old = next(t for name, t in old.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
    table, mean = model.tok.weight.detach(), old[:260].double().mean(0).float()
    assert torch.equal(table[m.pad_id], old[EOS])  # pad ends a text, as eos did
    assert torch.equal(table[:260], old[:260]) and torch.equal(table[263:300], old[263:300])
    for i in (m.sep_id, m.mask_id, 300, 383):
        torch.testing.assert_close(table[i], mean)


def test_neither_eos_nor_rows_beyond_the_tokenizer_are_drawn_or_sampled(llama):
    m = read_folder(llama).model.cfg
    assert set(forbidden_ids(m, "cpu").tolist()) == {EOS, *range(261, 384)}
    drawn = noise_tokens(torch.linspace(0, 1 - 1e-7, 5000), m)
    assert set(drawn.tolist()) == set(range(259)) | {m.pad_id}


# The way in and out, by the commands


def convert_train_sample_export(family: str, monkeypatch, capsys) -> None:
    theirs = source(Path("source"), family)
    ar2diff.main(["--init_from=source", "--out_dir=start", "--target_length=12", "--block_size=40", "--check"])
    said = capsys.readouterr().out
    assert "verdict: sound" in said and "FAIL" not in said and said.count("ok  ") == 10
    Path("text.txt").write_text("the cat sat on the mat and the dog on the log\n" * 40)
    text_file.main(
        ["--input=text.txt", "--name=mine", "--tokenizer=start/tokenizer.json", "--target_length=12", "--block_size=32"]
    )
    held_out = ["--init_from=source", "--out_dir=start", "--overwrite", "--block_size=40", "--check"]
    with pytest.raises(ValueError, match="has targets of 12: say --target_length"):
        ar2diff.main([*held_out, "--data=out/data/mine"])
    ar2diff.main([*held_out, "--data=out/data/mine", "--target_length=12"])
    assert capsys.readouterr().out.count("ok  ") == 10
    common = ["--max_steps=20", "--batch_size=4", "--eval_batches=1", "--sample_interval=0", "--device=cpu"]
    last = train.main(["--init_from=start/ckpt.pt", "--data=out/data/mine", "--out_dir=adapted", *common])
    first = json.loads(Path("adapted/log.jsonl").read_text().splitlines()[0])
    assert last["step"] == 20 and last["loss"] < first["loss"] - 1
    ar2diff.main(["--init_from=source", "--out_dir=ar", "--paradigm=ar", "--target_length=12"])
    capsys.readouterr()
    for checkpoint in ("adapted/ckpt.pt", "ar/ckpt.pt"):
        sample.main([f"--init_from={checkpoint}", "--prompt=the cat", "--device=cpu"])
        assert capsys.readouterr().err.count("tokens/s") == 1
    ar2diff.main(["--init_from=adapted/ckpt.pt", "--export=exported"])
    assert "left out: condition" in capsys.readouterr().out
    again = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
    assert type(again) is type(theirs)
    state = load("adapted/ckpt.pt")
    settings = state["model_config"] | dict(paradigm="ar", prefix_attention="causal", target_attention="causal")
    settings |= dict(shift=False, self_conditioning=False)
    weights = {n: t for n, t in state["model"].items() if n.split(".")[0] not in ADDED_BY_CONVERSION}
    ours, text = pretrained.assemble(ModelConfig(**settings), weights), ids(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(text[:, :0], text), again(text).logits, rtol=1e-4, atol=1e-4)


def test_convert_train_sample_and_export_a_qwen3(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    convert_train_sample_export("qwen3", monkeypatch, capsys)


@pytest.mark.slow  # the same way for the other families: seconds each
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_convert_train_sample_and_export_the_others(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    convert_train_sample_export(family, monkeypatch, capsys)


def imported(folder: Path, name: str = "ar", *more: str) -> dict:
    ar2diff.main([f"--init_from={folder}", f"--out_dir={name}", "--paradigm=ar", *more])
    return load(f"{name}/ckpt.pt")


def test_what_is_exported_comes_back_bit_for_bit(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = imported(made[0], "ar", "--target_length=9")
    ar2diff.main(["--init_from=ar/ckpt.pt", "--export=exported"])
    after = imported(Path("exported"), "again")
    assert before["model_config"] == after["model_config"] and before["tokenizer"] == after["tokenizer"]
    assert before["model"].keys() == after["model"].keys()
    assert all(torch.equal(t, after["model"][name]) for name, t in before["model"].items())
    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
    text = ids(2, 20)
    with torch.no_grad():
        same = theirs(text).logits[..., :EOS]
        torch.testing.assert_close(same, made[1](text).logits[..., :EOS], rtol=1e-5, atol=1e-5)


def test_the_exported_tokenizer_is_read_by_transformers(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = imported(llama)
    ar2diff.main(["--init_from=ar/ckpt.pt", "--export=exported"])
    theirs = transformers.AutoTokenizer.from_pretrained("exported")
    ours = get_tokenizer(state["tokenizer"])
    assert theirs.encode("the cat") == ours.encode("the cat")
    assert (theirs.pad_token_id, theirs.sep_token_id, theirs.mask_token_id) == (260, 261, 262)


@pytest.mark.parametrize(
    "settings, kind",
    [
        (dict(), "Llama"),
        (dict(n_kv_head=1, qkv_bias=True, tie_weights=False, head_dim=12), "Qwen2"),
        (dict(bias=True, rope_factor=8.0, rope_trained_length=8), "Llama"),
        (dict(qk_norm=True, n_hidden=20), "Qwen3"),
        (dict(norm="layernorm", position="learned", activation="gelu_tanh", bias=True), "GPT2"),
        (dict(norm="layernorm", position="learned", activation="gelu", bias=True, n_hidden=20), "GPT2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_our_own_models_can_be_exported_and_transformers_computes_the_same(settings, kind, tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=24, target_length=8, **settings)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    save(tmp_path / "ckpt.pt", model, 3, "bytes")
    write_folder(tmp_path / "out", load(tmp_path / "ckpt.pt"), get_tokenizer("bytes"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__.startswith(kind)
    text = ids(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(text[:, :0], text), theirs(text).logits, rtol=1e-4, atol=1e-5)
    back = read_folder(tmp_path / "out")
    assert back.tokenizer.name == "bytes" and asdict(back.model.cfg) == asdict(model.cfg)
    assert all(torch.equal(t, back.model.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(norm="layernorm"), "not llama's: norm=layernorm"),
        (dict(activation="gelu"), "not llama's: activation=gelu"),
        (dict(norm="layernorm", position="learned", activation="gelu", bias=True, n_kv_head=1), "heads that are"),
        (dict(arch="encoder_decoder", prefix_attention="bidirectional"), "encoder-decoder"),
    ],
    ids=["norm", "activation", "groups", "encoder"],
)
def test_a_network_that_no_family_has_is_refused_by_what_is_different(settings, says, tmp_path):
    state = {"model_config": asdict(ModelConfig(block_size=24, **settings)), "model": {}}
    with pytest.raises(ValueError, match=says):
        write_folder(tmp_path / "out", state, get_tokenizer("bytes"))
    assert not list(tmp_path.iterdir())


def test_large_exports_are_sharded_and_read_back(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = imported(llama)
    monkeypatch.setattr(pretrained, "SHARD", 20_000)
    ar2diff.main(["--init_from=ar/ckpt.pt", "--export=exported"])
    assert len(list(Path("exported").glob("model-*.safetensors"))) > 3
    after = imported(Path("exported"), "again")
    assert all(torch.equal(t, after["model"][name]) for name, t in before["model"].items())
    transformers.AutoModelForCausalLM.from_pretrained("exported")


def test_an_export_is_not_overwritten_unasked(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imported(llama)
    Path("mine").mkdir()
    for folder in ("mine", "exported"):
        if folder == "exported":
            ar2diff.main(["--init_from=ar/ckpt.pt", "--export=exported"])
        with pytest.raises(ValueError, match="is there already"):
            ar2diff.main(["--init_from=ar/ckpt.pt", f"--export={folder}"])
    ar2diff.main(["--init_from=ar/ckpt.pt", "--export=exported", "--overwrite"])
    with pytest.raises(ValueError, match="is there already"):  # it is no export, so it is not replaced
        ar2diff.main(["--init_from=ar/ckpt.pt", "--export=mine", "--overwrite"])


def test_a_failed_export_leaves_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imported(llama)

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="exported: not written .*No space left"):
        ar2diff.main(["--init_from=ar/ckpt.pt", "--export=exported"])
    assert sorted(p.name for p in Path().iterdir()) == ["ar"]


# Sizes that are known from the models' own pages
PUBLISHED = {
    "gpt2": (
        dict(model_type="gpt2", n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257),
        124_439_808,
    ),
    "TinyLlama 1.1B": (dict(layers=22, heads=32, groups=4, width=2048, hidden=5632, vocab_size=32000), 1_100_048_384),
    "SmolLM2 135M": (
        dict(layers=30, heads=9, groups=3, width=576, hidden=1536, vocab_size=49152, tie_word_embeddings=True),
        134_515_008,
    ),
    "Llama 3.2 1B": (
        dict(layers=16, heads=32, groups=8, width=2048, hidden=8192, vocab_size=128256, tie_word_embeddings=True),
        1_235_814_400,
    ),
    "Mistral 7B": (
        dict(model_type="mistral", layers=32, heads=32, groups=8, width=4096, hidden=14336, vocab_size=32000),
        7_241_732_096,
    ),
    "Qwen2.5 0.5B": (
        dict(model_type="qwen2", layers=24, heads=14, groups=2, width=896, hidden=4864, vocab_size=151936)
        | dict(tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen3 0.6B": (
        dict(
            model_type="qwen3", layers=28, heads=16, groups=8, width=1024, hidden=3072, vocab_size=151936, head_dim=128
        )
        | dict(tie_word_embeddings=True),
        596_049_920,
    ),
}
THEIR_NAMES = dict(layers="num_hidden_layers", heads="num_attention_heads", groups="num_key_value_heads")
THEIR_NAMES |= dict(width="hidden_size", hidden="intermediate_size")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_network_of_a_published_config_has_the_published_number_of_weights(name):
    found, count = PUBLISHED[name]
    found = {THEIR_NAMES.get(key, key): value for key, value in found.items()}
    c = pretrained.Config(dict(model_type="llama", max_position_embeddings=64) | found, "config.json")
    settings, context = pretrained.family_of(c).settings(c)
    V = found["vocab_size"]
    special = dict(vocab_size=V, n_ordinary=V - 3, pad_id=V - 3, sep_id=V - 2, mask_id=V - 1)
    assert count_params(ModelConfig(**settings, **special, block_size=context)) == count


# What folders look like


def test_number_formats_are_kept_and_computed_with_in_float32(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source(Path("source"), "llama 3 in bfloat16")
    ar2diff.main(["--init_from=source", "--out_dir=start", "--target_length=12", "--check"])
    said = capsys.readouterr().out
    assert "bfloat16, every tensor in its place" in said and "rounding, no error" in said and "FAIL" not in said
    assert {t.dtype for t in load("start/ckpt.pt")["model"].values()} == {torch.bfloat16}
    assert load_model("start/ckpt.pt")[0].tok.weight.dtype == torch.float32
    ar2diff.main(["--init_from=start/ckpt.pt", "--export=exported"])
    before, after = load_file("source/model.safetensors"), load_file("exported/model.safetensors")
    assert json.loads(Path("exported/config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16 and torch.equal(after[name][: EOS + 1], tensor[: EOS + 1]), name


def test_names_without_prefix_masks_and_a_second_copy_of_a_tied_head_are_accounted_for(tmp_path):
    """As the hub's gpt2 is: saved without the head, names begin with "h.0", causal masks among the tensors."""
    theirs = source(tmp_path, "gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 96, 96) for i in range(3)}
    tensors |= {"h.0.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": tensors["wte.weight"].clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    text = ids(2, 20)
    with torch.no_grad():
        same = read_folder(tmp_path).model(text[:, :0], text)[..., :300]
        torch.testing.assert_close(same[..., :EOS], theirs(text).logits[..., :EOS], rtol=1e-4, atol=1e-4)
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="ties lm_head.weight to the embedding, but they differ"):
        read_folder(tmp_path)


def test_context_is_the_block_size_up_to_a_cap_and_targets_are_half_of_it(llama, monkeypatch):
    assert [read_folder(llama).model.cfg.block_size, read_folder(llama).model.cfg.target_length] == [96, 48]
    monkeypatch.setattr(pretrained, "LONGEST", 40)
    m = read_folder(llama).model.cfg
    assert (m.block_size, m.target_length) == (40, 20)
    longer = read_folder(llama, block_size=200)
    assert longer.model.cfg.block_size == 200 and "never read more than 96" in longer.notes[0]


def test_learned_positions_cannot_grow_but_may_be_cut(tmp_path):
    source(tmp_path, "gpt2")
    with pytest.raises(ValueError, match="96 learned positions: block_size=97"):
        read_folder(tmp_path, block_size=97)
    assert read_folder(tmp_path, block_size=50).model.pos.weight.shape == (50, 32)


def test_a_folder_without_tokenizer_is_converted_to_a_model_of_ids(copy, capsys):
    (copy / "tokenizer.json").unlink()
    ar2diff.main(["--init_from=source", "--out_dir=start", "--target_length=8", "--check"])
    said = capsys.readouterr().out
    assert said.count("note: ") == 1 and "token ids are all there is" in said and "verdict: sound" in said
    assert load("start/ckpt.pt")["tokenizer"] == "ids-300-384"
    sample.main(["--init_from=start/ckpt.pt", "--prompt=5 17 250", "--steps=2", "--device=cpu"])
    assert all(int(word) < 300 for word in capsys.readouterr().out.split())


def test_gpt2_is_known_by_its_vocabulary(tmp_path, monkeypatch):
    cache = Path(__file__).parents[2] / "shared" / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip("no GPT-2 vocabulary beside the repository")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    source(tmp_path, "gpt2", tokenizer=False, vocab_size=50257, n_layer=1, n_embd=4)
    found = read_folder(tmp_path)
    assert found.tokenizer.name == "gpt2" and found.model.cfg.eos_id == -1  # its config.json says 259, which is a word
    edit(tmp_path, eos_token_id=50256)
    assert read_folder(tmp_path).model.cfg.eos_id == 50256


# What is refused


REFUSED = {
    "another family": (dict(model_type="mamba"), "model_type 'mamba' is not supported; can be read: gpt2, llama"),
    "experts": (dict(model_type="mixtral"), "model_type 'mixtral' is not supported"),
    "yarn": (dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "RoPE scaling 'yarn' is not supported"),
    "linear": (dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)), "RoPE scaling 'linear'"),
    "part": (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
    "window": (dict(model_type="mistral", sliding_window=16), "sliding_window=16 is in use at block_size=96"),
    "biases": (dict(attention_bias=True), "attention_bias and mlp_bias must be alike"),
    "activation": (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported; can be read: 'silu'"),
    "quantized": (dict(quantization_config={"bits": 4}), "quantized weights"),
    "own code": (dict(auto_map={"AutoModel": "x.Y"}), "a network of its own code"),
    "no size": (dict(hidden_size=None), "hidden_size is missing"),
    "wrong type": (dict(hidden_size="wide"), "hidden_size must be of type int, got 'wide'"),
    "heads": (dict(num_key_value_heads=3), "n_head must be a multiple of n_kv_head"),
    "shape": (dict(intermediate_size=40), r"has shape \(48, 32\), config.json asks for \(40, 32\)"),
    "too many layers": (dict(num_hidden_layers=4), r"no tensor model.layers.3\.\S+, .* and 6 more, which config.json"),
    "too few layers": (dict(num_hidden_layers=2), r"has model.layers.2\.\S+, .* and 6 more, for which config.json"),
    "no head": (dict(tie_word_embeddings=True), "ties lm_head.weight to the embedding, but they differ"),
    "rows": (dict(vocab_size=299), r"has shape \(300, 32\), config.json asks for \(299, 32\)"),
}


@pytest.mark.parametrize("changes, says", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_by_name_and_nothing_is_written(changes, says, copy, monkeypatch):
    monkeypatch.setattr(pretrained.Shards, "read", refuse_to_read) if "ties" not in says else None
    edit(copy, **changes)
    with pytest.raises(ValueError, match=says) as error:
        ar2diff.main(["--init_from=source", "--out_dir=start"])
    assert "\n" not in str(error.value) and not Path("start").exists()


def refuse_to_read(*_):
    raise AssertionError("a weight was read before all was checked")


def damaged(kind: str, folder: Path) -> str:
    """Damage the folder; what to type as init_from."""
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "broken config":
        (folder / "config.json").write_text("{")
    elif kind == "list":
        (folder / "config.json").write_text("[1]")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif kind == "no safetensors":
        weights.write_bytes(b"hello")
    elif kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "nothing":
        weights.unlink()
    elif kind == "integers":
        save_file(load_file(weights) | {"model.norm.weight": torch.ones(32, dtype=torch.int32)}, weights)
    elif kind in ("shard missing", "index lies", "index climbs"):
        other = {"shard missing": "2.safetensors", "index lies": "1.safetensors", "index climbs": "../x"}[kind]
        weights.rename(folder / "1.safetensors")
        index = {"weight_map": {"model.norm.weight": "1.safetensors", "model.more": other}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "tokenizer too large":
        more = tokenizer_json.extended(json.loads(tiny_tokenizer()), 264)
        (folder / "tokenizer.json").write_text(more.replace("ar2diff", "other").replace('"id": 263', '"id": 400'))
    elif kind == "broken tokenizer":
        (folder / "tokenizer.json").write_text('{"model": 3}')
    return str(folder)


DAMAGES = {
    "no config": "config.json: no such file",
    "broken config": "config.json: not JSON",
    "list": "config.json: wants a JSON object, got list",
    "truncated": "model.safetensors: truncated, or no safetensors file",
    "no safetensors": "model.safetensors: truncated, or no safetensors file",
    "pickle": "holds pytorch_model.bin and no safetensors; only safetensors are read: a pickle may run any code",
    "nothing": "model.safetensors: no such file; the folder is not complete",
    "integers": "model.norm.weight holds I32 numbers; can be read: F32, BF16, F16",
    "shard missing": "2.safetensors: no such file",
    "index lies": "names model.more, which its files do not hold",
    "index climbs": "weight_map must name files of this folder",
    "tokenizer too large": "its tokenizer does not fit: 401 ids .* for an embedding of 300 rows",
    "broken tokenizer": "tokenizer.json: not the JSON of a byte-pair tokenizer",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_is_one_clear_line_and_nothing_is_written(kind, copy):
    before = sorted(p.name for p in Path().iterdir())
    name = damaged(kind, copy)
    with pytest.raises(ValueError, match=DAMAGES[kind]) as error:
        ar2diff.main([f"--init_from={name}", "--out_dir=start"])
    assert "\n" not in str(error.value) and sorted(p.name for p in Path().iterdir()) == before


@pytest.mark.parametrize(
    "name, says",
    [
        ("./models/qwen", "no such folder or checkpoint, and no hub name"),
        ("a/b/c", "no such folder or checkpoint"),
        ("source/weights", "no such folder or checkpoint"),  # source is here, so this is no name of the hub
        ("qwen", "no hub name, as in openai-community/gpt2"),
        ("pytorch_model.bin", "a pickle may run any code"),
        ("source/model.safetensors", "name the folder"),
        ("start/ckpt.pt", "no such checkpoint"),
    ],
)
def test_a_name_that_is_neither_path_nor_hub_name_is_one_line(name, says, copy):
    with pytest.raises(ValueError, match=says) as error:
        ar2diff.main([f"--init_from={name}", "--out_dir=start"])
    assert "\n" not in str(error.value)


def test_a_hub_name_is_fetched_and_what_fails_is_one_line(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fetch(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        return str(llama)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert imported("some-org/tiny.model-1", "ar")["converted_from"] == "some-org/tiny.model-1"
    assert asked == [("some-org/tiny.model-1", ["*.safetensors", "*.json"])]

    def fail(*_, **__):
        raise RuntimeError("the hub cannot be reached\nand more")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="some-org/other: no such folder, and not fetched .*cannot be reached$"):
        pretrained.folder_of("some-org/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        pretrained.folder_of("some-org/other")


def test_the_source_folder_is_never_written_to(copy):
    with pytest.raises(ValueError, match="is a Hugging Face folder, which is left as it is"):
        ar2diff.main(["--init_from=source", "--out_dir=source"])


def test_settings_of_foreign_weights_are_refused_for_a_checkpoint(copy):
    imported(copy)
    for flag in ("--block_size=64", "--target_length=8", "--prompt=x", "--paradigm=ar"):
        with pytest.raises(ValueError, match=f"{flag.split('=')[0]}.* for foreign weights"):
            ar2diff.main(["--init_from=ar/ckpt.pt", "--out_dir=start", flag])
    with pytest.raises(ValueError, match="a Hugging Face folder already"):
        ar2diff.main(["--init_from=source", "--export=x"])


# The doctor


def test_the_doctor_sees_weights_that_are_read_wrong(copy, monkeypatch, capsys):
    """Gate and up of the MLP have one shape, so only the logits can tell that they were swapped."""
    family = pretrained.FAMILIES["llama"]
    theirs = family.modules["blocks.#.mlp.up"]
    monkeypatch.setitem(family.modules, "blocks.#.mlp.up", theirs[::-1])
    with pytest.raises(SystemExit):
        ar2diff.main(["--init_from=source", "--out_dir=start", "--check"])
    said = capsys.readouterr().out
    assert "FAIL  float32: the logits are those of transformers" in said and "verdict: do not train" in said
    assert said.count("FAIL") == 1 and not Path("start").exists()


def test_without_transformers_the_doctor_says_what_was_not_compared(copy, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    ar2diff.main(["--init_from=source", "--out_dir=start", "--check", "--prompt=the cat and the dog"])
    said = capsys.readouterr().out
    assert "not compared: pip install transformers" in said and "verdict: sound, but for what was not compared" in said


def test_the_doctors_text_fills_every_slot(llama):
    found = read_folder(llama, target_length=20)
    batch = ar2diff.text_batch("the cat", found.tokenizer, found.model.cfg)
    assert batch.prefix.shape == (2, 32) and batch.target.shape == (2, 20)
    assert (batch.target[:, 0] == found.model.cfg.sep_id).all() and (batch.target[:, 1:] < EOS).all()


# The rest of the project with these networks


def test_speed_up_computes_the_same_for_a_qwen3(tmp_path):
    source(tmp_path, "qwen3")
    model = read_folder(tmp_path).model
    quick, prefix, target = fast.speed_up(model), ids(2, 7), ids(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(quick.decode(quick.encode(prefix), target), model(prefix, target))


@pytest.mark.slow  # writes folders of 0.5 and 1.3 GB
def test_reading_takes_the_memory_of_the_weights_and_one_tensor(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    parity.write_gpt2(tmp_path / "gpt2")
    cost = parity.import_cost(tmp_path / "gpt2")
    assert cost["cpu_seconds"] < 3 and cost["ratio"] < 1.3, cost  # of the CPU, for the machine may be busy
    parity.write_llama(tmp_path / "llama")
    cost = parity.import_cost(tmp_path / "llama")  # the largest tensor is a tenth of it, a shard a quarter
    assert cost["ratio"] < 1.2, cost
