"""Data sets. Nothing here imports the trainer."""
