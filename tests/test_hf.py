"""hf/: weights in and out. The oracles are transformers and round trips."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizers import EOS, byte_level, write

import ar2diff
import hf.load
import sample
import train
from data import text_file
from data.tokenizer import get_tokenizer
from diffusion import sample_noise
from hf.convert import export
from hf.layouts import BLOCK
from hf.load import load_hf, resolve_source
from infra.checkpoint import load, load_model, save
from infra.logits import banned_token_ids
from model import NEW_MODULES, ModelConfig, Transformer, model_from_state_dict

transformers = pytest.importorskip("transformers")
from eval import parity  # noqa: E402

CASES = {"gpt2": "gpt2", "llama": "llama 3: grouped, scaled rope"}
CASES |= {"qwen2": "qwen2: qkv bias, tied", "qwen3": "qwen3: qk norm, head_dim"}


def source(folder: Path, family: str):
    """Write a folder as transformers does, 300 rows for 260 ids. Returns transformers' model."""
    theirs = parity.build(CASES.get(family, family), folder, eos_token_id=EOS)
    write(folder, byte_level())
    return theirs


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    """A folder of each family and transformers' model of it. Do not write to it."""
    folder = tmp_path_factory.mktemp(request.param) / "source"
    return folder, source(folder, request.param)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A Llama that may be damaged, as `source` in the working directory."""
    monkeypatch.chdir(tmp_path)
    source(Path("source"), "llama")
    return Path("source")


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, EOS, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, text):
    return model(text[:, :0], text)


def assert_logits_are_those_of_transformers(folder: Path, theirs=None) -> None:
    text = ids(1, 40)
    theirs = theirs or transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = logits(load_hf(folder).model, text)[..., :EOS]
    torch.testing.assert_close(ours, theirs(text).logits[..., :EOS], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", parity.CASES)
def test_logits_and_greedy_texts_are_those_of_transformers(case):
    found = parity.measure(case)
    assert found["relative"] <= 1e-5 and found["greedy_same"] == parity.GREEDY, found


def test_reserved_rows_start_as_documented(made):
    model = load_hf(made[0]).model
    m = model.cfg
    assert (m.n_ordinary, m.pad_id, m.sep_id, m.mask_id, m.eos_id) == (260, 260, -1, 262, EOS)
    old = load_file(made[0] / "model.safetensors")
    old = next(t for n, t in old.items() if n.endswith(("wte.weight", "embed_tokens.weight")))
    table = model.tok.weight.detach()
    assert torch.equal(table[m.pad_id], old[EOS])
    assert torch.equal(table[:260], old[:260]) and torch.equal(table[263:300], old[263:300])
    for i in (m.mask_id, 300, 383):
        torch.testing.assert_close(table[i], old[:260].double().mean(0).float())
    assert set(banned_token_ids(m, "cpu").tolist()) == {EOS, *range(261, 384)}
    assert set(sample_noise(torch.linspace(0, 1 - 1e-7, 5000), m).tolist()) == {*range(259), 260}


# In and out, by the commands


def imported(folder, name: str = "ar", *more: str) -> dict:
    ar2diff.main([f"--init_from={folder}", f"--out_dir={name}", "--paradigm=ar", *more])
    return load(f"{name}/ckpt.pt")


def test_convert_train_sample_and_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs = source(Path("source"), "qwen3")
    lengths = ["--target_length=12", "--block_size=40"]
    ar2diff.main(["--init_from=source", "--out_dir=start", *lengths, "--check"])
    report = capsys.readouterr().out
    assert "FAIL" not in report and "11, 11, 11 of 11 tokens equal" in report
    Path("text.txt").write_text("the cat sat on the mat and the dog on the log\n" * 40)
    data = ["--input=text.txt", "--name=mine", "--tokenizer=start/tokenizer.json"]
    text_file.main([*data, "--target_length=12", "--block_size=32"])
    common = ["--max_steps=20", "--batch_size=4", "--eval_batches=1", "--device=cpu"]
    run = ["--init_from=start/ckpt.pt", "--data=out/data/mine", "--out_dir=adapted"]
    last = train.main([*run, *common])
    first = json.loads(Path("adapted/log.jsonl").read_text().splitlines()[0])
    assert last["step"] == 20 and last["loss"] < first["loss"] - 1
    sample.main(["--init_from=adapted/ckpt.pt", "--prompt=the cat", "--device=cpu"])
    ar2diff.main(["--init_from=adapted/ckpt.pt", "--export=exported"])
    assert "left out: self_cond_proj" in capsys.readouterr().out
    again = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
    assert type(again) is type(theirs)
    state = load("adapted/ckpt.pt")
    old = dict(paradigm="ar", prefix_attention="causal", target_attention="causal", shift=False)
    m = ModelConfig(**state["model_config"] | old | {"self_conditioning": False})
    weights = {n: t for n, t in state["model"].items() if n.split(".")[0] not in NEW_MODULES}
    text = ids(2, 20)
    ours = logits(model_from_state_dict(m, weights), text)
    torch.testing.assert_close(ours, again(text).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("paradigm", ["ar", "diffusion"])
def test_an_untouched_import_is_exported_as_its_source(made, paradigm, tmp_path, monkeypatch):
    """Two rows differ, pad and mask: ids that the tokenizer of the source does not use."""
    monkeypatch.chdir(tmp_path)
    ar2diff.main([f"--init_from={made[0]}", "--out_dir=x", f"--paradigm={paradigm}"])
    ar2diff.main(["--init_from=x/ckpt.pt", "--export=exported"])
    before = load_file(made[0] / "model.safetensors")
    after = load_file("exported/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        rows = [i for i in range(len(tensor)) if len(tensor) != 300 or i not in (260, 262)]
        assert after[name].shape == tensor.shape and torch.equal(after[name][rows], tensor[rows])
    tokenizer = json.loads(Path("exported/tokenizer.json").read_text())
    assert tokenizer == json.loads((made[0] / "tokenizer.json").read_text())
    text = ids(2, 20)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
    assert torch.equal(theirs(text).logits[..., :EOS], made[1](text).logits[..., :EOS])


@pytest.mark.parametrize("trained", [False, True])
def test_an_export_comes_back_bit_for_bit(made, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = imported(made[0], "ar", "--target_length=9")
    if trained:
        model, tokenizer, _ = load_model("ar/ckpt.pt")
        model.tok.weight.data += 1e-4 * torch.randn_like(model.tok.weight)
        save("ar/ckpt.pt", model, 1, tokenizer.name)
        before = load("ar/ckpt.pt")
    ar2diff.main(["--init_from=ar/ckpt.pt", "--export=exported"])
    after = imported(Path("exported"), "again")
    assert before["model_config"] == after["model_config"]
    assert before["tokenizer"] == after["tokenizer"]
    assert before["model"].keys() == after["model"].keys()
    assert all(torch.equal(t, after["model"][name]) for name, t in before["model"].items())
    theirs = transformers.AutoTokenizer.from_pretrained("exported")
    assert theirs.encode("the cat") == get_tokenizer(after["tokenizer"]).encode("the cat")
    assert not trained or theirs.pad_token_id == 260


GPT2 = dict(norm="layernorm", position="learned", bias=True)


@pytest.mark.parametrize(
    "settings, kind",
    [
        (dict(), "Llama"),
        (dict(n_kv_head=1, qkv_bias=True, tie_weights=False, head_dim=12), "Qwen2"),
        (dict(bias=True, rope_factor=8.0, rope_trained_length=8), "Llama"),
        (dict(qk_norm=True, n_hidden=20), "Qwen3"),
        (GPT2 | dict(activation="gelu_tanh"), "GPT2"),
        (GPT2 | dict(activation="gelu", n_hidden=20), "GPT2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_our_own_models_can_be_exported(settings, kind, tmp_path):
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=24, target_length=8)
    model = Transformer(ModelConfig(**sizes, **settings)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    save(tmp_path / "ckpt.pt", model, 3, "bytes")
    export(str(tmp_path / "ckpt.pt"), tmp_path / "out", overwrite=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__.startswith(kind)
    text = ids(2, 20)
    torch.testing.assert_close(logits(model, text), theirs(text).logits, rtol=1e-4, atol=1e-5)
    back = load_hf(tmp_path / "out")
    assert back.tokenizer.name == "bytes" and asdict(back.model.cfg) == asdict(model.cfg)
    assert all(torch.equal(t, back.model.state_dict()[n]) for n, t in model.state_dict().items())
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert their_tokenizer.encode("naïve") == list("naïve".encode())


NO_FAMILY = {
    "different from llama: norm=layernorm": dict(norm="layernorm"),
    "different from gpt2: n_kv_head=1": GPT2 | dict(activation="gelu", n_kv_head=1),
    "arch=enc": dict(arch="encoder_decoder", prefix_attention="bidirectional"),
}


@pytest.mark.parametrize("message", NO_FAMILY)
def test_a_network_of_no_family_is_refused(message, tmp_path):
    cfg = ModelConfig(block_size=24, **NO_FAMILY[message])
    weights = {"tok.weight": torch.zeros(288, 128)}
    save(tmp_path / "x.pt", SimpleNamespace(cfg=cfg, state_dict=lambda: weights), 3, "bytes")
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "x.pt"), tmp_path / "out", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_failed_or_repeated_export_changes_nothing(copy, monkeypatch):
    imported(copy)

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not written: No space"):
        patch.setattr("safetensors.torch.save_file", full)
        ar2diff.main(["--init_from=ar/ckpt.pt", "--export=exported"])
    assert sorted(p.name for p in Path().iterdir()) == ["ar", "source"]
    ar2diff.main(["--init_from=ar/ckpt.pt", "--export=exported"])
    ar2diff.main(["--init_from=ar/ckpt.pt", "--export=exported", "--overwrite"])
    for folder, more in (("exported", []), ("ar", ["--overwrite"])):
        with pytest.raises(ValueError, match=f"{folder} exists"):
            ar2diff.main(["--init_from=ar/ckpt.pt", f"--export={folder}", *more])


# What folders look like


def test_number_formats_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source(Path("source"), "llama 3 in bfloat16")
    found = imported("source")["model"]
    ar2diff.main(["--init_from=ar/ckpt.pt", "--export=exported"])
    found |= load_file("exported/model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_bare_names_causal_masks_and_a_copy_of_a_tied_head_are_accounted_for(tmp_path):
    """The hub's gpt2 was saved without its head: names begin with h.0."""
    theirs = source(tmp_path, "gpt2")
    path = tmp_path / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 96, 96) for i in range(3)}
    tensors |= {"lm_head.weight": tensors["wte.weight"].clone()}
    save_file(tensors, path)
    assert_logits_are_those_of_transformers(tmp_path, theirs)
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"] + 1}, path)
    with pytest.raises(ValueError, match="lm_head.weight differs from the tied embedding"):
        load_hf(tmp_path)


