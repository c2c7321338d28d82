# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_synth`` is the command ``monai-synth``."""

from __future__ import annotations

import sys

from monai_synth.cli import main

if __name__ == "__main__":
    sys.exit(main())
