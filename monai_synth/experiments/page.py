# SPDX-License-Identifier: Apache-2.0
"""The pages of experiments, by the name they had before evaluations shared them; see `monai_synth.page`."""

from monai_synth.page import answer_html, image_html, page, settings_html, table_html, warnings_html

__all__ = ["answer_html", "image_html", "page", "settings_html", "table_html", "warnings_html"]
