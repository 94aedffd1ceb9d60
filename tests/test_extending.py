"""The code of docs/extending.md, run as its readers would run it; and what it adds, held to the
properties of ours."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from bytelm.config.kinds import ENTRY_POINTS

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text("utf-8")
CODE = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))

# In a process of its own: what the page registers must not be there for other tests.
PROPERTIES = """
from bytelm.checkpoint import load_model
from bytelm.inference import Session
from bytelm.lm import PatchedLM, build_lm

generator = torch.Generator().manual_seed(0)
ids = torch.randint(4, 260, (2, 40), generator=generator)
blt = {
    "kind": "blt",
    "local": {"dim": 16, "num_heads": 2, "ffn_dim": 24, "decoder_layers": 1, "window": 8},
    "global_model": {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24},
    "cross_attention": {"num_heads": 2},
    "hash_embeddings": {"sizes": []},
}
models = {"gru": load_model(Path("run"))[0]}
for patching in ({"kind": "vowel"}, {"kind": "budget"}, {"kind": "learned", "dim": 16}):
    description = parse(
        ModelDescription,
        {"model": blt, "patching": patching, "scorer": {"model": {"kind": "unigram"}}},
        "test",
    )
    scorer = UnigramScorer().fit(text)
    lm = build_lm(description, scorer=scorer).eval()
    lm.blt.init_weights(torch.Generator().manual_seed(1))
    for parameter in lm.blt.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    save_model(Path(patching["kind"]), lm, description)
    models[patching["kind"]], _ = load_model(Path(patching["kind"]))

for name, model in models.items():
    with torch.no_grad():
        rows = model(ids)
        # Packed, both documents are as they are alone.
        packed = model(ids.view(1, 80), torch.arange(2).repeat_interleave(40)[None])
    torch.testing.assert_close(packed.view_as(rows), rows, rtol=1e-4, atol=1e-4)
    for pieces in ([1] * 40, [13, 1, 1, 25], [40]):
        session = Session(model)
        fed = torch.cat([session.feed(piece) for piece in ids[0].split(pieces)])
        torch.testing.assert_close(fed, rows[0], rtol=1e-4, atol=1e-4)
    session = Session(model)
    session.feed(ids[0, :20])
    snapshot, other = session.snapshot(), session.fork()
    session.feed(ids[1, :9])
    session.rollback(snapshot)
    for one in (session, other):
        torch.testing.assert_close(one.feed(ids[0, 20:]), rows[0, 20:], rtol=1e-4, atol=1e-4)
    state = model.new_state(2)
    for slot in (0, 1):
        state.prefill(slot, ids[slot, :7])
    for at in range(7, 40):
        torch.testing.assert_close(state.decode(ids[:, at]), rows[:, at], rtol=1e-4, atol=1e-4)
print("held", *models)
"""


def run(code, folder):
    (folder / "page.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_code_on_the_page_runs_and_what_it_adds_has_our_properties(tmp_path):
    patches, scored, generated, held = run(CODE + PROPERTIES, tmp_path)
    assert f"# {patches}\n" in PAGE
    assert scored.startswith("6 ")
    assert generated == "8"
    assert held == "held gru vowel budget learned"


def test_the_entry_point_on_the_page_is_the_one_that_is_read():
    (table,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert list(tomllib.loads(table)["project"]["entry-points"]) == [ENTRY_POINTS]
