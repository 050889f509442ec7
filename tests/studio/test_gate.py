import threading

import pytest

from nmke.studio.gate import Gate
from nmke.studio.limits import StudioError


def test_turns_are_given_in_the_order_of_asking():
    gate, order, started = Gate(10), [], []
    with gate.turn():
        threads = []
        for number in range(5):
            thread = threading.Thread(target=lambda n=number: take(gate, order, n))
            thread.start()
            while gate.waiting <= number:
                pass
            threads.append(thread)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4] and not started


def take(gate, order, number):
    with gate.turn():
        order.append(number)


def test_a_long_line_turns_the_impatient_away():
    gate = Gate(0)
    with gate.turn(), pytest.raises(StudioError, match="wait for the model already"), gate.turn():
        pass
    with gate.turn():
        pass


def test_an_error_inside_gives_the_turn_back():
    gate = Gate(0)
    with pytest.raises(ZeroDivisionError), gate.turn():
        _ = 1 / 0
    with gate.turn():
        pass
