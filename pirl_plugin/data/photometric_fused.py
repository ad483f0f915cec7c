"""Fast path of the photometric programs."""

from __future__ import annotations

from pirl_plugin.data import photometric
from pirl_plugin.data.photometric import ByteArray, Programs

FUSED_AVAILABLE = False


def apply_programs(images: ByteArray, programs: Programs, fast: bool = True) -> ByteArray:
    """See ``photometric.apply_programs``."""
    return photometric.apply_programs(images, programs)
