"""Ctrl-C: before training it ends at once; in training the first asks, the second ends."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from glowflow.orchestration.interrupts import Interrupts


def test_before_training_the_first_signal_ends_the_program() -> None:
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.stop_requested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_training_the_first_signal_asks_and_the_second_ends(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    asked: list[bool] = []
    with Interrupts(lambda: asked.append(True)) as interrupts:
        interrupts.arm()
        assert not interrupts.stop_requested
        os.kill(os.getpid(), number)
        assert interrupts.stop_requested and asked == [True]
        assert "writing a checkpoint" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert asked == [True]


def test_after_training_a_signal_ends_the_program_again() -> None:
    with Interrupts() as interrupts:
        interrupts.arm()
        interrupts.disarm()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_earlier_handlers_come_back_even_when_somebody_replaced_ours() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Interrupts() as interrupts:
        signal.signal(signal.SIGTERM, lambda *_: None)  # as ray.init does
        interrupts.reinstall()
        assert signal.getsignal(signal.SIGTERM) == interrupts._handle
    assert {number: signal.getsignal(number) for number in before} == before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def run() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
