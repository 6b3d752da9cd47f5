"""The frozen CLIP taken apart; it knows no method."""
