import doctest
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.errors import ConfigError
from bytelm.evaluation import noise as module
from bytelm.evaluation.noise import (
    PAPER,
    characters,
    compose,
    parse_noise,
    parse_noises,
    register_noise,
)

ALL = parse_noises("all")
OF_CHARACTERS = [one for one in ALL if str(one) != "bitflip"]
RATED = ["drop", "randomcase", "repeat", "typo", "homoglyph", "bitflip"]
CLUSTERS = ["a", "e\u0301", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd"]
CLUSTERS += ["\U0001f1e9\U0001f1ea", "\u1112\u1161\u11ab", "\u0928\u093f", "\r\n", "\u6f22"]

mostly_text = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")),
    st.lists(st.one_of(st.sampled_from(["a cat ", "é", "Straße"]), st.just("\udcff"))).map(
        lambda parts: "".join(parts).encode("utf-8", "surrogateescape")
    ),
)
valid = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def test_examples_in_the_documentation_hold():
    try:
        found = doctest.testmod(module)
    finally:
        module._KINDS.pop("no-vowels", None)
    assert found.attempted > 12
    assert not found.failed


@given(mostly_text, st.integers(0, 3))
def test_any_bytes_become_bytes_that_depend_on_the_seed_and_the_text_only(data, seed):
    first = [one(data, seed) for one in ALL]
    parse_noise("drop")(b"another text", seed)
    assert [one(data, seed) for one in reversed(ALL)] == first[::-1]
    assert all(type(one) is bytes for one in first)


@given(mostly_text)
def test_bytes_that_are_no_utf_8_pass_through(data):
    data = b"\xff".join([data.decode("utf-8", "ignore").encode(), b"\xff", data[::2], b""])
    for one in OF_CHARACTERS:
        noised = one(data)
        assert noised.count(b"\xff") == data.count(b"\xff"), one
    rest = data.decode("utf-8", "ignore")
    assert all(one(rest).decode("utf-8") is not None for one in OF_CHARACTERS)
    assert parse_noise("uppercase")(data) == b"\xff".join(
        part.decode("utf-8", "surrogateescape").upper().encode("utf-8", "surrogateescape")
        for part in data.split(b"\xff")
    )


@given(mostly_text)
def test_at_a_rate_of_zero_nothing_changes(data):
    for name in RATED:
        assert parse_noise(f"{name}:0")(data) == data


@pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
def test_rates_are_those_that_are_asked_for(rate):
    """The number of changed characters is binomial: within five standard deviations."""
    count = 4000
    text = "".join(chr(0x4E00 + i) for i in range(count))
    letters = "ab" * (count // 2)
    spread = 5 * math.sqrt(count * rate * (1 - rate)) + 1e-9

    def noised(name, text=text):
        return parse_noise(f"{name}:{rate}")(text).decode()

    assert abs(count - len(noised("drop")) - count * rate) <= spread
    longer = noised("repeat")
    repeated = [longer.count(one) for one in text]
    assert set(repeated) == ({2, 3, 4} if rate == 1 else {1, 2, 3, 4})
    assert abs(sum(one > 1 for one in repeated) - count * rate) <= spread
    for number in (2, 3, 4):
        assert repeated.count(number) == pytest.approx(count * rate / 3, rel=0.35)
    typed = noised("typo", letters)
    assert len(typed) == count
    wrong = [(a, b) for a, b in zip(letters, typed, strict=True) if a != b]
    assert abs(len(wrong) - count * rate) <= spread
    assert set(wrong) == {("a", one) for one in "qwsz"} | {("b", one) for one in "vghn"}
    alike = noised("homoglyph", letters)
    assert set(alike) == ({"\u0430", "b"} if rate == 1 else {"a", "\u0430", "b"})
    flipped = parse_noise(f"bitflip:{rate}")(letters)
    bits = [(a ^ b).bit_count() for a, b in zip(letters.encode(), flipped, strict=True)]
    assert max(bits) == 1
    assert abs(sum(bits) - count * rate) <= spread
    cased = noised("randomcase", "a" * count)
    expected = count * rate / 2
    assert abs(cased.count("A") - expected) <= 5 * math.sqrt(expected) + 1e-9


def test_a_higher_rate_changes_what_a_lower_one_does_and_more():
    text = "".join(chr(0x4E00 + i) for i in range(300))
    kept = [set(parse_noise(f"drop:{rate}")(text, 3).decode()) for rate in (0.1, 0.2, 0.5)]
    assert kept[0] > kept[1] > kept[2]


@given(valid)
def test_upper_case_and_antspeak_by_definition(text):
    assert parse_noise("uppercase")(text) == text.upper().encode()
    spoken = parse_noise("antspeak")(text).decode()
    assert spoken == " ".join(characters(text.upper()))
    if text.isascii() and "\r" not in text:
        assert spoken[::2] == text.upper()
        assert set(spoken[1::2]) <= {" "}


@given(valid)
def test_random_case_keeps_letters(text):
    def folded(text):
        return text.upper().lower().casefold()

    assert folded(parse_noise("randomcase")(text).decode()) == folded(text)


@given(st.lists(st.sampled_from(CLUSTERS), max_size=30), st.integers(0, 9))
def test_clusters_are_kept_whole(clusters, seed):
    separated = [part for one in clusters for part in (one, ".")]
    text = "".join(separated)
    assert characters(text) == separated
    dropped = characters(parse_noise("drop:0.5")(text, seed).decode())
    assert set(dropped) <= {*separated}
    repeated = characters(parse_noise("repeat:1")(text, seed).decode())
    assert set(repeated) <= {*separated}


@given(st.text(max_size=60))
def test_characters_partition_the_text(text):
    found = characters(text)
    assert "".join(found) == text
    assert all(found)


@given(mostly_text, st.integers(0, 3))
def test_noises_compose_from_left_to_right(data, seed):
    drop, upper = parse_noise("drop:0.3"), parse_noise("uppercase")
    both = compose(drop, upper)
    assert both(data, seed) == upper(drop(data, seed), seed)
    assert both == parse_noise("drop:0.3+uppercase")
    assert compose()(data, seed) == data


def test_names_and_lists_of_names():
    assert [str(one) for one in parse_noises("antspeak, drop:0.2,drop:0.10+uppercase")] == [
        "antspeak",
        "drop:0.2",
        "drop+uppercase",
    ]
    assert tuple(map(str, parse_noises("paper"))) == PAPER
    assert [parse_noise(str(one)) for one in ALL] == ALL
    assert len(parse_noises("all,drop,paper")) == len(ALL)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dorp", "did you mean 'drop'"),
        ("", "unknown noise ''"),
        ("drop:2", "between 0 and 1"),
        ("drop:lots", "between 0 and 1"),
        ("drop:nan", "between 0 and 1"),
        ("uppercase:0.5", "has no rate"),
        ("drop++uppercase", "unknown noise ''"),
    ],
)
def test_mistakes_in_names(name, says):
    with pytest.raises(ConfigError, match=says):
        parse_noise(name)


def test_a_registered_noise_is_one_like_the_others(monkeypatch):
    monkeypatch.setattr(module, "_KINDS", dict(module._KINDS))
    register_noise("reverse", lambda text, rate, random: text[::-1])
    register_noise("zeros", lambda data, rate, random: bytes(len(data)), rate=0.5, unit="bytes")
    assert parse_noise("reverse+uppercase")(b"ab\xffcd") == b"BA\xffDC"
    assert parse_noise("zeros:0.1")(b"\xff\xff") == b"\0\0"
    assert str(parse_noises("all")[-1]) == "zeros"
    with pytest.raises(ConfigError, match="already"):
        register_noise("drop", lambda text, rate, random: text)
    with pytest.raises(ConfigError, match="cannot be"):
        register_noise("a+b", lambda text, rate, random: text)
