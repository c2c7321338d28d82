# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys

import pytest
import torch

from monai_synth.errors import UserError
from monai_synth.networks import TextUNet
from monai_synth.networks.text_features import class_prompt, find_class, text_features

KATHER = {
    "01_TUMOR": 0,
    "02_STROMA": 1,
    "03_COMPLEX": 2,
    "04_LYMPHO": 3,
    "05_DEBRIS": 4,
    "06_MUCOSA": 5,
    "07_ADIPOSE": 6,
    "08_EMPTY": 7,
}


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("01_TUMOR", "tumor"),
        ("COMPLEX", "complex"),
        ("lung_adenocarcinoma", "lung adenocarcinoma"),
        ("barretts-short-segment", "barretts short segment"),
        ("3. Stroma", "stroma"),
        ("7", "7"),
        ("2019_1", "2019 1"),
        ("grade_2", "grade 2"),
        ("  sks   Tumor ", "sks tumor"),
    ],
)
def test_the_prompt_of_a_class_is_its_bare_name_in_lower_case(name, prompt):
    assert class_prompt(name) == prompt
    assert class_prompt(prompt) == prompt


@pytest.mark.parametrize("given", ["tumor", "TUMOR", "01_tumor", "01_TUMOR", "1 Tumor"])
def test_a_class_is_found_by_its_name_or_its_prompt(given):
    assert find_class(given, KATHER) == "01_TUMOR"


def test_a_class_that_is_unknown_or_may_be_two_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=r"unknown class 'tumour'; allowed are 01_TUMOR, 02_STROMA"):
        find_class("tumour", KATHER)
    two = {"tumor_1": 0, "TUMOR 1": 1}
    with pytest.raises(UserError, match=r"may mean tumor_1 or TUMOR 1"):
        find_class("tumor-1", two)
    assert find_class("tumor_1", two) == "tumor_1"
    assert find_class("TUMOR 1", two) == "TUMOR 1"


def test_random_features_are_unit_vectors_that_only_their_own_words_decide():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    features = text_features(["tumor", "stroma", "sks tumor"], "random")
    assert torch.equal(torch.get_rng_state(), state)
    assert features.shape == (3, 512)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    again = text_features(["Sks TUMOR", "debris"], "random")
    assert torch.equal(again[0], features[2])
    cosine = features @ features.T
    assert abs(cosine[0, 1]) < 0.2
    # two independent directions: cos 45 degrees, but for their chance overlap c, sqrt((1 + c) / 2)
    sks = text_features(["sks"], "random")[0]
    torch.testing.assert_close(cosine[0, 2], ((1 + sks @ features[0]) / 2).sqrt())


def test_random_features_tell_the_classes_of_a_network_apart():
    network = TextUNet(
        1, 8, (8, 8), block_out_channels=(8, 8), cross_attention=(True, True), attention_head_dim=2, norm_num_groups=4
    )
    network.set_text_features(text_features([class_prompt(name) for name in KATHER], "random"))
    assert network.text_features.any(dim=1).all()


@pytest.mark.parametrize("source", ["random", None, "nowhere"])
@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        (["tumor", "_ -"], "prompt '_ -' has no letter or digit"),
        (["tumor", ""], "prompt '' has no letter or digit"),
        (["tumor", "Tumor"], "prompt 'Tumor' is given twice"),
    ],
)
def test_prompts_that_say_nothing_or_the_same_are_refused(prompts, match, source):
    with pytest.raises(UserError, match=match):
        text_features(prompts, source)


def test_a_class_without_letters_or_digits_is_refused_by_name():
    with pytest.raises(UserError, match="class '__' has no letter or digit"):
        class_prompt("__")


def test_without_a_text_encoder_it_says_where_to_get_clip(tmp_path):
    with pytest.raises(UserError, match=r"huggingface\.co/openai/clip-vit-base-patch32.* or give 'random'"):
        text_features(["tumor"], None)
    with pytest.raises(UserError, match=r"there is no .*config\.json; get .*clip-vit-base-patch32"):
        text_features(["tumor"], tmp_path / "none")


# CLIP

WORDS = ("tumor", "stroma")
DIM = 6


def _vocabulary() -> tuple[dict[str, int], list[str]]:
    """Letters, the two words built up from the left, and CLIP's two special tokens."""
    letters = sorted(set("".join(WORDS)))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    unique = list(dict.fromkeys(tokens))
    return {token: i for i, token in enumerate(unique)}, list(dict.fromkeys(merges))


def clip_folder(path):
    """A small CLIP with random weights and its tokenizer, and the model."""
    transformers = pytest.importorskip("transformers")
    vocabulary, merges = _vocabulary()
    path.mkdir(exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    text = {**layers, **special, "vocab_size": len(vocabulary), "max_position_embeddings": 8}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**layers, "image_size": 8, "patch_size": 4}, projection_dim=DIM
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # CLIP's own are so small that features hardly differ
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return model


