"""Training on several ranks: the same as on one, up to rounding."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from builders import SPACE_BLT, LearnedRule, merged
from bytelm import kernels, load, shards
from bytelm.accounting import Part, register_parts
from bytelm.config import HashEmbeddingConfig, ModelConfig, PatchingConfig, Recipe, parse
from bytelm.data import Dataset, Loader, PrepareOptions, prepare, train_dataset_tokenizer
from bytelm.errors import CheckpointError, ConfigError, DataError
from bytelm.layout import saved_steps, step_number
from bytelm.lm import CausalLM, kinds, register_model
from bytelm.model import blt, layers, transformer
from bytelm.model.embedding import HashEmbedding
from bytelm.patching import register_rule
from bytelm.progress import BeginCooldown, Callback
from bytelm.ranks import Place, find_place, first_host
from bytelm.training import Trainer, parallel, saving, train, watchdog
from bytelm.training.distributed import World, join
from bytelm.units import ByteUnits
from earlier import StopAt
from processes import free_port, on_ranks

WORDS = ["the", "patch", "of", "bytes", "is", "cut", "where", "entropy", "rises", "\n"]
TRANSFORMER = {
    "model": {"kind": "transformer", "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24},
    "patching": None,
}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 60))) for _ in range(200)]
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare([str(folder / "x.jsonl")], folder / "d", PrepareOptions(validation_share=0.1))
    return str(folder / "d")


def recipe(data, changes=None, **train_options):
    settings = {
        # Rows that are closed by their patches hold different numbers of bytes.
        "data": {"path": data, "row_bytes": 96, "row_patches": 16, "rows_per_step": 8},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "clip_norm": 0.3},
        "train": {
            "steps": 20,
            "log_every": 1,
            "validate_every": 10,
            "checkpoint_every": 10,
            "validation_bytes": 3000,
            "keep_checkpoints": 9,
            **train_options,
        },
    }
    settings["data"]["packing"] = "in-order"
    settings = merged(merged(SPACE_BLT, settings), changes or {})
    return parse(Recipe, {**settings, **(changes if changes is TRANSFORMER else {})}, "test")


def metrics(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal_but_for_rounding(run, other):
    ours, theirs = metrics(run), metrics(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"bytes_per_second"}:
            rel = 1e-5 if name == "gradient_norm" else 1e-6
            assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-6), (a["step"], name)
    for mine, others in zip(saved_steps(run), saved_steps(other), strict=True):
        for file in ("model.safetensors", "optimizer.safetensors"):
            a, b = load_file(mine / file), load_file(others / file)
            assert a.keys() == b.keys()
            for name in a:
                assert torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-4), name
        a, b = (json.loads((one / "trainer.json").read_text()) for one in (mine, others))
        for name in ("step", "data", "bytes_seen", "is_validation_due"):
            assert a[name] == b[name]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(recipe(data), folder)
    return folder


def test_two_ranks_train_as_one_does_and_one_resumes_what_they_began(data, whole, tmp_path):
    """With clipping, micro-batches, and other numbers of targets on each rank."""
    settings = recipe(data, micro_rows=2)
    results = on_ranks(2, train_until, settings, tmp_path / "run", 14)
    assert [(one.step, one.finished, one.stopped) for one in results] == [
        (14, False, "callback")
    ] * 2
    assert [step_number(one) for one in saved_steps(tmp_path / "run")] == [10, 14]
    assert train(settings, tmp_path / "run").finished
    (at_14,) = (one for one in saved_steps(tmp_path / "run") if step_number(one) == 14)
    at_14.rename(tmp_path / "set aside")
    assert_equal_but_for_rounding(tmp_path / "run", whole)


def train_until(settings, folder, step):
    return train(settings, folder, callbacks=[StopAt(step)])


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=SLOW)])
def test_ranks_begin_with_the_weights_of_one_and_hold_one_whole_parameter_at_a_time(data, size):
    changes = {"model": {"cross_attention": {"queries": "learned"}}}
    settings = recipe(data, changes, **({"shard_ranks": 2} if size == 4 else {}))
    one = Trainer(settings)
    expected = {name: tensor.clone() for name, tensor in one.lm.trained.state_dict().items()}
    num_elements = sum(tensor.numel() for tensor in expected.values())
    one.step()
    loss = one.report()["loss"]
    for found in on_ranks(size, initial_weights, settings):
        assert found["weights"].keys() == expected.keys()
        for name, weights in found["weights"].items():
            assert torch.equal(torch.from_numpy(weights), expected[name]), name
        assert found["held"] < 0.6 * num_elements
        assert found["alive"] == 1
        assert found["loss"] == pytest.approx(loss, rel=1e-6)


def initial_weights(settings):
    """The weights of a rank's trainer, and how many whole matrices existed at once."""
    init_linear, drawn, alive = layers.init_linear, [], []

    def init_and_count(weight, generator=None):
        drawn.append(weakref.ref(weight))
        alive.append(sum(one() is not None for one in drawn))
        init_linear(weight, generator)

    layers.init_linear = blt.init_linear = init_and_count
    with join("cpu") as world:
        trainer = Trainer(settings, world=world)
        parameters = dict(trainer.lm.trained.named_parameters())
        held = sum(one.to_local().numel() for one in parameters.values())
        weights = {name: one.full_tensor().detach().numpy() for name, one in parameters.items()}
        trainer.step()
        return {
            "weights": weights,
            "held": held,
            "alive": max(alive),
            "loss": trainer.report()["loss"],
        }


