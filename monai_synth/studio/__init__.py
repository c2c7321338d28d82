# SPDX-License-Identifier: Apache-2.0
"""A local page for sampling without code. Everything but ``page`` and ``server`` works without a user interface."""