def _projected(model, ids) -> torch.Tensor:
    """CLIPModel.get_text_features, which gives a tensor in transformers 4 and an output with a field for it in 5."""
    with torch.no_grad():
        result = model.get_text_features(input_ids=torch.tensor([ids]))
    return (result if isinstance(result, torch.Tensor) else result.pooler_output)[0]


def test_features_are_those_of_clips_get_text_features(tmp_path):
    model = clip_folder(tmp_path)
    vocabulary = _vocabulary()[0]
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    tumor, stroma = vocabulary["tumor</w>"], vocabulary["stroma</w>"]
    state = torch.get_rng_state()
    features = text_features(["tumor", "Stroma", "stroma tumor"], tmp_path, dim=DIM)
    assert torch.equal(torch.get_rng_state(), state)
    expected = [[start, tumor, end], [start, stroma, end], [start, stroma, tumor, end]]
    torch.testing.assert_close(features, torch.stack([_projected(model, ids) for ids in expected]))
    assert (features[0] - features[1]).abs().max() > 0.1
    assert not features.requires_grad


def test_a_text_encoder_saved_alone_gives_the_same_features(tmp_path):
    model = clip_folder(tmp_path / "whole")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig.from_pretrained(tmp_path / "whole")
    config.projection_dim = DIM
    alone = transformers.CLIPTextModelWithProjection(config)
    state = {key: value for key, value in model.state_dict().items() if key.startswith("text_")}
    alone.load_state_dict(state, strict=True)
    alone.save_pretrained(tmp_path / "alone")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / "alone" / name).write_text((tmp_path / "whole" / name).read_text())
    whole = text_features(WORDS, tmp_path / "whole", dim=DIM)
    torch.testing.assert_close(text_features(WORDS, tmp_path / "alone", dim=DIM), whole)


def test_weights_as_published_in_a_bin_file_are_read(tmp_path):
    from safetensors.torch import load_file

    clip_folder(tmp_path)
    expected = text_features(WORDS, tmp_path, dim=DIM)
    content = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    content["text_model.embeddings.position_ids"] = torch.arange(8)[None]  # files of that time have it
    torch.save({key: value.clone() for key, value in content.items()}, tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(text_features(WORDS, tmp_path, dim=DIM), expected)


def _without(key):
    def change(folder):
        from safetensors.torch import load_file, save_file

        content = load_file(folder / "model.safetensors")
        assert any(name.endswith(key) for name in content)
        kept = {name: value.clone() for name, value in content.items() if not name.endswith(key)}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _reshaped(folder):
    from safetensors.torch import load_file, save_file

    content = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    content["text_projection.weight"] = torch.zeros(DIM, 3)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def _truncated(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-500])


def _of_type(kind):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "model_type": kind}))

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
        (_of_type("bert"), "model of type 'bert', needed is CLIP"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (_truncated, "cannot be read"),
        (_without("text_projection.weight"), r"1 missing weights such as .*text_projection\.weight"),
        (_without("layers.1.mlp.fc1.bias"), r"1 missing weights such as .*layers\.1\.mlp\.fc1\.bias"),
        (_reshaped, r"1 mismatched weights such as .*text_projection\.weight"),
        (lambda folder: (folder / "merges.txt").unlink(), r"has no tokenizer"),
    ],
)
def test_a_folder_that_is_incomplete_or_of_another_model_is_refused(change, match, tmp_path):
    clip_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=match) as error:
        text_features(WORDS, tmp_path, dim=DIM)
    assert "huggingface.co/openai/clip-vit-base-patch32" in str(error.value)
    assert "\n" not in str(error.value)


def test_features_of_another_length_and_prompts_that_the_encoder_cannot_take_are_refused(tmp_path):
    clip_folder(tmp_path)
    with pytest.raises(UserError, match="features of length 6, needed is 512"):
        text_features(["tumor"], tmp_path)
    with pytest.raises(UserError, match="no tokens for prompt 'debris'"):
        text_features(["tumor", "debris"], tmp_path, dim=DIM)
    with pytest.raises(UserError, match="has 9 tokens.* at most 8 tokens"):
        text_features([" ".join(["tumor"] * 7)], tmp_path, dim=DIM)


def test_reading_clip_leaves_what_transformers_logs_as_it_was(tmp_path, capfd):
    transformers = pytest.importorskip("transformers")
    clip_folder(tmp_path)
    before = transformers.utils.logging.get_verbosity()
    capfd.readouterr()
    text_features(WORDS, tmp_path, dim=DIM)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == before


def test_without_transformers_it_names_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'pip install "monai_synth\[fad\]"'):
        text_features(["tumor"], tmp_path)
    assert text_features(["tumor"], "random").shape == (1, 512)
