"""What is wrong in `transformers`' BLT, by properties that it should have and ours has.

Both have the same random weights. Nothing here compares the two: each is held against itself, a
batch against its rows, a cache against the full forward pass. `docs/fidelity.md` lists the faults,
and its code is run here. A test that fails with "fixed upstream" has met a version without one.
"""

import re
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import bytelm
from builders import LargestTensor, pack, random_ids
from bytelm import codec, interop
from bytelm.errors import CheckpointError
from bytelm.inference import Session
from bytelm.patching import Patcher, SpaceRule, StaticRule
from foreign import hf_model, save_official

CLOSE, FAR = 1e-4, 0.1
LIMIT = 3


def is_fault(is_wrong, fault):
    if not is_wrong:
        pytest.fail(f"fixed upstream: update docs/fidelity.md ({fault})")


def document(length, seed=3):
    return torch.cat([torch.tensor([codec.BOS]), random_ids(length - 1, seed)])


def gap(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def logits(theirs, ids, **options):
    with torch.no_grad():
        return theirs(ids, use_cache=False, **options).logits


def imported(theirs, folder):
    theirs.save_pretrained(folder)
    return interop.import_hf(folder)


@pytest.fixture(scope="module")
def theirs():
    return hf_model()


@pytest.fixture(scope="module")
def lm(theirs, tmp_path_factory):
    return imported(theirs, tmp_path_factory.mktemp("faults") / "hf")


@pytest.fixture
def limited(tmp_path):
    """Both, with a longest patch."""
    theirs = hf_model()
    theirs.config.max_patch_length = LIMIT
    ours = imported(theirs, tmp_path / "hf").module
    assert ours.patcher.max_length == LIMIT
    return ours, theirs


def test_the_default_call_works(lm, theirs):
    ids = document(30)[None]
    for call in (theirs, lambda ids: theirs.generate(ids, max_new_tokens=2)):
        try:
            call(ids)
        except AttributeError as error:
            is_fault("num_hidden_layers" in str(error), "default call")
        else:
            is_fault(False, "default call")
    assert len(lm.generate(b"prompt", max_bytes=2)) == 2


@pytest.mark.parametrize("pieces", [(40, *[1] * 20), (30, 30)], ids=["bytes", "halves"])
def test_cached_steps_equal_one_full_forward(lm, theirs, pieces):
    ids = document(60)
    cache = transformers.EncoderDecoderCache(
        transformers.DynamicCache(), transformers.DynamicCache()
    )
    with torch.no_grad():
        steps = [
            theirs(piece[None], past_key_values=cache, use_cache=True).logits[0]
            for piece in ids.split(pieces)
        ]
    is_fault(gap(torch.cat(steps), logits(theirs, ids[None])[0]) > FAR, "cache")

    session = Session(lm.module)
    steps = [session.feed(piece) for piece in ids.split(pieces)]
    assert gap(torch.cat(steps), lm.module(ids[None])[0]) < CLOSE


DOCUMENTS = [document(30), document(55), document(88)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(theirs, side):
    length = max(map(len, DOCUMENTS))
    for ids in DOCUMENTS[:-1]:
        begin = length - len(ids) if side == "left" else 0
        used = slice(begin, begin + len(ids))
        row, mask = torch.zeros(2, length, dtype=torch.long)
        row[used], mask[used] = ids, 1
        padded = logits(theirs, row[None], attention_mask=mask[None])[0, used]
        difference = gap(padded, logits(theirs, ids[None])[0])
        if side == "left":
            is_fault(difference > FAR, "padding on the left")
        else:
            assert difference < CLOSE


def test_our_ragged_batch_equals_each_row_alone(lm):
    length = max(map(len, DOCUMENTS)) + 5
    rows = zip(*(pack([ids], length) for ids in DOCUMENTS), strict=True)
    batch = lm.module(*map(torch.stack, rows))
    for row, ids in zip(batch, DOCUMENTS, strict=True):
        assert gap(row[: len(ids)], lm.module(ids[None])[0]) < CLOSE


def packing_options(first, second):
    """The ways of telling them of two documents in a row."""
    positions = torch.cat([torch.arange(first), torch.arange(second)])
    number = torch.arange(2).repeat_interleave(torch.tensor([first, second]))
    distance = torch.arange(first + second)[:, None] - torch.arange(first + second)
    seen = (number[:, None] == number) & (distance >= 0) & (distance < 8)
    return {
        "nothing": {},
        "positions that restart": {"position_ids": positions[None]},
        "a mask of documents": {
            "position_ids": positions[None],
            "attention_mask": seen[None, None],
        },
    }


@pytest.mark.parametrize("way", packing_options(1, 1))
def test_a_packed_document_does_not_move_when_the_one_before_changes(lm, theirs, way):
    first, other, second = document(40, seed=1), document(40, seed=2), document(48)
    options = packing_options(len(first), len(second))[way]
    (one, numbers), (two, _) = (pack([before, second]) for before in (first, other))
    a, b = (logits(theirs, ids[None], **options)[0, len(first) :] for ids in (one, two))
    is_fault(gap(a, b) > FAR, "packed documents")

    a, b = (lm.module(ids[None], numbers[None])[0, len(first) :] for ids in (one, two))
    assert gap(a, b) < CLOSE
    assert gap(a, lm.module(second[None])[0]) < CLOSE


def test_with_a_longest_patch_a_prefix_has_the_logits_of_the_whole(limited):
    ours, theirs = limited
    ids = document(88)[None]
    ends = range(2, 88, 4)
    full = logits(theirs, ids)[0]
    gaps = [gap(logits(theirs, ids[:, :end])[0, -1], full[end - 1]) for end in ends]
    is_fault(sum(g > FAR for g in gaps) > 3, "longest patch, prefixes")

    full = ours(ids)[0]
    assert max(gap(ours(ids[:, :end])[0, -1], full[end - 1]) for end in ends) < CLOSE


def test_with_a_longest_patch_a_batch_has_the_logits_of_its_rows(limited):
    ours, theirs = limited
    batch = torch.stack([document(88, seed) for seed in range(4)])
    alone = torch.cat([logits(theirs, row[None]) for row in batch])
    is_fault(gap(logits(theirs, batch), alone) > FAR, "longest patch, batches")
    theirs.config.max_patch_length = None
    alone = torch.cat([logits(theirs, row[None]) for row in batch])
    assert gap(logits(theirs, batch), alone) < CLOSE
    assert gap(ours(batch), torch.cat([ours(row[None]) for row in batch])) < CLOSE


@pytest.mark.parametrize("mode", ["static", "space", "bpe", "no such mode"])
def test_a_patching_mode_is_followed_or_refused(tmp_path, mode):
    ids = document(88)[None]
    theirs = hf_model()
    theirs.config.patching_mode = mode
    latents = []
    theirs.model.global_transformer.register_forward_hook(
        lambda module, args, out: latents.append(out.shape[1])
    )
    logits(theirs, ids)
    is_fault(latents[0] >= ids.shape[1], "patching modes")

    theirs.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="patching_mode"):
        interop.import_hf(tmp_path / "hf")
    for rule in (StaticRule(4), SpaceRule()):
        assert Patcher(rule).next_boundary(ids).sum() < ids.shape[1] / 1.5


def test_every_encoder_cross_attention_takes_part(tmp_path):
    theirs = hf_model(encoder_layers=3, encoder_all=True)
    *earlier, _ = theirs.model.local_encoder.cross_attn_layers
    ids = document(60)[None]
    lm = interop.import_official(*save_official(theirs, tmp_path / "official"))
    before = logits(theirs, ids)
    for parameter in torch.nn.ModuleList(earlier).parameters():
        torch.nn.init.normal_(parameter)
    is_fault(torch.equal(logits(theirs, ids), before), "earlier cross-attention of the encoder")

    layers = lm.module.blt.encoder.cross_attention.requires_grad_(True)
    lm.module(ids).logsumexp(-1).sum().backward()
    assert len(layers) == 3
    assert all(p.grad.abs().sum() > 0 for p in layers.parameters())
    theirs.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="pools again"):
        interop.import_hf(tmp_path / "hf")


