# SPDX-License-Identifier: Apache-2.0
"""The text in which maps travel between the studio's page and its server."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from monai_synth.errors import UserError

if importlib.util.find_spec("gradio") is None:
    pytest.skip("gradio is not installed (the extra studio)", allow_module_level=True)

from monai_synth.studio.canvas import from_text, map_canvas, to_text


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (1, 1)])
def test_a_map_comes_back_from_its_text(size: tuple[int, int]) -> None:
    label = np.random.default_rng(0).integers(0, 8, size).astype(np.uint8)
    np.testing.assert_array_equal(from_text(to_text(label), size, 8), label)


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"size": [4, 4]},
        {"size": [4, 4], "runs": []},
        {"size": [4, 5], "runs": [[0, 20]]},
        {"size": [4, 4], "runs": [[0, 15]]},
        {"size": [4, 4], "runs": [[3, 16]]},
        {"size": [4, 4], "runs": [[-1, 16]]},
        {"size": [4, 4], "runs": [[0, 17], [1, -1]]},
        {"size": [4, 4], "runs": [[0, 2**62], [0, 2**62], [0, 2**62], [0, 2**62], [0, 16]]},
        {"size": [4, 4], "runs": [["a", 16]]},
        {"size": [4, 4], "runs": [[0]]},
        {"size": [4, 4], "runs": [[0, 2**70]]},
    ],
)
def test_what_is_no_map_of_the_model_is_refused(content: object) -> None:
    with pytest.raises(UserError, match="load the page again"):
        from_text(json.dumps(content), (4, 4), 3)


@pytest.mark.parametrize("text", ["", "{", None, 5])
def test_what_is_no_text_of_a_map_is_refused(text: object) -> None:
    with pytest.raises(UserError, match="load the page again"):
        from_text(text, (4, 4), 3)


def test_a_labels_name_is_never_taken_for_markup_or_a_template() -> None:
    names = ["background", "<b>`${alert(1)}`</b>{{value}}"]
    field = map_canvas("f", names, np.zeros((2, 3), np.uint8), np.zeros((4, 4), np.uint8))
    assert not set("`${\\") & set(field.html_template)
    assert "<b>" not in field.html_template
