"""The few-shot draw, prompts, images and tasks."""
