"""The CPU's fast path against the model itself, and that it steps aside where it must."""

import copy
import functools
import threading

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from builders import (
    BLT_VARIANTS,
    NGRAMS,
    byte_strings,
    ids_of,
    pack,
    random_byte_lm,
    random_ids,
    random_patched,
    stack_config,
)
from bytelm import cpu
from bytelm.inference import Session
from bytelm.kernels import projections
from bytelm.model.attention import StackSpec
from bytelm.model.layers import Block, FeedForward, build_blocks
from bytelm.patching import StaticRule

GROUPED = {"num_heads": 4, "num_kv_heads": 2}
MODELS = {
    **{name: (lambda name=name: random_patched(name)) for name in BLT_VARIANTS},
    "transformer": random_byte_lm,
    "grouped heads": lambda: random_byte_lm(**GROUPED, norm_eps=1e-3),
    "wide heads": lambda: random_byte_lm(**GROUPED, head_dim=12, hash_embeddings=NGRAMS),
    "biases": lambda: random_byte_lm(qkv_bias=True, ffn_bias=True),
    "qk norms, halves": lambda: random_byte_lm(qk_norm=True, rope_layout="half"),
}


# One of each way to fuse; the rest are in the slow stage.
SOME = {"base", "all layers", "no cross-attention", "many tables", "wide heads", "biases"}
SOME |= {"transformer", "qk norms, halves"}


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in MODELS],
    scope="module",
)
def models(request):
    """A model, and the same one fused."""
    plain = MODELS[request.param]()
    return plain, cpu.fuse(copy.deepcopy(plain))


@pytest.fixture(params=[3, pytest.param(1024, marks=pytest.mark.slow)])
def chunk(request, monkeypatch):
    """Chunks far smaller than the rows, and larger."""
    monkeypatch.setattr("bytelm.kernels.segments.CHUNK", request.param)
    small = functools.partial(projections.row_chunks, size=request.param)
    monkeypatch.setattr(projections, "row_chunks", small)


def logits_and_gradients(model, ids, documents):
    model.zero_grad()
    logits = model(ids, documents)
    generator = torch.Generator().manual_seed(5)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


@pytest.mark.usefixtures("chunk")
def test_a_fused_model_equals_the_model_with_gradients(models):
    plain, fused = models

    @given(st.lists(byte_strings, min_size=1, max_size=3))
    def check(documents):
        ids, numbers = pack([ids_of(d) for d in documents])
        expected, gradients = logits_and_gradients(plain, ids[None], numbers[None])
        logits, fused_gradients = logits_and_gradients(fused, ids[None], numbers[None])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)
        assert gradients.keys() == fused_gradients.keys()
        for name, gradient in gradients.items():
            scale = gradient.abs().max().clamp(min=1.0)
            torch.testing.assert_close(
                fused_gradients[name] / scale, gradient / scale, rtol=1e-4, atol=1e-4, msg=name
            )

    check()


def test_a_fused_session_equals_the_models(models):
    plain, fused = models

    @given(byte_strings)
    def check(document):
        ids = ids_of(document)
        expected, session = Session(plain), Session(fused)
        for piece in ids.split(1):
            torch.testing.assert_close(
                session.feed(piece), expected.feed(piece), rtol=1e-4, atol=2e-5
            )

    check()


def test_fusing_is_undone(models):
    plain, fused = models
    again = cpu.unfuse(copy.deepcopy(fused))
    assert not any("forward" in module.__dict__ for module in again.modules())
    ids = random_ids(40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids), plain(ids))
    assert cpu.fuse(again) is again


def test_state_dicts_do_not_change(models):
    plain, fused = models
    assert plain.state_dict().keys() == fused.state_dict().keys()


def test_copies_of_a_fused_model_are_their_own():
    model = cpu.fuse(random_patched())
    Session(model).feed(random_ids(9))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    ids = random_ids(30)
    for one in (model, other):
        fed = torch.cat([session.feed(p) for session in [Session(one)] for p in ids.split(1)])
        with torch.no_grad():
            torch.testing.assert_close(fed, one(ids[None])[0], rtol=1e-4, atol=5e-5)


