# SPDX-License-Identifier: Apache-2.0
"""The one exception for failures that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A failure that a user caused and can mend.

    The message says what was got, what is allowed and how to mend it; command lines print it without a traceback.
    """
