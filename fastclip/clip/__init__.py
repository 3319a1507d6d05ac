"""CLIP models: configuration, image tower, text tower, and the pair. Nothing here imports the trainer."""
