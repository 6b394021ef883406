"""Builds by several processes, and builds that die, hang or lose a race."""

import fcntl
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from ops import build
from ops.build import cache, toolchain
from ops.build.recipe import Tools, recipe_for


def _fork(count: int) -> list[multiprocessing.Process]:
    """Start `count` processes that load at the same moment; exit status 0 = loaded, 3 = not."""
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(count)

    def run() -> None:
        gate.wait(timeout=30)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sys.exit(0 if build.load("cpp") else 3)

    processes = [context.Process(target=run) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_processes_that_start_together_build_once(sandbox):
    processes = _fork(3)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sandbox.compilations() == 1
    assert len(sandbox.libraries()) == 1


def test_those_who_waited_for_a_failing_build_do_not_repeat_it(sandbox, monkeypatch):
    try_lock = cache._try_lock

    def tell_if_blocked(descriptor: int) -> bool:
        held = try_lock(descriptor)
        if not held:
            (sandbox.trace / f"blocked-{os.getpid()}").touch()
        return held

    monkeypatch.setattr(cache, "_try_lock", tell_if_blocked)
    (sandbox.csrc / "tiny_cpu.cpp").write_text("int broken(\n")
    (sandbox.trace / "wait").touch()
    processes = _fork(3)
    _wait_for(lambda: sandbox.compilations() == 1 and len(list(sandbox.trace.glob("blocked-*"))) == 2)
    (sandbox.trace / "wait").unlink()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [3, 3, 3]
    assert sandbox.compilations() == 1


def test_killed_build_does_not_hold_up_the_next(sandbox, monkeypatch, caplog):
    (sandbox.trace / "wait").touch()
    (process,) = _fork(1)
    _wait_for(lambda: sandbox.compilations() == 1)
    process.kill()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    # Its ninja and compiler live on; the next build has the same name, by a compiler that does not wait.
    monkeypatch.setenv("CXX", "g++")
    assert build.load("cpp")
    (sandbox.trace / "wait").unlink()
    assert sandbox.compilations() == 1
    assert caplog.text == ""
    assert len(sandbox.libraries()) == 1


def test_stuck_compiler_is_stopped(sandbox, monkeypatch):
    monkeypatch.setattr(build, "BUILD_TIMEOUT_S", 0.5)
    (sandbox.trace / "wait").touch()
    assert "did not finish in 0.5 s" in sandbox.failure()
    pid = int((sandbox.trace / "compiled").read_text())
    _wait_for(lambda: not Path(f"/proc/{pid}").exists() or "(zombie)" in Path(f"/proc/{pid}/status").read_text())


def test_lock_time_out_builds_privately(sandbox, monkeypatch, caplog):
    monkeypatch.setattr(build, "LOCK_TIMEOUT_S", 0.2)
    name = recipe_for("cpp", build.CSRC).name(Tools(cxx=toolchain.find_cxx()))
    with (cache.node_dir() / f"{name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert build.load("cpp")
    assert sandbox.compilations() == 1
    assert f"waited 0.2 s for another process that builds {name}" in caplog.text
    assert len(sandbox.libraries()) == 1


def test_loser_of_a_race_between_nodes_loads_its_own_copy(sandbox, tmp_path):
    mine = tmp_path / "mine.so"
    mine.write_text("mine")
    sandbox.cache.mkdir()
    (sandbox.cache / "name.so").write_text("theirs")
    assert cache.publish(mine, "name.so") == mine
    assert (sandbox.cache / "name.so").read_text() == "theirs"
    assert cache.publish(mine, "name.so", replace=True) == sandbox.cache / "name.so"
    assert (sandbox.cache / "name.so").read_text() == "mine"