def test_ranks_of_the_test_hold_different_numbers_of_targets(data):
    counts = []
    one = Trainer(recipe(data))
    for _ in range(3):
        targets = (one.loader.next_batch().targets >= 0).sum(1)
        counts.append((int(targets[0::2].sum()), int(targets[1::2].sum())))
    assert all(a != b for a, b in counts)


@SLOW
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (4, {}),
        (4, {"train": {"shard_ranks": 2, "micro_rows": 1}}),
        (2, {"train": {"shard_ranks": 1, "reshard": False}}),
        (2, {"train": {"activation_checkpointing": "block", "reshard": False}}),
        (2, {"train": {"activation_checkpointing": "selective"}}),
        (2, {"optimizer": {"freeze": ["encoder"], "lr_multipliers": {"global": 0.5}}}),
        (4, TRANSFORMER),
        (8, {"data": {"mixture": {"x": 1.0}}}),
    ],
)
def test_any_number_of_ranks_trains_as_one_does(data, tmp_path, size, changes):
    settings = recipe(data, changes)
    train(settings, tmp_path / "one")
    assert all(one.finished for one in on_ranks(size, train, settings, tmp_path / "many"))
    assert_equal_but_for_rounding(tmp_path / "many", tmp_path / "one")


@SLOW
def test_two_ranks_train_on_a_large_vocabulary_as_one_does_with_all_logits(data, tmp_path):
    tokenizer = train_dataset_tokenizer(Dataset(Path(data), "train"), 270, 10**6)
    tokenizer.save(tmp_path / "tokens")
    settings = recipe(data, TRANSFORMER)
    changes = {
        "model": settings.model.model_copy(update={"vocab_size": 270}),
        "data": settings.data.model_copy(update={"tokenizer": str(tmp_path / "tokens")}),
    }
    settings = settings.model_copy(update=changes)
    train(settings, tmp_path / "one")
    on_ranks(2, train_with_chunks, settings, tmp_path / "two")
    assert_equal_but_for_rounding(tmp_path / "two", tmp_path / "one")


def train_with_chunks(settings, folder):
    kinds.CHUNKED_VOCAB, transformer.CHUNK_LOGITS = 1, 1
    return train(settings, folder)


@SLOW
@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (1, 4)])
def test_another_number_of_ranks_resumes(data, whole, tmp_path, first, second):
    settings = recipe(data)
    on_ranks(first, train_until, settings, tmp_path / "run", 10)
    on_ranks(second, train, settings, tmp_path / "run")
    assert_equal_but_for_rounding(tmp_path / "run", whole)


