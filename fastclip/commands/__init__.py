"""The commands of `fastclip`: one file and one frozen dataclass each, with a run method that imports what it needs."""