def test_lengths_follow_the_context_of_the_source(copy, tmp_path, monkeypatch, capsys):
    m = load_hf(copy).model.cfg
    assert (m.block_size, m.target_length) == (96, 48)
    assert load_hf(copy, block_size=200).model.cfg.block_size == 200
    assert "note: block_size=200: the source was trained on at most 96" in capsys.readouterr().out
    monkeypatch.setattr(hf.load, "MAX_BLOCK", 40)
    assert load_hf(copy).model.cfg.block_size == 40
    source(tmp_path, "gpt2")
    assert load_hf(tmp_path, block_size=50).model.pos.weight.shape == (50, 32)
    with pytest.raises(ValueError, match="block_size=97 exceeds its 96 learned positions"):
        load_hf(tmp_path, block_size=97)


def test_a_folder_without_tokenizer_reads_and_writes_ids(copy, capsys):
    (copy / "tokenizer.json").unlink()
    run = ["--init_from=source", "--out_dir=start", "--target_length=8", "--prompt=1 22 299"]
    ar2diff.main([*run, "--check"])
    assert "passed" in capsys.readouterr().out
    assert load("start/ckpt.pt")["tokenizer"] == "ids-300-384"
    (copy / "merges.txt").write_text("never taken to be GPT-2's")
    with pytest.raises(ValueError, match="merges.txt, but no tokenizer.json; write it"):
        load_hf(copy)