def test_the_entropy_model_can_be_trained(lm):
    theirs, ids = hf_model(), document(60)[None]
    patcher = theirs.model.patcher
    is_fault(not any(p.requires_grad for p in patcher.parameters()), "frozen entropy model")
    patcher.requires_grad_(True)
    theirs(ids, labels=ids, use_cache=False).loss.backward()
    is_fault(all(p.grad is None for p in patcher.parameters()), "untrained entropy model")

    scorer = lm.module.scorer.transformer.requires_grad_(True)
    cross_entropy(scorer(ids)[0, :-1], ids[0, 1:]).backward()
    assert all(p.grad.abs().sum() > 0 for p in scorer.parameters())
    scorer.requires_grad_(False)


def test_memory_is_linear_in_the_number_of_bytes(lm, theirs):
    def largest(model, length):
        with torch.no_grad(), LargestTensor() as watch:
            model(document(length)[None])
        return watch.num_bytes

    growth = largest(lambda ids: logits(theirs, ids), 1024) / largest(
        lambda ids: logits(theirs, ids), 512
    )
    is_fault(growth > 3.5, "quadratic masks")
    assert largest(lm.module, 1024) / largest(lm.module, 512) < 2.1


def test_patches_do_not_depend_on_the_precision_of_the_weights_in_use(lm, tmp_path):
    theirs, ids = hf_model(), document(1000)[None]
    with torch.no_grad():  # rounded once, then computed in both
        low = theirs.bfloat16().model.patcher(ids)[0]
        high = theirs.float().model.patcher(ids)[0]
    threshold = theirs.config.patching_threshold
    is_fault(((low > threshold) != (high > threshold)).sum() > 5, "entropies in bf16")

    lm.save(tmp_path / "saved")
    half, full = (
        bytelm.load(tmp_path / "saved", "cpu", precision).module
        for precision in ("bfloat16", "float32")
    )
    assert half.blt.decoder.output.weight.dtype == torch.bfloat16
    assert torch.equal(half.segment(ids).entropies, full.segment(ids).entropies)


PAGE = (Path(__file__).parents[1] / "docs" / "fidelity.md").read_text("utf-8")
PREAMBLE, *BLOCKS = [
    pytest.param(block, id=section.split("\n")[0])
    for section in re.split("^#+ ", PAGE, flags=re.MULTILINE)
    for block in re.findall("```python\n(.*?)```", section, re.DOTALL)
]


def same_output(printed, quoted):
    """Words equal, and numbers but for a factor of two or rounding errors."""

    def same(a, b):
        try:
            a, b = abs(float(a)), abs(float(b))
        except ValueError:
            return a == b
        return max(a, b) < CLOSE or max(a, b) < 2 * min(a, b)

    printed, quoted = printed.split(), quoted.split()
    return len(printed) == len(quoted) and all(map(same, printed, quoted))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_on_the_page_prints_what_the_page_says(block, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    statement, quoted = block.strip().split("\n")[-1].split("  # ")
    assert statement.lstrip().startswith("print(")
    exec(compile(PREAMBLE.values[0] + block, "fidelity.md", "exec"), {})
    printed = capsys.readouterr().out.strip()
    if not same_output(printed, quoted):
        pytest.fail(f"fixed upstream: update docs/fidelity.md ({printed!r} and not {quoted!r})")
