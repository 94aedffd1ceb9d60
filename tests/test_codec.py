import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import cut, piece_sizes
from bytelm import codec


@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_decode_inverts_encode_for_any_bytes(data, bos, eos):
    ids = codec.encode(data, bos=bos, eos=eos)
    assert len(ids) == len(data) + bos + eos
    assert codec.decode(ids) == data
    assert not bos or ids[0] == codec.BOS
    assert not eos or ids[-1] == codec.EOS


def test_ids_are_bytes_plus_four():
    assert codec.encode(bytes([0, 255]), bos=False).tolist() == [4, 259]


@given(st.text(st.characters(codec=None) | st.sampled_from("\ud800\udbff\udc80\udcff\udfff")))
def test_every_str_has_bytes(text):
    def one(character):
        if "\udc80" <= character <= "\udcff":  # stands for an undecodable byte
            return bytes([ord(character) - 0xDC00])
        return character.encode("utf-8", "surrogatepass")

    assert codec.to_bytes(text) == b"".join(map(one, text))


def test_undecodable_input_escaped_by_python_is_restored():
    raw = b"caf\xe9 \xff"
    assert codec.to_bytes(raw.decode("utf-8", "surrogateescape")) == raw
    assert codec.to_bytes("\ud800x") == b"\xed\xa0\x80x"


@pytest.mark.parametrize("bad", [-1, 260])
def test_decode_names_an_id_out_of_range(bad):
    with pytest.raises(ValueError, match=str(bad)):
        codec.decode(np.array([5, bad]))


@given(st.one_of(st.binary(max_size=80), st.text(max_size=30).map(str.encode)), piece_sizes)
def test_utf8_stream_equals_decoding_at_once_and_holds_back_at_most_three_bytes(data, sizes):
    stream, text, fed = codec.Utf8Stream(), "", 0
    for piece in cut(data, sizes):
        text += stream.feed(piece)
        fed += len(piece)
        # Everything but the start of one character that may still become valid is out.
        assert len(text) >= len(data[: max(fed - 3, 0)].decode("utf-8", "ignore"))
    assert text + stream.close() == data.decode("utf-8", "replace")


def test_utf8_stream_never_stalls_on_invalid_bytes():
    stream = codec.Utf8Stream()
    assert stream.feed(b"\xff") == "\ufffd"
    assert stream.feed(b"\xe2\x82") == ""
    assert stream.feed(b"A") == "\ufffdA"
