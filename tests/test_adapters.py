"""What is applied to a model from outside: adapters, quantised weights, sharding.

Each is the field's own library, on a model as it is loaded for use, whose passes are fused. That
fused passes step aside for hooks and wrapped layers is tested in test_cpu.py.
"""

import copy
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from builders import blt_config, random_byte_lm, random_ids, random_patched
from bytelm import cpu
from bytelm.checkpoint import load_model, save_model
from bytelm.config import ModelDescription, StaticPatching
from bytelm.inference import Session
from bytelm.model.layers import Block
from bytelm.patching import StaticRule

peft = pytest.importorskip("peft")
with warnings.catch_warnings():
    # It looks for GPU kernels when it is imported.
    warnings.simplefilter("ignore")
    quantization = pytest.importorskip("torchao.quantization")

IDS = random_ids(40)


@pytest.fixture
def model():
    """A model with the same patches whatever its weights: entropies are not to be changed."""
    return cpu.fuse(random_patched("all layers", rule=StaticRule(3)))


def generated(model):
    """Logits of a prompt and of bytes one by one."""
    session = Session(model)
    return torch.cat([session.feed(IDS[:10]), *(session.feed(p) for p in IDS[10:].split(1))])


def full(model):
    with torch.no_grad():
        return model(IDS[None])[0]


# LoRA -------------------------------------------------------------------------------------------


def with_lora(blt):
    leaves = {n.rpartition(".")[2] for n, m in blt.named_modules() if isinstance(m, nn.Linear)}
    config = peft.LoraConfig(r=2, target_modules=sorted(leaves), init_lora_weights=False)
    peft.inject_adapter_in_model(config, blt)


def test_peft_adapts_every_linear_layer_also_in_generation(model):
    before = generated(model)
    with_lora(model.blt)
    after = generated(model)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, full(model), rtol=1e-3, atol=1e-3)
    for module in model.blt.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
    torch.testing.assert_close(generated(model), after, rtol=1e-3, atol=1e-3)


def test_peft_trains_the_adapters_alone(model):
    with_lora(model.blt)
    model(IDS[None]).logsumexp(-1).sum().backward()
    trained = {n for n, p in model.blt.named_parameters() if p.grad is not None and p.grad.any()}
    adapters = {n for n, _ in model.blt.named_parameters() if "lora_" in n}
    assert trained == adapters
    assert len(adapters) == 2 * sum(
        isinstance(m, peft.tuners.lora.Linear) for m in model.blt.modules()
    )


# Quantised weights ------------------------------------------------------------------------------


def quantize(module):
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())


def quantised(model):
    quantize(model.blt.global_model)
    weight = model.blt.global_model.blocks[0].attention.qkv.weight
    assert weight.qdata.dtype == torch.int8
    return model


def test_a_loaded_model_runs_with_an_int8_global_model(model, tmp_path):
    patching = StaticPatching(length=3)
    description = ModelDescription(model=blt_config("all layers"), patching=patching)
    save_model(tmp_path / "m", model, description)
    loaded, _ = load_model(tmp_path / "m")
    expected = generated(loaded)
    found = generated(quantised(loaded))
    # Eight bits a weight: close to what it was, and not the same.
    assert 0 < (found - expected).abs().max() < 0.2
    torch.testing.assert_close(found, full(loaded), rtol=1e-4, atol=1e-4)


def test_a_quantised_state_dict_is_loaded(model, tmp_path):
    found = generated(quantised(model))
    torch.save(model.blt.state_dict(), tmp_path / "weights")
    other = quantised(cpu.fuse(random_patched("all layers", rule=StaticRule(3), seed=9)))
    assert (generated(other) - found).abs().max() > 0.1
    weights = torch.load(tmp_path / "weights", weights_only=True)
    other.blt.load_state_dict(weights, assign=True)
    assert torch.equal(generated(other), found)


def test_a_quantised_transformer_generates():
    model = cpu.fuse(random_byte_lm())
    expected = generated(model)
    quantize(model.transformer)
    found = generated(model)
    assert 0 < (found - expected).abs().max() < 0.3
    torch.testing.assert_close(found, full(model), rtol=1e-4, atol=1e-4)


# Sharding ---------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path):
    """One process, in which what is sharded is whole."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_fsdp_shards_inner_modules_and_training_is_the_same(model, mesh):
    plain = copy.deepcopy(model)
    for module in model.blt.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model.blt, mesh=mesh)
    optimizers = [torch.optim.SGD(one.blt.parameters(), lr=0.01) for one in (model, plain)]
    for _ in range(3):
        losses = []
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss = one(IDS[None]).logsumexp(-1).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for sharded, parameter in zip(model.blt.parameters(), plain.blt.parameters(), strict=True):
        torch.testing.assert_close(sharded.full_tensor(), parameter, rtol=1e-5, atol=1e-6)
