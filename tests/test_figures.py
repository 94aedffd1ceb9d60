import numpy as np
import pytest

from bytelm.config import EntropyPatching, SpacePatching
from bytelm.data.dataset import Calibration, SourceStatistics
from bytelm.data.statistics import NUM_BINS
from bytelm.errors import ConfigError
from bytelm.figures import (
    byte_labels,
    draw_curves,
    draw_data,
    draw_entropies,
    draw_rules,
    draw_shares,
)
from bytelm.language_model import PatchedText


def text(data, rule=None):
    entropies = np.linspace(0, 3, len(data) + 1, dtype=np.float32)
    boundaries = tuple(range(0, len(data), 3))
    return PatchedText(data, boundaries, entropies, rule or EntropyPatching(threshold=1.5))


def test_labels_stand_on_the_first_byte_of_a_character_and_show_every_byte():
    assert byte_labels("aéя".encode()) == ["a", "é", "", "я", ""]
    assert byte_labels("\U0010ffff".encode()) == ["f4", "8f", "bf", "bf"]
    assert byte_labels(b"\xff \n\t\x00$") == ["ff", "_", "\\n", "\\t", "00", "\\$"]
    assert byte_labels("é".encode()[:1] + b"x") == ["c3", "x"]


@pytest.mark.parametrize(
    "data", [b"", b"x", b"some text" * 30, bytes(range(256)), "日本 $x$".encode()]
)
def test_figures_of_any_bytes(tmp_path, data):
    draw_entropies(text(data), tmp_path / "a.svg")
    draw_rules([text(data), text(data, SpacePatching())], tmp_path / "b.svg")
    for name in ("a.svg", "b.svg"):
        assert "</svg>" in (tmp_path / name).read_text()


def test_curves(tmp_path):
    draw_curves({"a": ([1.0, 10.0], [2.0, 1.0])}, tmp_path / "c.png", x_label="FLOPs")
    assert (tmp_path / "c.png").stat().st_size > 5000


def test_shares_of_nothing_and_of_something(tmp_path):
    costs = {"FLOPs\n3": {"encoder": 1.0, "global": 2.0}, "none": {"encoder": 0.0, "global": 0.0}}
    draw_shares(costs, tmp_path / "s.svg", title="some model")
    assert "</svg>" in (tmp_path / "s.svg").read_text()


@pytest.mark.parametrize("histogram", [[], [0] * NUM_BINS, list(range(NUM_BINS))])
def test_prepared_data_with_and_without_entropies(tmp_path, histogram):
    statistics = {
        f"${n}$": SourceStatistics(documents=n, text_bytes=10 * n, histogram=histogram)
        for n in range(20)
    }
    rule = {"kind": "entropy", "threshold": 1.5}
    draw_data(statistics, Calibration(rule=rule, patch_size=4.5, sources={}), tmp_path / "d.svg")
    assert "</svg>" in (tmp_path / "d.svg").read_text()


def test_what_cannot_be_drawn_is_named(tmp_path):
    without = PatchedText(b"ab", (0,), None, SpacePatching())
    with pytest.raises(ConfigError, match="there are none to draw"):
        draw_entropies(without, tmp_path / "a.svg")
    with pytest.raises(ConfigError, match="cannot draw"):
        draw_entropies(text(b"ab"), tmp_path / "a.nonsense")
    with pytest.raises(ConfigError, match="cannot write"):
        draw_entropies(text(b"ab"), tmp_path / "missing" / "a.svg")


def test_a_figure_without_a_suffix_is_a_png(tmp_path):
    draw_entropies(text(b"ab"), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
