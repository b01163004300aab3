"""The strings at the smallest size that has something to calibrate."""

import dataclasses

from ftlib.cgm.settings import STRINGS

SHORT_STRINGS = dataclasses.replace(
    STRINGS["cpu"], length=12, width=16, corpus=2048, helix_limits=(2, 4, 6)
)
