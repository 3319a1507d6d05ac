"""Import this before OpenCLIP or transformers' CLIP: both import torchvision, whose wheel may not fit this torch."""

from fastclip.benchmarks.foreign import stand_in_for_torchvision

LIBRARY = stand_in_for_torchvision()  # kept: its definitions go when it is collected