@SLOW
@pytest.mark.parametrize(("victim", "file"), [(0, 1), (1, 2), (1, 3), (0, 4)])
def test_a_kill_during_a_checkpoint_leaves_the_one_before(
    data, whole, tmp_path, capfd, victim, file
):
    """Each checkpoint has two files of tensors; it happens in the middle of one."""
    settings = recipe(data)
    # The other rank meets a closed connection, or its watchdog is faster, ends it and says why.
    ends = rf"(?i)connection|closed|peer|reset|^rank {1 - victim} died$"
    with pytest.raises(Exception, match=ends) as failure:
        on_ranks(2, train_and_die, settings, tmp_path / "run", victim, file, may_die=[victim])
    if str(failure.value).endswith("died"):
        assert f"error: rank {victim} has not answered" in capfd.readouterr().err
    saved = [step_number(one) for one in saved_steps(tmp_path / "run")]
    assert saved == ([10] if file > 2 else [])
    on_ranks(2, train, settings, tmp_path / "run")
    assert_equal_but_for_rounding(tmp_path / "run", whole)
    names = sorted(one.name for one in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000020"]


def train_and_die(settings, folder, victim, file):
    write, write_parts, begun = shards._write, saving.write_parts, []

    def begin(*args, **named):
        begun.append(args)
        write_parts(*args, **named)

    def write_or_die(descriptor, data, at):
        if distributed.get_rank() == victim and len(begun) == file:
            data = memoryview(data).cast("B")
            write(descriptor, data[: len(data) // 2], at)
            os.kill(os.getpid(), signal.SIGKILL)
        write(descriptor, data, at)

    shards._write, saving.write_parts = write_or_die, begin
    return train(settings, folder)


@SLOW
def test_training_continues_while_a_checkpoint_is_written(data, whole, tmp_path):
    """The checkpoint has the weights of its step, not of those that were trained meanwhile."""
    settings = recipe(data, steps=20)
    events = on_ranks(2, train_and_write_slowly, settings, tmp_path / "run")[0]
    assert events.index(("saved", 10)) > events.index(("step", 12))
    assert_equal_but_for_rounding(tmp_path / "run", whole)


class Events(Callback):
    def __init__(self):
        self.events = []

    def on_metrics(self, step, metrics):
        self.events.append(("step", step))

    def on_checkpoint(self, step, folder):
        assert folder.is_dir()
        self.events.append(("saved", step))


def train_and_write_slowly(settings, folder):
    write, watched = saving.write_parts, Events()

    def write_slowly(*args, **named):
        deadline = time.monotonic() + 30
        while ("step", 12) not in watched.events and time.monotonic() < deadline:
            if distributed.get_rank() > 0 or "step-00000020" in str(args[0]):
                break
            time.sleep(0.01)
        write(*args, **named)

    saving.write_parts = write_slowly
    train(settings, folder, callbacks=[watched])
    return watched.events


@SLOW
def test_a_disk_error_of_one_rank_is_that_of_all(data, tmp_path):
    for error in on_ranks(2, train_on_a_full_disk, recipe(data), tmp_path / "run"):
        assert "No space left on device; nothing was changed: free some space" in error
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def train_on_a_full_disk(settings, folder):
    def full(*args, **named):
        if distributed.get_rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    saving.write_parts = full
    with pytest.raises(CheckpointError) as error:
        train(settings, folder)
    return str(error.value)


@SLOW
def test_a_signal_to_one_rank_stops_all_after_the_same_step(data, whole, tmp_path):
    settings = recipe(data)
    results = on_ranks(2, train_and_signal, settings, tmp_path / "run", 1, 6)
    assert [(one.step, one.stopped) for one in results] == [(7, "SIGTERM")] * 2
    assert [step_number(one) for one in saved_steps(tmp_path / "run")] == [7]
    on_ranks(2, train, settings, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000007").rename(tmp_path / "set aside")
    assert_equal_but_for_rounding(tmp_path / "run", whole)


def train_and_signal(settings, folder, rank, step):
    update = Trainer._update

    def update_and_signal(trainer):
        update(trainer)
        if trainer.world.rank == rank and trainer.num_steps == step:
            signal.raise_signal(signal.SIGTERM)

    Trainer._update = update_and_signal
    return train(settings, folder)


@SLOW
def test_a_time_limit_stops_all(data, tmp_path):
    results = on_ranks(2, train_for, recipe(data, steps=100_000), tmp_path / "run", 3.0)
    assert results[0] == results[1]
    assert (results[0].finished, results[0].stopped) == (False, "time limit")
    assert step_number(saved_steps(tmp_path / "run")[-1]) == results[0].step > 0


def train_for(settings, folder, seconds):
    return train(settings, folder, time_limit=seconds)


class CoolDownAt(Callback):
    def on_metrics(self, step, metrics):
        if step == 5:
            raise BeginCooldown(3)


@SLOW
def test_a_callback_of_rank_0_decides_for_all(data, tmp_path):
    settings = recipe(data, {"optimizer": {"schedule": "wsd"}})
    results = on_ranks(2, train_cooling_down, settings, tmp_path / "run")
    assert [(one.step, one.finished) for one in results] == [(8, True)] * 2


def train_cooling_down(settings, folder):
    return train(settings, folder, callbacks=[CoolDownAt()])


class LinearPatching(PatchingConfig):
    kind: Literal["linear"] = "linear"


class LinearConfig(ModelConfig):
    kind: Literal["linear"] = "linear"


class LinearLM(CausalLM):
    """Logits from the last byte alone: its trained part is not called."""

    def __init__(self):
        super().__init__()
        self.inner, self.units = torch.nn.Linear(260, 260), ByteUnits()

    @property
    def trained(self):
        return self.inner

    def forward(self, ids, documents=None):
        return self.inner.weight[ids] + self.inner.bias


@SLOW
@pytest.mark.parametrize("what", ["rule", "model"])
def test_kinds_of_other_packages_train_on_several_ranks(data, tmp_path, what):
    on_ranks(1, train_foreign, data, tmp_path / "one", what)
    on_ranks(2, train_foreign, data, tmp_path / "two", what)
    assert_equal_but_for_rounding(tmp_path / "two", tmp_path / "one")


def train_foreign(data, folder, what):
    register_rule(LinearPatching, lambda config: LearnedRule(16))
    register_model(LinearConfig, lambda config, parts: LinearLM())
    register_parts(LinearConfig, lambda config: {"logits": Part(other_parameters=260 * 261)})
    changes = {"patching": LinearPatching()}
    if what == "model":
        changes = {"model": LinearConfig(), "patching": None}
    return train(recipe(data).model_copy(update=changes), folder)


@SLOW
def test_bfloat16_loses_what_one_process_loses(data, tmp_path):
    settings = recipe(data, steps=4, precision="bfloat16", validate_every=9)
    train(settings, tmp_path / "one")
    on_ranks(2, train, settings, tmp_path / "two")
    losses = [[line["loss"] for line in metrics(tmp_path / run)[:4]] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0][-1] < losses[0][0]


def decisions():
    with join("cpu") as world:
        return (
            world.sum(world.rank + 1, 0.5),
            world.gather("ab"[world.rank]),
            world.decide(lambda: world.rank),
            world.agree(lambda: world.rank),
            list(world.share("abc")),
            list(world.share("")),
            [refusal(world, rank) for rank in (0, 1)],
            nested_refusal(world),
            refused_decision(world),
            world.sum(1),
        )


def refusal(world, failing):
    """An error of one rank is raised on all."""
    with pytest.raises(DataError) as error:
        world.agree(lambda: fail() if world.rank == failing else None)
    return str(error.value)


def nested_refusal(world):
    with pytest.raises(DataError) as error:
        world.agree(lambda: world.agree(lambda: fail() if world.rank else None))
    return str(error.value)


def refused_decision(world):
    """A rank that fails earlier than a decision is heard by those who wait for it."""
    with pytest.raises(DataError) as error:
        world.agree(lambda: fail() if world.rank else world.decide(lambda: 1))
    return str(error.value)


def fail():
    raise DataError("no such folder")


def test_ranks_sum_gather_decide_and_share_errors():
    ours, theirs = on_ranks(2, decisions)
    errors = [["no such folder"] * 2, "no such folder", "no such folder", [2]]
    assert ours == ([3, 1.0], ["a", "b"], 0, 0, [("a", True), ("c", True)], [], *errors)
    assert theirs == ([3, 1.0], ["a", "b"], 0, 1, [("b", True), ("c", False)], [], *errors)
    assert [type(one) for one in ours[0]] == [int, float]


def test_a_world_of_one_answers_itself():
    world = World()
    assert world.is_main
    assert world.sum(1, 2.5) == [1, 2.5]
    assert (world.gather(3), world.decide(lambda: 4), world.agree(lambda: 5)) == ([3], 4, 5)
    assert list(world.share(iter("ab"))) == [("a", True), ("b", True)]
    with pytest.raises(DataError):
        world.agree(fail)
    with join("cpu") as world:
        assert world.size == 1


def test_ranks_that_cannot_share_the_rows_are_refused(data):
    with pytest.raises(ConfigError, match=r"8, which 3 ranks .* multiple of 3, such as 9"):
        Trainer(recipe(data), world=World(Place(0, 3)))


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}, Place(3, 8, 1)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Place()),
        (
            {
                "SLURM_STEP_NUM_TASKS": "16",
                "SLURM_PROCID": "9",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_NODELIST": "gpu[07-08]",
                "SLURM_JOB_ID": "20001",
            },
            Place(9, 16, 1, "gpu07:15001"),
        ),
        (
            {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "1",
                "SLURM_LOCALID": "0",
                "MASTER_ADDR": "head",
                "MASTER_PORT": "123",
            },
            Place(1, 2, 0, "head:123"),
        ),
    ],
)
def test_the_place_of_a_process_is_what_its_launcher_says(environment, place):
    assert find_place(environment) == place


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a1,b2", "a1"), ("gpu[003-010,12],b", "gpu003"), ("n[1,3]-ib,m", "n1-ib")],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_ranks_that_hang_are_named():
    error = "[Rank 0]: Ranks 1, 12 failed to pass monitoredBarrier in 4000 ms"
    assert watchdog.missing_ranks(error) == [1, 12]
    assert watchdog.missing_ranks("Rank 2 received errors while waiting") is None
    said = watchdog.hung_message([9, 7, 9, 7], 60.0)
    assert said.startswith("ranks 1, 3 have made no progress for 60 s (train.hang_seconds)")
    assert watchdog.hung_message([9, 9], 0.5).startswith("no rank has made no progress for 0.5 s")