def generated(model, ids=None):
    """Logits of a prompt and of bytes one by one."""
    session = Session(model)
    ids = random_ids(24) if ids is None else ids
    return torch.cat([session.feed(ids[:10]), *(session.feed(p) for p in ids[10:].split(1))])


class Lora(nn.Module):
    """A frozen linear layer and a low-rank addition to it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(7)
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, rank, generator=generator))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


LINEARS = linears(random_patched("all layers"))


def replace(model, name, wrap):
    parent, _, leaf = name.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, leaf, wrap(holder.get_submodule(leaf)))


@pytest.mark.parametrize("name", LINEARS)
def test_any_linear_layer_can_be_wrapped_also_in_generation(name):
    """As LoRA does it: the wrapped model equals one whose matrix is the sum."""
    model = cpu.fuse(random_patched("all layers"))
    ids = random_ids(24)
    before = generated(model)  # and what single bytes rely on is made
    merged = copy.deepcopy(model)
    replace(model, name, Lora)
    lora = model.get_submodule(name)
    with torch.no_grad():
        merged.get_submodule(name).weight += lora.up @ lora.down
    if name.startswith("scorer"):
        # Entropies decide the patches: compare what they are, not what follows.
        with torch.no_grad():
            wrapped, expected = (one.scorer.entropies(ids[None]) for one in (model, merged))
        torch.testing.assert_close(wrapped, expected, rtol=1e-3, atol=1e-4)
        return
    after = generated(model)
    torch.testing.assert_close(after, generated(merged), rtol=1e-3, atol=1e-3)
    is_read = "decoder.cross_attention" not in name or model.blt.decoder.slots > 1
    assert (after - before).abs().max() > 1e-4 or not is_read
    for one in (model, merged):
        with torch.no_grad():
            torch.testing.assert_close(after, one(ids[None])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", LINEARS)
def test_a_wrapped_layer_is_trained_alone(name):
    if name.startswith("scorer"):
        pytest.skip("a scorer is not trained with the model")
    model = cpu.fuse(random_patched("all layers")).requires_grad_(False)
    replace(model, name, Lora)
    model(random_ids(24)[None]).logsumexp(-1).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {f"{name}.down", f"{name}.up"}


MODULES = [name for name, _ in random_patched("all layers").named_modules()]
# Called by methods of their own, or containers: these are not called as modules.
NOT_CALLED = ("blocks", "cross_attention")


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "global"])
def test_forward_hooks_fire_in_rows_and_sessions(kind):
    model = cpu.fuse(random_patched("all layers"))
    generated(model)
    fired = set()
    names = {module: name for name, module in model.named_modules()}

    def hook(module, *_):
        fired.add(names.get(module))

    if kind == "global":
        handles = [nn.modules.module.register_module_forward_hook(hook)]
    else:
        handles = [getattr(module, f"register_{kind}_hook")(hook) for module in model.modules()]
    try:
        for run in (lambda: model(random_ids(24)[None]), lambda: generated(model)):
            fired.clear()
            run()
            expected = {n for n in MODULES if not n.endswith(NOT_CALLED)}
            # A session calls the parts of a model, not the model.
            missing = expected - fired - {"", "blt", "scorer", "scorer.transformer"}
            assert not missing
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_registered_in_the_middle_of_a_document_fire():
    model = cpu.fuse(random_patched("all layers", rule=StaticRule(1)))
    ids = random_ids(14)
    session = Session(model)
    session.feed(ids[:10])
    session.feed(ids[10:11])
    copied = session.fork()
    fired = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    for one in (session, copied):
        fired.clear()
        one.feed(ids[11:12])
        inner = {n for n in MODULES if n.startswith("blt.") and not n.endswith(NOT_CALLED)}
        assert inner <= fired


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def override(linear):
    own = linear.forward
    linear.forward = lambda x: 2 * own(x)


CHANGES = {
    "another class": lambda linear: setattr(linear, "__class__", Doubled),
    "a forward pass of the instance": override,
    "a bias": lambda linear: setattr(linear, "bias", nn.Parameter(torch.ones(linear.out_features))),
    "a parametrization": lambda linear: parametrizations.spectral_norm(linear),
    "pruning": lambda linear: prune.random_unstructured(linear, "weight", 0.5),
    "weights elsewhere": lambda linear: cpu_offload(linear, torch.device("cpu")),
}


@pytest.mark.parametrize("layer", ["attention.qkv", "attention.out", "feed_forward.down"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_are_called_as_in_the_unfused_model(change, layer):
    model = cpu.fuse(random_byte_lm().eval())
    ids = random_ids(24)
    before = generated(model, ids)
    CHANGES[change](model.transformer.blocks[1].get_submodule(layer))
    with torch.no_grad():
        rows, session = model(ids[None])[0], generated(model, ids)
        plain = cpu.unfuse(model)(ids[None])[0]
    torch.testing.assert_close(rows, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(session, plain, rtol=1e-4, atol=1e-5)
    assert torch.allclose(before, plain, atol=1e-3) == (change == "weights elsewhere")


def test_a_subclass_keeps_its_own_forward_pass():
    model = random_byte_lm()
    model.transformer.blocks[0].feed_forward.__class__ = type(
        "Silent", (FeedForward,), {"forward": lambda self, x: torch.zeros_like(x)}
    )
    ids = random_ids(24)
    expected = model(ids[None])
    torch.testing.assert_close(cpu.fuse(model)(ids[None]), expected, rtol=1e-4, atol=1e-5)


def test_a_context_may_be_passed_by_name():
    encoder = cpu.fuse(random_patched()).blt.encoder
    positions = torch.arange(12)[None]
    x = encoder.embedding(random_ids(12)[None], positions)
    context = encoder.spec.over_rows(torch.zeros_like(positions), positions)
    for named, placed in zip(encoder(x, context=context), encoder(x, context), strict=True):
        assert torch.equal(named, placed)


def test_hooks_may_change_what_layers_return():
    model = cpu.fuse(random_patched())
    before = generated(model)
    block = model.blt.decoder.blocks[0]
    handle = block.feed_forward_norm.register_forward_hook(lambda module, inputs, out: out * 0)
    assert not torch.allclose(generated(model), before)
    handle.remove()
    torch.testing.assert_close(generated(model), before)


def test_weights_that_move_are_noticed():
    """Their transposed views, which single bytes use, would be of the old memory."""
    model = cpu.fuse(random_patched())
    ids = random_ids(24)
    generated(model)
    for parameter in model.blt.parameters():
        parameter.data = parameter.data * 1.1
    with torch.no_grad():
        torch.testing.assert_close(generated(model), model(ids[None])[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_computed_in(dtype):
    model = cpu.fuse(random_byte_lm()).to(dtype)
    ids = random_ids(24)
    logits = generated(model, ids)
    with torch.no_grad():
        tolerance = 1e-5 if dtype == torch.float64 else 0.1
        torch.testing.assert_close(logits, model(ids[None])[0], rtol=tolerance, atol=tolerance)


def test_sessions_in_several_threads_do_not_disturb_one_another():
    model = cpu.fuse(random_patched())
    documents = [random_ids(60, seed=n) for n in range(4)]
    expected = [generated(model, ids) for ids in documents]
    results = [None] * len(documents)

    def run(n):
        for _ in range(3):
            results[n] = generated(model, documents[n])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(documents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, one in zip(results, expected, strict=True):
        assert torch.equal(result, one)


def test_fused_layers_keep_little_for_the_backward_pass():
    """Nothing of the width of the hidden layer, and no normalised copies."""
    config = stack_config(dim=32, ffn_dim=512)
    blocks = build_blocks(config)
    for block in blocks:
        assert isinstance(block, Block)
    x = torch.randn(1, 256, 32, requires_grad=True)
    spec = StackSpec.of(config, 8)
    context = spec.over_rows(torch.zeros(1, 256, dtype=torch.long), torch.arange(256)[None])

    def kept(fused):
        (cpu.fuse if fused else cpu.unfuse)(blocks)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.untyped_storage().nbytes()) or t, lambda t: t
        ):
            y = x
            for layer, block in enumerate(blocks):
                y = block(y, context[layer])
        return sum(sizes)

    weights = sum(4 * p.numel() for p in blocks.parameters())
    assert (kept(True) - weights) * 4 < kept(False) - weights
