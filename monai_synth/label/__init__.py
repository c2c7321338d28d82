# SPDX-License-Identifier: Apache-2.0
"""Bundles behind a MONAI Label server; only :mod:`monai_synth.label.app` needs MONAI Label itself."""