def test_points_of_an_embedding_are_passed_when_the_gradients_of_its_weights_are_known():
    """Its inputs have none, and ranks wait for each other after its backward pass."""
    embedding = HashEmbedding(
        vocab_size=260, dim=4, config=HashEmbeddingConfig(sizes=(2, 3), num_buckets=5)
    )
    world = World()
    parallel._mark_points(embedding, world)
    ids, passed = torch.randint(260, (2, 9)), []
    for _ in range(2):
        embedded = embedding(ids, torch.arange(9).expand(2, 9))
        passed.append(world.num_points)
        embedded.sum().backward()
        passed.append(world.num_points)
    # Before the forward pass; at the output, and for both weights.
    assert passed == [1, 4, 5, 8]


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
def test_tensors_that_are_not_finite_are_counted(damage):
    good = [torch.full((3, 2), 3e38), torch.zeros(0, 4), torch.tensor(-1.0)]
    assert saving.count_damaged(iter(good)) == saving.count_damaged([]) == 0
    bad = torch.randn(40, 50)
    bad[17, 3] = damage
    assert saving.count_damaged([*good, bad, bad[17:18, 3]]) == 2


@SLOW
@pytest.mark.parametrize(
    ("how", "size", "rank"),
    [
        ("stop", 2, 1),
        ("stop", 4, 0),
        ("sleep", 2, 1),
        ("sleep in a block", 4, 0),
        ("sleep in a backward pass", 2, 1),
        ("sleep in the backward pass of the embedding", 4, 0),
    ],
)
def test_a_rank_that_hangs_or_is_stopped_is_named(data, tmp_path, how, size, rank):
    settings = recipe(data, hang_seconds=8.0)
    everyone = list(range(size))
    on_ranks(size, train_and_hang, settings, tmp_path, how, rank, may_die=everyone)
    said = (tmp_path / "said").read_text().splitlines()
    assert said[0].startswith(f"rank {rank} has " + ("not answered" if how == "stop" else "made"))


