"""What a Sampling refuses before anything is drawn."""

import pytest

from jaxreason.types import Sampling


@pytest.mark.parametrize("stop", [("",), ("\n", ""), (1,), (None,), "END", ["END"]])
def test_stops_are_a_tuple_of_texts(stop):
    """An empty one is in every text: all completions would end at their first token."""
    with pytest.raises(ValueError, match=r"^sampling.stop is .*tuple of texts, none") as error:
        Sampling(max_tokens=4, stop=stop)
    assert repr(stop) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stop_ids", [(-1,), (3, 0.5), ("3",), (True,), 3, [3]])
def test_stop_ids_are_a_tuple_of_whole_numbers(stop_ids):
    with pytest.raises(ValueError, match=r"^sampling.stop_ids is .*whole numbers from 0$") as error:
        Sampling(max_tokens=4, stop_ids=stop_ids)
    assert repr(stop_ids) in str(error.value) and "\n" not in str(error.value)


def test_stops_that_are_right():
    sampling = Sampling(max_tokens=4, stop=("\n", " "), stop_ids=(0, 7))
    assert (sampling.stop, sampling.stop_ids) == (("\n", " "), (0, 7))
