"""Models of Hugging Face by the harness's own adapter: what is loaded, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance

from bytelm.errors import ConfigError
from bytelm.evaluation.harness.hugging_face import (
    hugging_face_arguments,
    hugging_face_model,
    short_names,
)
from test_byteify import save_donor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_donor(tmp_path_factory.mktemp("model"), "llama 3.1", {"dtype": "bfloat16"})


def test_likelihoods_are_those_of_the_model_in_float32(folder: Path):
    lm = hugging_face_model(str(folder))
    asked = Instance("loglikelihood", {}, ("The cat", " saw the house"), 0)
    [(found, _)] = lm.loglikelihood([asked])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    context, rest = (tokenizer(text)["input_ids"] for text in ("The cat", " saw the house"))
    with torch.no_grad():
        logits = model(torch.tensor([context + rest])).logits[0]
    chosen = logits.log_softmax(1)[range(len(context) - 1, len(context + rest) - 1), rest]
    assert found == pytest.approx(float(chosen.sum()), abs=1e-4)


def test_a_model_is_a_folder_a_file_a_repository_or_arguments(tmp_path: Path):
    assert hugging_face_arguments("gpt2") == {"pretrained": "gpt2"}
    assert hugging_face_arguments("owner/name") == {"pretrained": "owner/name"}
    given = {"pretrained": "owner/name", "dtype": "bfloat16"}
    assert hugging_face_arguments("pretrained=owner/name,dtype=bfloat16") == given
    path = tmp_path / "a=b,c.gguf"
    path.write_bytes(b"GGUF")
    expected = {"pretrained": str(tmp_path), "gguf_file": path.name}
    assert hugging_face_arguments(str(path)) == expected == hugging_face_arguments(str(tmp_path))
    assert short_names([str(path), "owner/name"]) == [path.name, "name"]
    (tmp_path / "config.json").write_text("{}")
    assert hugging_face_arguments(str(tmp_path)) == {"pretrained": str(tmp_path)}
    assert short_names(["a/one", "pretrained=b/one"]) == ["a/one", "pretrained=b/one"]
    with pytest.raises(ConfigError, match="given twice"):
        short_names(["a/one", "a/one"])


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "a.txt").write_text("")
    for name, message in (
        ("./nothing", r"there is no model at \./nothing: name a folder, a GGUF file"),
        ("a/b/c", "there is no model at a/b/c"),
        (tmp_path, "holds neither config.json nor GGUF"),
        (tmp_path / "a.txt", "but not a GGUF file: name its folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            hugging_face_model(str(name))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"cannot load .*a\.gguf: [^\n]*$"):
        hugging_face_model(str(tmp_path / "a.gguf"))


def test_a_repository_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*args: Any, **kwargs: Any):
        raise OSError("no connection to the Hub.\nSee https://huggingface.co")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ConfigError, match=r"no connection to the Hub; without a network, [^\n]*$"):
        hugging_face_model("owner/name")