def train_and_hang(settings, folder, how, rank):
    """One rank hangs in its fourth step; what the watchdogs say goes to a file."""
    load, run, embed = Loader.next_batch, kernels.feed_forward, torch.nn.Embedding.forward

    def say(message):
        with (folder / "said").open("a") as file:
            file.write(message + "\n")
        # A launcher ends the others.
        with suppress(ProcessLookupError):
            os.kill(int((folder / f"{rank}.pid").read_text()), signal.SIGKILL)
        os._exit(1)

    def hang():
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(100)

    def load_or_hang(loader):
        if distributed.get_rank() == rank and loader.step == 3 and how in ("stop", "sleep"):
            hang()
        return load(loader)

    def run_or_hang(*args):
        calls.append(args)
        is_time = distributed.get_rank() == rank and len(calls) == 7
        if is_time and how == "sleep in a block":
            hang()
        result = run(*args)
        if is_time and how == "sleep in a backward pass":
            # In the backward pass of the block, before that of its feed-forward.
            result.register_hook(lambda _: hang())
        return result

    def embed_or_hang(*args):
        embedded.append(args)
        result = embed(*args)
        if distributed.get_rank() == rank and len(embedded) == 4:
            result.register_hook(lambda _: hang())
        return result

    calls, embedded = [], []
    (folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    Loader.next_batch = load_or_hang
    if how.endswith("embedding"):
        torch.nn.Embedding.forward = embed_or_hang
    elif how.startswith("sleep in"):
        kernels.feed_forward = run_or_hang
    watchdog.abort = say
    return train(settings, folder / "run")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "bytelm", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


SHRUNK = [
    "model.local={dim: 16, num_heads: 2, ffn_dim: 24, encoder_layers: 1, decoder_layers: 2}",
    "model.global_model={dim: 32, num_layers: 2, num_heads: 2, ffn_dim: 48}",
    "model.cross_attention.num_heads=2",
    "model.hash_embeddings.num_buckets=53",
    "patching={kind: space}",
    "data.row_bytes=96",
    "data.rows_per_step=4",
    "train.steps=2",
    "train.micro_rows=1",
    "train.validation_bytes=2000",
]


@SLOW
@pytest.mark.parametrize("name", ["blt-1b", "blt-8b"])
def test_torchrun_trains_a_shipped_recipe_that_was_shrunk(data, tmp_path, name):
    ended = torchrun(name, *SHRUNK, f"data.path={data}", "--out", tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    # One rank prints.
    assert ended.stdout.count("bytes and") == 1
    assert [step_number(one) for one in saved_steps(tmp_path / "run")] == [2]
    assert load(tmp_path / "run").bits_per_byte("some words") > 0


@SLOW
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.path=absent"], "absent"),
        (["data.rows_per_step=3"], "data.rows_per_step is 3, which 2 ranks cannot share equally"),
        (["train.shard_ranks=3"], "train.shard_ranks is 3, which does not divide the 2 ranks"),
    ],
)
def test_what_cannot_train_is_refused_in_one_message(data, tmp_path, changes, message):
    out = tmp_path / "run"
    ended = torchrun("blt-1b", *SHRUNK, f"data.path={data}", *changes, "--out", out)
    assert ended.returncode != 0
    assert ended.stderr.count("error: ") == 1
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr.split("error: ")[0]
    assert not out.exists()
