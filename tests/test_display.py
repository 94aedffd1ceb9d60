import pytest

from bytelm.display import si


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 "),
        (0.25, "0.25 "),
        (7, "7 "),
        (999.4, "999 "),
        (999.6, "1 k"),
        (123_456, "123 k"),
        (3.162e8, "316 M"),
        (9.999e11, "1 T"),
        (4.65e22, "4.65e+04 E"),
    ],
)
def test_numbers_have_three_digits_and_a_prefix(value, shown):
    assert si(value) == shown
