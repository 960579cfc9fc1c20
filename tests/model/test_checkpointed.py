import copy

import pytest
import torch

from src.model.transformer import checkpointed
from tests.builders import ATTENTION_CASES, FFN_CASES, transformer


def kept_bytes(model, tokens):
    """Bytes that the forward pass keeps for the backward pass, parameters apart, and its loss."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(tokens)
    return sum(kept.values()), logits


@pytest.mark.parametrize("attention", ATTENTION_CASES)
@pytest.mark.parametrize("ffn", FFN_CASES)
def test_gradients_counts_and_losses_are_bitwise_the_same(attention, ffn):
    plain = transformer(attention=ATTENTION_CASES[attention], ffn=FFN_CASES[ffn], max_seq_len=16)
    again = copy.deepcopy(plain)
    again.checkpoint_blocks = True
    tokens = torch.randint(plain.head.out_features, (2, 16))
    for model in (plain, again):
        loss = model(tokens).square().mean() + sum(model.extra_losses().values(), torch.zeros(()))
        loss.backward()
        model.finish_batch()
        model.finish_step(applied=True)
    for (name, one), two in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.equal(one.grad, two.grad), name
    for one, two in zip(plain.routers(), again.routers(), strict=True):
        assert torch.equal(one.last_counts_E, two.last_counts_E)
        assert torch.equal(one.bias_E, two.bias_E)
        assert one.router_stats() == two.router_stats()


def test_it_keeps_the_inputs_of_blocks_alone():
    model = transformer(max_seq_len=64)
    tokens = torch.randint(model.head.out_features, (4, 64))
    plain, _ = kept_bytes(model, tokens)
    model.checkpoint_blocks = True
    less, logits = kept_bytes(model, tokens)
    assert less < plain / 3
    logits.sum().backward()
    with torch.no_grad():
        assert torch.equal(model(tokens), logits)


def test_a_block_that_fails_the_second_time_leaves_its_routers_counting():
    model = transformer(ffn=FFN_CASES["moe"], max_seq_len=8)
    block, calls = model.blocks()[0], []

    def fail(module, args):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no")

    block.register_forward_pre_hook(fail)
    x = torch.randn(1, 8, model.head.in_features, requires_grad=True)
    out = checkpointed(block, x, model.rope(8))
    with pytest.raises(RuntimeError, match="no"):
        out.sum().backward()
    assert not any(router.is_recomputing for router in model.routers())
