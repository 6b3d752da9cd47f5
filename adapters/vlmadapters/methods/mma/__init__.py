"""The Multi-Modal Adapter (MMA, CVPR 2024)."""
