# SPDX-License-Identifier: Apache-2.0
"""Code, configs and page of a packaged bundle lead to nothing of this package."""

from __future__ import annotations

from typing import Any

import pytest
from bundle_runs import BUNDLES
from package_toy import CLASS_UNET, ROOT

from monai_synth.checkpoint import build_network
from monai_synth.errors import UserError
from monai_synth.package_docs import packaged_readme
from monai_synth.package_vendor import needed_code, read_configs, renamed_configs, renamed_source


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [t for item in value.values() for t in texts(item)]
    if isinstance(value, list):
        return [t for item in value for t in texts(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("bundle", sorted(p.name for p in BUNDLES.iterdir()))
def test_no_name_of_this_package_is_left_in_the_configs_of_any_bundle(bundle: str) -> None:
    configs = read_configs(BUNDLES / bundle / "configs")
    made = renamed_configs(configs, bundle, f"{bundle}_scripts", ROOT)
    assert [t for t in texts(made) if "monai_synth" in t] == []
    assert made.keys() == configs.keys()
    for name, content in made.items():
        known = set(content.get("code", made["train.json"]["code"] | made["inference.json"]["code"]))
        used = {t.split("@code::")[1].split(".")[0].split(" ")[0] for t in texts(content) if "@code::" in t}
        assert used <= known, name


def test_the_code_is_closed_under_imports_and_leaves_out_what_is_not_needed() -> None:
    code = needed_code(read_configs(BUNDLES / "cfg_ddpm" / "configs"), ROOT)
    for name in (
        "monai_synth",
        "monai_synth.networks.class_unet",
        "monai_synth.data.phantom_xray",
        "monai_synth.atomic",
    ):
        assert name in code.modules, name
    assert not [name for name in code.modules if name.startswith(("monai_synth.experiments", "monai_synth.commands"))]
    assert {"torch", "monai", "numpy"} <= code.always
    assert "transformers" in code.sometimes


def test_only_names_of_modules_are_renamed() -> None:
    source = (
        "import monai_synth.atomic\n"
        "from monai_synth.errors import UserError\n"
        'a = monai_synth.atomic, "monai_synth.networks.ClassUNet", "monai_synth.process", "monai_synth/1"\n'
        'b = """two\nmonai_synth.bundle lines"""  # monai_synth.bundle\n'
    )
    assert renamed_source(source, "own", ROOT) == (
        "import own.atomic\n"
        "from own.errors import UserError\n"
        'a = own.atomic, "own.networks.ClassUNet", "monai_synth.process", "monai_synth/1"\n'
        'b = """two\nown.bundle lines"""  # monai_synth.bundle\n'
    )


def test_a_name_of_a_module_is_reached_by_code_and_one_that_looks_like_it_is_not() -> None:
    configs = {
        "train.json": {
            "imports": ["$import torch", "$import monai_synth.bundle as bundle"],
            "bundle_root": "$bundle.bundle_root('x')",
            "a": "$bundle.end() if @bundle.x else 'bundle.y' + @b#bundle.z",
            "b": {"_target_": "monai_synth.training.EMA", "model": "$torch.nn.Identity()"},
        },
        "more.json": {"a": "$bundle.end()"},
    }
    made = renamed_configs(configs, "x", "x_scripts", ROOT)
    assert made["train.json"]["a"] == "$@code::bundle.end() if @bundle.x else 'bundle.y' + @b#bundle.z"
    assert made["train.json"]["b"]["_target_"] == "x_scripts.training.EMA"
    assert made["train.json"]["b"]["_requires_"] == "@code::path"
    assert made["train.json"]["imports"][0] == "$import torch"
    assert made["more.json"] == {"a": "$@code::bundle.end()"}


def test_a_trained_file_of_a_packaged_bundle_builds_the_same_network() -> None:
    own = build_network(CLASS_UNET)
    copied = build_network(CLASS_UNET | {"target": "cfg_ddpm_scripts.networks.ClassUNet"})
    assert type(copied) is type(own)
    for target in ("os.system", "torch.nn.Linear", "a.b.networks.ClassUNet"):
        with pytest.raises(UserError, match="is not in"):
            build_network(CLASS_UNET | {"target": target})


def page(text: str, trained: dict[str, Any], **given: Any) -> str:
    tensor = {"num_channels": 1, "spatial_shape": [8, 8]}
    meta = {
        "monai_version": "1", "pytorch_version": "2", "numpy_version": "3", "required_packages_version": {"x": "4"},
        "network_data_format": {"inputs": {"image": tensor}, "outputs": {"pred": tensor}},
    }  # fmt: skip
    given = {"configs": ("train.json", "inference.json"), "depend": False} | given
    return packaged_readme(text, "a", meta, trained, dict.fromkeys(trained, "0f"), **given)


def test_the_page_gets_the_headings_of_the_zoo_and_loses_links_to_other_bundles() -> None:
    text = "# A\nsee [b](../../b/docs/README.md#c), bundles/a/configs\n\n## Limitations\nnone\n"
    made = page(text, {})
    assert "see b, a/configs" in made
    assert (
        made.index("## Additional Usage Steps") < made.index("## System Configuration") < made.index("## Limitations")
    )
    assert "train_expert.json" not in made
    assert "pip install" in page(text, {}, depend=True)
    made = page(text, {}, configs=("train.json", "train_expert.json"))
    assert made.index("a/configs/train_expert.json") < made.index("a/configs/train.json")


def test_the_page_says_of_each_trained_file_what_it_holds_and_how_it_is_sampled() -> None:
    linear, flow = {"beta_schedule": "linear"}, {"flow": "rectified"}
    made = page("# A\n", {
        "model.pt": {"stage": "diffusion", "contract": {"schedule": linear}},
        "model_rflow.pt": {"stage": "diffusion", "contract": {"schedule": flow}},
        "classifier_texture_rflow.pt": {"stage": "classifier", "contract": {"schedule": flow, "feature": "texture"}},
        "expert_a.pt": {"stage": "image_classifier", "contract": {}},
    })  # fmt: skip
    for row in (
        "| `model.pt` | diffusion | sampling | `0f` |",
        "| `model_rflow.pt` | rectified flow | sampling with `--model_file model_rflow.pt` | `0f` |",
        "| `classifier_texture_rflow.pt` | classifier of texture | sampling or training, with the others | `0f` |",
        "| `expert_a.pt` | image classifier | sampling or training, with the others | `0f` |",
    ):
        assert row in made.splitlines(), row
