"""Distillation: what a student is taught at each byte, and runs that resume."""

import json
from contextlib import contextmanager

import pytest
import torch

import bytelm
from bytelm import codec
from bytelm.byteify.boundaries import divide
from bytelm.byteify.cache import read_shard
from bytelm.byteify.course import Lessons
from bytelm.byteify.distil import distil
from bytelm.byteify.donor import open_donor
from bytelm.byteify.lessons import Teacher, donor_latents, groups
from bytelm.byteify.teacher import read_vocabulary
from bytelm.byteify.transplant import transplant
from bytelm.checkpoint import load_model, read_config
from bytelm.config import InitConfig, StaticPatching
from bytelm.errors import CheckpointError, ConfigError, DataError
from bytelm.layout import saved_steps
from bytelm.lm import build_lm
from bytelm.patching import build_patcher, build_patches, row_positions
from bytelm.progress import Progress
from bytelm.training.initial import load_initial
from commands import invoke
from test_byteify import SMALL, TEXT, blocks_of, save_donor

LESSONS = Lessons(
    read_bytes=10_500,
    encoder_steps=4,
    parts_steps=6,
    together_steps=4,
    row_bytes=500,
    save_every=3,
    parts_rate=5e-3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_donor(tmp_path_factory.mktemp("donor"), "llama 3.1")


@pytest.fixture(scope="module")
def donor(folder):
    return open_donor(folder)


@pytest.fixture(scope="module")
def vocabulary(donor):
    return read_vocabulary(donor)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def made(folder, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return distil(folder, [text], out, lessons=LESSONS, sizes=SMALL)


@pytest.fixture(scope="module")
def documents(made, vocabulary):
    """Two documents, of which no more than some tokens are kept: the donor is causal."""
    shard = min((made.folder / "readings").glob("shard-*"))
    return [first_tokens(vocabulary, one, 60) for one in read_shard(shard)[:2]]


def first_tokens(vocabulary, document, count):
    tokens = document.tokens[:count]
    while len(vocabulary.tokens[tokens[-1]]) == 1:
        tokens.pop()  # so that a token is open at the end of the document
    size = sum(len(vocabulary.tokens[token]) for token in tokens)
    return document._replace(
        data=document.data[:size],
        tokens=tokens,
        states=document.states[: len(tokens) + 1],
        next=document.next[: size + 1],
        ends=document.ends[:size],
    )


@pytest.fixture(scope="module")
def teacher(donor, vocabulary, made):
    """A teacher of a student whose patches miss ends of tokens, and end elsewhere as well."""
    student = load_model(made.folder)[0]
    student.patcher = build_patcher(StaticPatching(length=3))
    return Teacher(donor, vocabulary, student)


@pytest.fixture(scope="module")
def lesson(teacher, documents):
    return teacher.lesson(documents)


def test_tokens_and_states_are_aligned_with_patches(donor, teacher, documents, lesson):
    """With the donor's embeddings as patches, its blocks make its states of them."""
    sizes = [len(one.tokens) for one in documents]
    assert lesson.token_ends.sum() == lesson.tokens.shape[1] == sum(sizes)
    numbers = torch.arange(2).repeat_interleave(torch.tensor(sizes))[None]
    blocks = blocks_of(donor)
    transplant(donor, blocks)
    context = blocks.spec.over_rows(numbers, row_positions(numbers))
    latents = blocks(teacher.embeddings[lesson.tokens], context)
    states = donor.model.model.norm(latents).detach()
    torch.testing.assert_close(states, lesson.states, rtol=2e-3, atol=2e-3)  # which are fp16


def test_the_decoder_learns_from_states_to_read_latents(donor, teacher, lesson):
    """It normalises what it reads, so latents of any size make the same logits."""
    lesson = lesson._replace(patch_ends=lesson.token_ends)
    patches = build_patches(lesson.token_ends, lesson.documents)
    latents, reads = donor_latents(lesson, donor.model.model.norm.weight)
    blt = teacher.student.blt
    states, context = blt.encode(lesson.ids, patches.documents, patches.positions)
    sizes = torch.linspace(0.5, 5, latents.shape[1])[None, :, None]
    one, other = (
        blt.decoder(states[-1], blt.decoder.read_latents(known), reads, context)
        for known in (latents, latents * sizes)
    )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_latents_without_a_donor_s_state_are_not_read(teacher, donor, lesson):
    has_state = lesson.token_ends & lesson.patch_ends
    assert not torch.equal(has_state, lesson.token_ends)
    _, reads = donor_latents(lesson, donor.model.model.norm.weight)
    ends = lesson.token_ends[0].nonzero().flatten().tolist()
    for at in range(reads.shape[1]):
        usable = [n for n, end in enumerate(ends) if end <= at and has_state[0, end]]
        assert int(reads[0, at]) == usable[-1]


def test_targets_are_what_the_donor_predicts_of_each_byte(teacher, documents):
    found = teacher.lesson(documents)
    expected = torch.cat([one.next for one in documents])
    over = torch.cat((found.targets[0, :, codec.OFFSET :], found.targets[0, :, codec.EOS, None]), 1)
    assert torch.equal(over, expected)
    assert not found.targets[0, :, [codec.BOE, codec.BOS]].any()


def test_the_donor_reads_the_text_as_the_student_divides_it(made, donor, vocabulary):
    student = load_model(made.folder)[0]
    shard = min((made.folder / "readings").glob("shard-*"))
    lesson = Teacher(donor, vocabulary, student).lesson(read_shard(shard))
    assert lesson.patch_ends.sum() > len(read_shard(shard))
    # Before the first byte of a document there is nothing to divide.
    is_first = row_positions(lesson.documents) == 1
    assert torch.equal(lesson.has_state, lesson.patch_ends & ~is_first)


def test_the_encoder_learns_the_tokens_that_the_donor_reads(made, donor, vocabulary):
    """Lessons without readings have the tokens of those with them."""
    student = load_model(made.folder)[0]
    teacher = Teacher(donor, vocabulary, student)
    read = read_shard(min((made.folder / "readings").glob("shard-*")))
    lesson = teacher.lesson(read)
    tokens = lesson.tokens[0, lesson.token_ends.cumsum(1)[lesson.has_state] - 1]
    has_state = lesson.has_state[lesson.patch_ends]
    found = teacher.token_lesson(divide(donor, vocabulary, [one.data for one in read]))
    assert torch.equal(found.ids, lesson.ids)
    assert torch.equal(found.documents, lesson.documents)
    assert torch.equal(found.patch_ends, lesson.patch_ends)
    assert torch.equal(found.tokens[has_state], tokens)


def test_every_pass_takes_each_document_once(made):
    shards = sorted((made.folder / "readings").glob("shard-*"))
    known = sorted(one.data for path in shards for one in read_shard(path))
    rows = groups(shards, 1, seed=3)
    first, second = ([next(rows)[0].data for _ in known] for _ in range(2))
    assert sorted(first) == sorted(second) == known
    assert first != second
    assert first == [group[0].data for group, _ in zip(groups(shards, 1, 3), known, strict=False)]


def test_losses_go_down(made):
    lines = (made.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [one["step"] for one in records] == list(range(1, 15))
    error = [one["embedding_error"] for one in records[:4]]
    divergence = [one["divergence"] for one in records[4:]]
    assert error[3] < 0.9 * error[0]
    assert divergence[5] < 0.9 * divergence[0]
    assert divergence[9] < divergence[0]


def test_only_the_stage_together_moves_the_global_model(made, folder, text, donor, tmp_path):
    short = LESSONS._replace(encoder_steps=1, parts_steps=1, together_steps=1, save_every=1)
    arguments = {"lessons": short, "sizes": SMALL, "readings": made.folder / "readings"}
    blocks = blocks_of(donor)
    transplant(donor, blocks)
    is_same = []
    for steps in (2, 3):
        with pytest.raises(RuntimeError):
            distil(folder, [text], tmp_path / "run", progress=Interrupted(steps), **arguments)
        found = load_model(tmp_path / "run")[0].blt.global_model.state_dict()
        is_same.append(all(torch.equal(found[k], v) for k, v in blocks.state_dict().items()))
    assert is_same == [True, False]


class Interrupted(Progress):
    """Ends the program when some steps are done."""

    def __init__(self, at=None):
        self.at, self.first = at, None

    @contextmanager
    def counting(self, title, total, done=0):
        self.first = done

        def show(done, what):
            if title == "distilling" and done == self.at:
                raise RuntimeError("killed")

        yield show


@pytest.mark.parametrize(
    "at", [12, pytest.param(2, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_a_run_that_was_killed_resumes_to_the_same_bits(at, made, folder, text, tmp_path):
    readings = made.folder / "readings"
    arguments = {"lessons": LESSONS, "sizes": SMALL, "readings": readings}
    with pytest.raises(RuntimeError):
        distil(folder, [text], tmp_path / "run", progress=Interrupted(at), **arguments)
    resumed = Interrupted()
    result = distil(folder, [text], tmp_path / "run", progress=resumed, **arguments)
    assert result.finished
    assert resumed.first == {2: 0, 8: 6, 12: 12}[at]
    assert made.finished
    for path in saved_steps(made.folder)[-1].iterdir():
        if path.name not in ("files.json", "trainer.json", "config.json", "train.yaml"):
            other = saved_steps(tmp_path / "run")[-1] / path.name
            assert path.read_bytes() == other.read_bytes(), path.name
    metrics = [(run / "metrics.jsonl").read_text() for run in (made.folder, tmp_path / "run")]
    assert metrics[0] == metrics[1]


def test_a_mistyped_donor_can_be_corrected(folder, text, tmp_path):
    short = LESSONS._replace(encoder_steps=1, parts_steps=0, together_steps=0)
    with pytest.raises(CheckpointError, match="no donor at"):
        distil(tmp_path / "none", [text], tmp_path / "run", lessons=short, sizes=SMALL)
    assert distil(folder, [text], tmp_path / "run", lessons=short, sizes=SMALL).finished


def test_no_steps_leave_the_byteified_model(folder, text, made, tmp_path):
    none = LESSONS._replace(encoder_steps=0, parts_steps=0, together_steps=0)
    readings = made.folder / "readings"
    result = distil(folder, [text], tmp_path / "run", lessons=none, sizes=SMALL, readings=readings)
    assert (result.step, result.finished) == (0, True)


def test_a_time_limit_stops_with_a_checkpoint(folder, text, tmp_path):
    result = distil(
        folder, [text], tmp_path / "run", lessons=LESSONS, sizes=SMALL, time_limit=0.001
    )
    assert not result.finished
    assert result.stopped == "time limit"


def test_a_run_is_a_checkpoint_like_any_other(made):
    lm = bytelm.load(made.folder, "cpu")
    ids = torch.from_numpy(codec.encode(TEXT[:200]))
    whole = lm.module(ids[None])[0]
    state = lm.module.new_state()
    parts = [state.prefill(0, part) for part in ids.split(37)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
    assert lm.generate("The cat", max_bytes=3) is not None
    assert lm.config.training["distilled_steps"] == 14


def test_a_vocabulary_can_be_taken_alone(made):
    """With its trie, which no parameter holds."""
    known = read_config(saved_steps(made.folder)[-1])
    fresh = build_lm(known, scorer=load_model(made.folder)[0].scorer)
    init = InitConfig.model_validate({"from": str(made.folder), "parts": ["vocabulary"]})
    load_initial(init, fresh, known)
    theirs = load_model(made.folder)[0].blt.vocabulary.state_dict()
    found = fresh.blt.vocabulary.state_dict()
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)


def test_other_settings_and_folders_are_refused(made, folder, text, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        distil(folder, [text], made.folder, lessons=LESSONS, sizes=SMALL, seed=1)
    (tmp_path / "file").touch()
    assert invoke("distil", folder, text, "--out", tmp_path) == 1
    assert "is not empty and holds no run" in capsys.readouterr().err


@pytest.mark.slow
def test_readings_of_another_run_are_used(made, folder, text, tmp_path):
    short = LESSONS._replace(encoder_steps=0, parts_steps=1, together_steps=0)
    out, readings = tmp_path / "run", made.folder / "readings"
    distil(folder, [text], out, lessons=short, sizes=SMALL, readings=readings)
    assert not (out / "readings").exists()
    with pytest.raises(DataError, match="no readings"):
        distil(folder, [text], tmp_path / "b", lessons=short, sizes=SMALL, readings=tmp_path)
