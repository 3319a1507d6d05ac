"""What a model knows: zero-shot classification, retrieval, search and probes. Nothing here imports the trainer."""
