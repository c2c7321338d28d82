# SPDX-License-Identifier: Apache-2.0
"""Trained files: written whole, checked before use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from monai_synth import checkpoint
from monai_synth.checkpoint import (
    build_network,
    differences,
    load_file,
    require_agreement,
    restore_network,
    save_atomic,
    trained_file,
)
from monai_synth.errors import UserError

ARCH = {
    "target": "monai_synth.networks.NoisyClassifier",
    "args": {
        "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": [4, 8], "num_res_blocks": 1,
        "attention_levels": [False, False], "num_head_channels": 4, "norm_num_groups": 4,
    },
}  # fmt: skip


def write(path: Path, **changes) -> torch.nn.Module:
    network = build_network(ARCH)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_atomic(trained_file("classifier", network, ARCH, {"image_size": [64, 64]}) | changes, path)
    return network.eval()


def test_a_restored_network_computes_what_the_saved_one_did(tmp_path: Path) -> None:
    network = write(tmp_path / "a.pt")
    restored = restore_network(load_file(tmp_path / "a.pt", stage="classifier"))
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([3, 500])
    assert torch.equal(restored(x, t), network(x, t))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_one_message_and_never_weights(tmp_path: Path, share: float) -> None:
    write(tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"a\.pt cannot be read .*delete it and train it again"):
        load_file(tmp_path / "a.pt")


def test_a_missing_file_names_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"no trained file .*model\.pt \(found there: other\.pt\)"):
        load_file(tmp_path / "model.pt")


def test_a_file_of_another_stage_or_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.pt")
    with pytest.raises(UserError, match="stage 'classifier', needed is 'diffusion'"):
        load_file(tmp_path / "a.pt", stage="diffusion")
    torch.save({"state_dict": {}}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="is not a monai_synth/1 file"):
        load_file(tmp_path / "b.pt")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Evil(), tmp_path / "a.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_file(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    wide = {"target": ARCH["target"], "args": ARCH["args"] | {"channels": [8, 16]}}
    write(tmp_path / "a.pt", arch=wide)
    with pytest.raises(UserError, match="do not fit"):
        restore_network(load_file(tmp_path / "a.pt"))


def test_only_networks_of_this_package_and_of_monai_are_built() -> None:
    with pytest.raises(UserError, match="is not in monai_synth.networks or monai.networks.nets"):
        build_network({"target": "os.system", "args": {}})
    with pytest.raises(UserError, match="cannot build network"):
        build_network({"target": ARCH["target"], "args": {"chanels": [1]}})


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()

    def full(*args) -> None:
        args[1].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match="No space left on device.*free some space"):
        save_atomic({}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_differences_name_both_values_at_any_depth() -> None:
    got = {"schedule": {"beta_end": 0.02, "steps": 1000}, "size": (64, 64)}
    expected = {"schedule": {"beta_end": 0.0205, "steps": 1000}, "size": [64, 64], "scale": 1.0}
    assert differences(got, expected) == [
        "schedule.beta_end: 0.02 there, 0.0205 here",
        "scale: None there, 1.0 here",
    ]
    with pytest.raises(UserError, match=r"model\.pt does not agree: schedule.beta_end: 0.02 there, 0.0205 here"):
        require_agreement(got, expected, "model.pt", "Train it again.")
