"""Several processes under torchrun, gloo on the CPU: DDP, FSDP2, a killed rank, another number of processes."""

import os
import re
import signal
import time

import pytest
import torch
from tiny import assert_same, command, start, torchrun, wait_for_records, weights

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def finish(process, code=0):
    said, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    return said, errors
