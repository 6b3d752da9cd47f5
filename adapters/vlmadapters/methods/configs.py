"""Settings of the methods that ship, beside MMA's; they import no torch, so that a command line can
check them at once.
"""

from __future__ import annotations
