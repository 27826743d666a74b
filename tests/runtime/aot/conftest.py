from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small calls that threads share take a scheduler's tick each on a busy machine
    yield
    torch.set_num_threads(before)
