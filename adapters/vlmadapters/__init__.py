"""The Multi-Modal Adapter (MMA, CVPR 2024): attach, train and evaluate at any placement."""

from __future__ import annotations
