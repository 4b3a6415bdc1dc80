"""Hand-worked sums: bytes a weight by strategy."""

import pytest

from llmrl.footprint import footprint


@pytest.mark.parametrize(
    ("keys", "device", "cpu"),
    [
        ({}, 18.0, 0),  # bf16: 2 weights + 4 gradients + 4 masters + 8 moments
        ({"bf16": False}, 16.0, 0),  # fp32: 4 + 4 + 8
        ({"reference": True}, 20.0, 0),
        ({"strategy": "zero1", "world": 8, "replica": False}, 2 + 4 + 12 / 8, 0),
        ({"strategy": "zero2", "world": 8}, 2 + 4 / 8 + 12 / 8 + 2, 0),
        ({"strategy": "zero3", "world": 8, "replica": False}, 18 / 8, 0),
        ({"strategy": "zero3", "world": 8}, 18 / 8 + 2, 0),  # and the copy that generates
        ({"strategy": "fsdp2", "world": 8, "replica": False}, 16 / 8, 0),
        ({"strategy": "fsdp2", "world": 8, "replica": False, "reference": True}, 20 / 8, 0),
        ({"strategy": "zero2", "world": 8, "offload": True, "replica": False}, 2 + 4 / 8, 12 / 8),
        ({"strategy": "zero3", "world": 8, "offload": True, "replica": False}, 4 / 8, 14 / 8),
        ({"bf16": False, "strategy": "zero3", "world": 4, "replica": False}, 20 / 4, 0),  # DeepSpeed keeps masters in fp32 too
        ({"learning": 0.01e9}, 2 * 1.01 + 0.01 * 16, 0),  # LoRA: 1 % adapters
        ({"learning": 0.01e9, "reference": True}, 2 * 1.01 + 0.01 * 16, 0),  # its reference is the model without them
    ],
)
def test_bytes_of_a_billion_weights(keys, device, cpu):
    found = footprint(1e9, **keys)
    assert found.device == pytest.approx(device) and found.cpu == pytest.approx(cpu)
