# SPDX-License-Identifier: Apache-2.0
"""What the thesis reports (JDM thesis, Tables 5.1 to 5.6), to be read beside one's own numbers."""

from __future__ import annotations

import html
import re

# Rows of mDice and mIoU in percent, by test set. The literature rows are those that the thesis copied.
_COLUMNS = {
    "polyps": ("kvasir", "clinicdb", "colondb", "cvc300", "etis"),
    "nuclei": ("monuseg",),
}
_ROWS: dict[str, dict[str, str]] = {
    "polyps": {
        "U-Net": "81.80 74.60 82.30 75.50 51.20 44.40 71.00 62.70 39.80 33.50",
        "ResUNet++": "81.30 79.30 79.60 79.60 - - - - - -",
        "PraNet": "89.80 84.00 89.90 84.90 70.90 64.00 87.10 79.71 62.80 56.70",
        "CaraNet": "91.80 86.50 93.60 88.70 77.30 68.90 90.30 83.80 74.70 67.20",
        "nnU-Net, real only": "90.81 85.16 88.54 83.91 76.62 69.39 85.35 77.84 69.21 62.14",
        "synthetic only 100 %": "85.87 78.71 77.40 70.66 72.26 65.53 82.11 74.56 60.96 53.28",
        "synthetic only 150 %": "86.50 79.76 77.46 70.28 71.50 64.77 81.93 74.24 58.19 51.22",
        "synthetic only 200 %": "86.36 79.60 77.69 71.06 70.77 64.10 81.38 73.63 57.66 50.60",
        "synthetic only 250 %": "87.08 80.41 78.01 71.49 72.07 65.44 81.94 74.28 60.40 53.18",
        "synthetic only 300 %": "86.00 78.96 78.21 71.70 71.15 64.25 81.56 73.67 59.05 51.75",
        "synthetic only 400 %": "84.52 77.28 77.19 70.39 69.94 63.15 81.47 73.16 58.08 50.43",
        "synthetic only 500 %": "83.84 76.69 77.93 71.35 68.50 62.14 81.27 73.41 56.93 49.14",
        "pretrained on 100 %": "91.02 85.60 90.21 85.61 77.58 70.80 87.49 80.81 71.71 65.06",
        "pretrained on 250 %": "90.81 85.51 89.31 84.87 77.90 71.16 87.61 81.09 72.10 65.21",
        "pretrained on 500 %": "91.22 85.89 91.85 87.18 78.19 70.89 86.73 79.93 74.61 67.67",
        "pretrained on 1000 %": "91.09 85.77 91.55 86.96 77.65 70.84 87.05 80.46 73.63 66.68",
    },
    "nuclei": {
        "U-Net++": "81.17 69.29",
        "Attention U-Net": "79.74 67.19",
        "MedT": "79.55 66.17",
        "UCTransUnet": "80.73 68.42",
        "SMESwin": "81.13 68.35",
        "nnU-Net, real only": "81.68 69.10",
        "synthetic only 100 %": "75.47 61.15",
        "synthetic only 150 %": "79.24 65.78",
        "synthetic only 200 %": "77.71 63.91",
        "synthetic only 250 %": "78.26 64.57",
        "synthetic only 300 %": "78.30 64.74",
        "synthetic only 400 %": "78.32 64.91",
        "synthetic only 500 %": "78.24 64.68",
        "synthetic only 1000 %": "77.56 63.77",
        "pretrained on 100 %": "81.13 68.36",
        "pretrained on 250 %": "81.57 68.98",
        "pretrained on 500 %": "81.80 69.30",
        "pretrained on 1000 %": "82.31 70.03",
    },
}


def reported(test: str) -> list[tuple[str, float, float]]:
    """Row, mDice and mIoU in percent that the thesis reports for a test set; empty for one that it has not.

    Args:
        test: name of the test set; case and punctuation do not matter ("CVC-300", "MoNuSeg").
    """
    name = re.sub(r"[^a-z0-9]", "", test.lower())
    for group, columns in _COLUMNS.items():
        if name in columns:
            place = 2 * columns.index(name)
            rows = ((row, values.split()[place : place + 2]) for row, values in _ROWS[group].items())
            return [(row, float(dice), float(iou)) for row, (dice, iou) in rows if dice != "-"]
    return []


def reported_html(test: str) -> str:
    """Those rows as a part of the report; nothing for a test set that the thesis has not."""
    rows = reported(test)
    if not rows:
        return ""
    lines = "".join(
        f"<tr><td>{html.escape(row)}</td><td>{dice:.2f}</td><td>{iou:.2f}</td></tr>" for row, dice, iou in rows
    )
    return (
        f"<h2>{html.escape(test)}: what the thesis reports</h2><p>One training per row (fine-tuning: mean of "
        "five folds), other sizes and lengths than here unless the preset is paper; the rows above nnU-Net are copied "
        f"from the literature.</p><table><tr><th></th><th>mDice</th><th>mIoU</th></tr>{lines}</table>"
    )
