r"""Noise in text: the five noises of the BLT paper, typos, homoglyphs, normalisation, flipped bits.

A noise maps bytes to bytes, and is named by a string: ``drop``, ``drop:0.2`` with a rate, and
``drop:0.2+uppercase`` one after the other.

    >>> noise = parse_noise("drop:0.2+uppercase")
    >>> noise(b"The quick brown fox", seed=1)
    b'TH QUIK BROWFX'

The result depends on the text, the seed and the noise only, not on other texts or on the order in
which they come. With one seed, the characters that a noise changes at a low rate are among those
that it changes at a higher one, so that rates are compared on the same draws.

Most noises work on *characters*: extended grapheme clusters, so that an accent stays with its
letter. Bytes that are no UTF-8 pass through as they are, and end a stretch of characters.
"""

import hashlib
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from bytelm.codec import Text, to_bytes
from bytelm.config import nearest
from bytelm.errors import ConfigError

__all__ = ["Noise", "characters", "compose", "parse_noise", "parse_noises", "register_noise"]

CharacterNoise = Callable[[str, float, Random], str]
"""The noise of valid text: its characters, the rate, a generator."""
ByteNoise = Callable[[bytes, float, Random], bytes]
"""The noise of any bytes, likewise."""
PAPER = ("antspeak", "drop", "randomcase", "repeat", "uppercase")
"""The noises of the BLT paper, section 6.1."""
ZWJ, ZWNJ = "\u200d", "\u200c"
MOST_REPEATS = 4
"""How often a repeated character can be there in all."""


class _Kind(NamedTuple):
    function: ByteNoise
    rate: float | None
    """Its usual rate; ``None`` if it has none."""


_KINDS: dict[str, _Kind] = {}


class Step(NamedTuple):
    """One registered noise at a rate."""

    name: str
    rate: float | None

    def __str__(self) -> str:
        usual = _KINDS[self.name].rate
        return self.name if self.rate == usual else f"{self.name}:{self.rate:g}"


@dataclass(frozen=True)
class Noise:
    r"""Noises of a text, one after the other; without any, the text stays as it is.

    >>> noise = compose(parse_noise("uppercase"), parse_noise("antspeak"))
    >>> str(noise)
    'uppercase+antspeak'
    >>> noise(b"cat \xff")
    b'C A T  \xff'
    """

    steps: tuple[Step, ...] = ()

    def __call__(self, text: Text, seed: int = 0) -> bytes:
        """Return the noised bytes of a text.

        Args:
            text: any bytes.
            seed: seed of the random choices, together with the text.
        """
        data = to_bytes(text)
        for name, rate in self.steps:
            key = hashlib.blake2b(f"{seed} {name} ".encode() + data, digest_size=16).digest()
            data = _KINDS[name].function(data, 1.0 if rate is None else rate, Random(key))
        return data

    def __str__(self) -> str:
        return "+".join(map(str, self.steps)) or "clean"


def compose(*noises: Noise) -> Noise:
    """Return the noise that applies several, the first one first."""
    return Noise(tuple(step for noise in noises for step in noise.steps))


def parse_noise(name: str) -> Noise:
    """Return the noise with a name such as ``drop``, ``drop:0.2`` or ``drop:0.2+uppercase``.

    Raises:
        ConfigError: a noise is unknown, has no rate, or the rate is not between 0 and 1.
    """
    return Noise(tuple(map(_parse_step, name.split("+"))))


def parse_noises(names: str) -> list[Noise]:
    """Return the noises of a list such as ``antspeak,drop:0.2,drop+uppercase``.

    ``paper`` stands for the five of the BLT paper, ``all`` for every registered one.

    >>> print(*parse_noises("paper,drop:0.2"))
    antspeak drop randomcase repeat uppercase drop:0.2

    Raises:
        ConfigError: as :func:`parse_noise`.
    """
    groups = {"paper": PAPER, "all": tuple(_KINDS)}
    each = [one for name in names.split(",") for one in groups.get(name.strip(), (name,))]
    return list(dict.fromkeys(map(parse_noise, each)))


def _parse_step(text: str) -> Step:
    name, colon, number = (part.strip() for part in text.partition(":"))
    kind = _KINDS.get(name)
    if kind is None:
        raise ConfigError(
            f"unknown noise {name!r}{nearest(name, _KINDS)}: {', '.join(_KINDS)}, or paper, or all"
        )
    if not colon:
        return Step(name, kind.rate)
    if kind.rate is None:
        raise ConfigError(f"the noise {name!r} has no rate: write {name}, not {text.strip()}")
    try:
        rate = float(number)
    except ValueError:
        rate = math.nan
    if not 0 <= rate <= 1:
        raise ConfigError(f"the rate of {text.strip()!r} must be a number between 0 and 1")
    return Step(name, rate)


