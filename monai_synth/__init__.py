# SPDX-License-Identifier: Apache-2.0
"""MONAI bundles that synthesize labelled medical images with diffusion models."""

__version__ = "0.1.0"