def test_a_single_file_wins_over_an_index_as_in_transformers(copy):
    weights = load_file(copy / "model.safetensors")
    where = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_logits_are_those_of_transformers(copy)  # the shard is missing
    old = {name: tensor / 2 for name, tensor in weights.items()}
    save_file(old, copy / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    assert_logits_are_those_of_transformers(copy)
    (copy / "model.safetensors").unlink()
    assert torch.equal(load_hf(copy).model.norm.weight, weights["model.norm.weight"] / 2)


ROPE = dict(rope_type="default", rope_theta=10000.0)
SPELLINGS = {
    "equal": dict(rope_parameters=ROPE, rope_scaling=dict(type="default"), rope_theta=1e4),
    "old only": dict(rope_parameters=None, rope_theta=5e5),
}


@pytest.mark.parametrize("changes", SPELLINGS.values(), ids=SPELLINGS)
def test_old_and_new_spellings_are_read_as_in_transformers(changes, copy):
    edit(copy, **changes)
    assert_logits_are_those_of_transformers(copy)


# What is refused

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\n"


def settings(**changes):
    return lambda folder: edit(folder, **changes)


def text(name: str, content: str = POINTER):
    return lambda folder: (folder / name).write_text(content)


def renamed(name: str):
    return lambda folder: (folder / name).rename(folder / "pytorch_model.bin")


def norm(value: torch.Tensor):
    name = "source/model.safetensors"
    return lambda _: save_file(load_file(name) | {"model.norm.weight": value}, name)


def shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "1.safetensors")
    where = {"weight_map": {"model.norm.weight": "1.safetensors", "model.x": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(where))


def too_many_ids(folder: Path) -> None:
    found = byte_level()
    found["added_tokens"][0]["id"] = 400
    found["model"]["vocab"] |= {f"x{i}": i for i in range(259, 400)}
    write(folder, found)


REFUSED = {
    "model_type='mamba' is not supported; supported: 'gpt2'": settings(model_type="mamba"),
    "rope_type='yarn' is not supported": settings(rope_parameters=dict(rope_type="yarn")),
    "rope_theta is both 500000.0 and": settings(rope_parameters=ROPE, rope_theta=5e5),
    "96 tokens exceed sliding_window=16": settings(model_type="mistral", sliding_window=16),
    "lacks the tensor model.layers.0.self_attn.q_proj.bias": settings(attention_bias=True),
    "quantized weights": settings(quantization_config={"bits": 4}),
    "hidden_size is missing": settings(hidden_size=None),
    "source: n_head 4 must be a multiple of n_kv_head 3": settings(num_key_value_heads=3),
    r"has shape \(48, 32\), expected \(40, 32\)": settings(intermediate_size=40),
    r"lacks the tensor model.layers.3\.": settings(num_hidden_layers=4),
    r"has 9 tensors that .* does not explain: model.layers.2\.": settings(num_hidden_layers=2),
    "the embedding has 300 rows, vocab_size=118": settings(vocab_size=2**70),
    "config.json of a Hugging Face folder: .*No such file": renamed("config.json"),
    "config.json: no JSON object: got list": text("config.json", "[1]"),
    "truncated, or no safetensors file": text("model.safetensors", "hello"),
    "no such file; only safetensors .*save_pretrained": renamed("model.safetensors"),
    "model.safetensors: a git-LFS pointer.*`git lfs pull`": text("model.safetensors"),
    "merge the adapter": text("adapter_config.json", "{}"),
    "model.norm.weight is I32, supported: F32, BF16, F16": norm(torch.ones(32, dtype=torch.int32)),
    "model.norm.weight holds NaN or infinite weights": norm(torch.full((32,), torch.nan)),
    "2.safetensors: no such file; download": shards,
    "the tokenizer does not fit: 401 ids .* for an embedding of 300 rows": too_many_ids,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(message, copy, monkeypatch):
    REFUSED[message](copy)
    if "NaN" not in message:
        monkeypatch.setattr(hf.load.Folder, "read", lambda *_: pytest.fail("a weight was read"))
    before = sorted(Path().iterdir())
    with pytest.raises(ValueError, match=message) as error:
        ar2diff.main(["--init_from=source", "--out_dir=start"])
    assert "\n" not in str(error.value) and sorted(Path().iterdir()) == before


@pytest.mark.parametrize("name", ["./models/qwen", "source/weights", "x.safetensors"])
def test_other_names_are_refused(name, copy):
    """source exists, so source/weights is no hub name."""
    with pytest.raises(ValueError, match="no folder with config.json, GGUF file or hub name"):
        resolve_source(name)


def test_the_folder_of_a_run_is_no_source(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(ValueError, match="the folder of a run; give its checkpoint, .*ckpt.pt"):
        resolve_source(str(tmp_path))


def test_a_hub_name_is_downloaded(copy, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(copy))
    assert imported("some-org/tiny.model-1")["converted_from"] == "some-org/tiny.model-1"
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="not on the hub: division by zero$"):
        resolve_source("some-org/other")


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_a_missing_package_is_one_line(package, copy, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"run: pip install {package}"):
        load_hf(resolve_source("some-org/other") if package == "huggingface_hub" else copy)


def test_the_check_finds_weights_that_are_read_wrong(copy, monkeypatch, capsys):
    """Gate and up of the MLP have one shape, so only the logits can tell them apart."""
    monkeypatch.setitem(BLOCK, "mlp.up", ("", "mlp.up_proj mlp.gate_proj"))
    with pytest.raises(SystemExit):
        ar2diff.main(["--init_from=source", "--out_dir=start", "--check"])
    report = capsys.readouterr().out
    assert "FAIL  float32: the logits are those of transformers" in report
    assert "FAIL  greedy texts" in report and report.count("FAIL  ") == 2
    assert not Path("start").exists()


def test_without_transformers_the_check_names_what_is_missing(copy, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    ar2diff.main(["--init_from=source", "--out_dir=start", "--check", "--prompt=the cat"])
    report = capsys.readouterr().out
    assert "not compared: the package transformers is missing" in report and "passed" in report