def register_noise(
    name: str,
    function: CharacterNoise | ByteNoise,
    *,
    rate: float | None = None,
    unit: Literal["characters", "bytes"] = "characters",
) -> None:
    """Register a noise by name, for :func:`parse_noise` and ``bytelm eval --noise``.

    >>> register_noise("no-vowels", lambda text, rate, random: re.sub("[aeiou]", "", text))
    >>> parse_noise("no-vowels")("the quick brown fox")
    b'th qck brwn fx'

    Args:
        name: the name.
        function: returns the noised text, from the text, the rate (1 if it has none) and a
            generator, the only source of chance that it should use.
        rate: usual rate, between 0 and 1; ``None`` if the noise has none.
        unit: what the function is given and returns: ``str``, the valid text between bytes that
            are no UTF-8; or ``bytes``, everything.

    Raises:
        ConfigError: the name is taken, or has a character that separates names.
    """
    if name in _KINDS or name in ("paper", "all", "clean"):
        raise ConfigError(f"there is a noise {name!r} already: choose another name")
    if not name or re.search(r"[\s,:+]", name):
        raise ConfigError(f"the name of a noise cannot be {name!r}: no spaces, ',', ':' or '+'")
    made = function if unit == "bytes" else _of_valid_text(function)  # pyright: ignore[reportArgumentType]
    _KINDS[name] = _Kind(made, rate)  # pyright: ignore[reportArgumentType]


def _of_valid_text(function: CharacterNoise) -> ByteNoise:
    """Return the noise of bytes that changes their valid UTF-8 only."""

    def apply(data: bytes, rate: float, random: Random) -> bytes:
        # Bytes that are no UTF-8 are decoded as U+DC80..DCFF, which no valid text holds.
        parts = re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))
        parts[::2] = [function(part, rate, random) if part else "" for part in parts[::2]]
        return "".join(parts).encode("utf-8", "surrogateescape")

    return apply


def _by_character(change: Callable[[str, float], str]) -> CharacterNoise:
    """Return the noise that changes each character with a probability of ``rate``.

    Args:
        change: returns what a chosen character becomes, from it and a number in [0, 1).
    """

    def apply(text: str, rate: float, random: Random) -> str:
        noised = []
        for character in characters(text):
            # Both numbers are always drawn, so that one rate chooses what a lower one does.
            chance, which = random.random(), random.random()
            noised.append(change(character, which) if chance < rate else character)
        return "".join(noised)

    return apply


def characters(text: str) -> list[str]:
    r"""Split text into extended grapheme clusters: what a reader takes for one character.

    >>> [ascii(one) for one in characters("ne\u0301e")]
    ["'n'", "'e\\u0301'", "'e'"]

    These are the clusters of Unicode Standard Annex 29, without its rules for Indic conjuncts and
    for the few marks that precede their letter.
    """
    if text.isascii() and "\r" not in text:
        return list(text)
    found: list[str] = []
    for character in text:
        if found and _continues(found[-1], character):
            found[-1] += character
        else:
            found.append(character)
    return found


def _continues(cluster: str, character: str) -> bool:
    """Whether ``character`` belongs to the cluster before it."""
    last, category = cluster[-1], unicodedata.category(character)
    if last == "\r" or unicodedata.category(last) in ("Cc", "Zl", "Zp"):
        return cluster == "\r" and character == "\n"
    if category.startswith("M") or character in (ZWJ, ZWNJ):
        return True
    if "\U0001f3fb" <= character <= "\U0001f3ff" or "\U000e0020" <= character <= "\U000e007f":
        return True  # skin tones, and the tags of flags of regions
    if "\u1100" <= character <= "\u11ff":  # letters of a Hangul syllable that is not composed
        after = "\u1100" <= last <= "\u11ff" or "\uac00" <= last <= "\ud7a3"
        return after and (character >= "\u1160" or last < "\u1160")
    if "\U0001f1e6" <= character <= "\U0001f1ff":  # two letters make the flag of a country
        return len(cluster) == 1 and "\U0001f1e6" <= last <= "\U0001f1ff"
    return last == ZWJ and category == "So"


def antspeak(text: str, rate: float, random: Random) -> str:
    """Upper-case, with a space between all characters.

    >>> parse_noise("antspeak")("an ant")
    b'A N   A N T'
    """
    return " ".join(characters(text.upper()))


def uppercase(text: str, rate: float, random: Random) -> str:
    """Upper-case.

    >>> parse_noise("uppercase")("Straße").decode()
    'STRASSE'
    """
    return text.upper()


