"""The embedded model: its scenes, prompts, training and judge (assets/README.md)."""