def _drop(character: str, which: float) -> str:
    """Delete the character; by default 10% are.

    >>> parse_noise("drop")("the cat sat on the mat")
    b'the cat sat on the ma'
    """
    return ""


def _random_case(character: str, which: float) -> str:
    """Make the character upper or lower, each with 50%; by default this is done to all.

    >>> parse_noise("randomcase")("the cat sat on the mat")
    b'THE Cat sAT ON The Mat'
    """
    return character.upper() if which < 0.5 else character.lower()


def _repeat(character: str, which: float) -> str:
    """Write the character two, three or four times; by default 20% are repeated.

    The paper says "up to four times" and no more: here the four count the character itself, and
    the three numbers are equally likely.

    >>> parse_noise("repeat")("the cat sat on the mat")
    b'the  ccccat sat on the matt'
    """
    return character * (2 + int(which * (MOST_REPEATS - 1)))


def _typo(character: str, which: float) -> str:
    """Hit a key beside that of the character, on a QWERTY keyboard; by default 10% are.

    Only unaccented letters and digits change; the shift key stays as it was.

    >>> parse_noise("typo:0.3")("The cat sat on the mat")
    b'Ths fzg xat on tyw mw5'
    """
    beside = _NEIGHBOURS.get(character.lower(), "") if character.isascii() else ""
    if not beside:
        return character
    hit = beside[int(which * len(beside))]
    return hit.upper() if character.isupper() else hit


def _homoglyph(character: str, which: float) -> str:
    r"""Write a letter that looks the same: Cyrillic for Latin and the reverse; by default 10% are.

    >>> ascii(parse_noise("homoglyph:0.3")("the cat sat on the mat").decode())
    "'the cat sat \\u043en t\\u04bbe m\\u0430t'"
    """
    return _HOMOGLYPHS.get(character, character)


def flip_bits(data: bytes, rate: float, random: Random) -> bytes:
    r"""Invert one random bit of each byte with a probability of the rate, by default 1%.

    The result may be no UTF-8.

    >>> parse_noise("bitflip:0.2")("the cat sat on the mat")
    b'|he cap 3at"kj the$mat'
    """
    noised = bytearray(data)
    for at in range(len(noised)):
        chance, which = random.random(), random.random()
        if chance < rate:
            noised[at] ^= 1 << int(which * 8)
    return bytes(noised)


def _normalised(form: Literal["NFC", "NFD", "NFKC", "NFKD"]) -> CharacterNoise:
    r"""Return the change to a normalisation form; text in ASCII is the same in all of them.

    >>> parse_noise("nfd")("é"), parse_noise("nfkc")("ﬁ²")
    (b'e\xcc\x81', b'fi2')
    """
    return lambda text, rate, random: unicodedata.normalize(form, text)


def _neighbours() -> dict[str, str]:
    """Return the letters and digits beside each key: those at most 1.3 keys away."""
    rows = (("1234567890", 0.0), ("qwertyuiop", 0.5), ("asdfghjkl", 0.75), ("zxcvbnm", 1.25))
    at = {key: (x + offset, y) for y, (row, offset) in enumerate(rows) for x, key in enumerate(row)}
    return {
        key: "".join(sorted(one for one in at if 0 < math.dist(at[one], place) <= 1.3))
        for key, place in at.items()
    }


_NEIGHBOURS = _neighbours()
# Cyrillic letters with the shape of the Latin ones, in most fonts.
_LATIN = "acdehijlopqsvwxyABCEHIJKMOPSTXY"
_CYRILLIC = (
    "\u0430\u0441\u0501\u0435\u04bb\u0456\u0458\u04cf\u043e\u0440\u051b\u0455\u0475\u051d\u0445\u0443"
    "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u041e\u0420\u0405\u0422\u0425\u0423"
)
_HOMOGLYPHS = dict(zip(_LATIN + _CYRILLIC, _CYRILLIC + _LATIN, strict=True))

register_noise("antspeak", antspeak)
register_noise("drop", _by_character(_drop), rate=0.1)
register_noise("randomcase", _by_character(_random_case), rate=1.0)
register_noise("repeat", _by_character(_repeat), rate=0.2)
register_noise("uppercase", uppercase)
register_noise("typo", _by_character(_typo), rate=0.1)
register_noise("homoglyph", _by_character(_homoglyph), rate=0.1)
register_noise("nfc", _normalised("NFC"))
register_noise("nfd", _normalised("NFD"))
register_noise("nfkc", _normalised("NFKC"))
register_noise("nfkd", _normalised("NFKD"))
register_noise("bitflip", flip_bits, rate=0.01, unit="bytes")
