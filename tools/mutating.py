"""One run of mutmut in a folder that tools/mutate.py laid out, fit for tests that use torch, fork and start others.

What is not mutmut's own:

- Operators: a call that is a statement of its own is dropped, a plain condition is negated, decorated functions are
  mutated too; one variant of a changed string instead of three.
- Each mutant's tests have a process group and a temporary folder of their own, both gone afterwards.
- The process that all mutants are forked from has imported all that the tests import.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import libcst as cst
import mutmut.__main__ as mutmut_main
import pytest
from mutmut.mutation import file_mutation
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.mutators import mutation_operators, operator_string
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.workers.isolation import ForkServerRunner

import reached

STAMP = Path("stamp.json")  # what the verdicts are of; written when mutants and clean tests are known to be good
NEW_STAMP = Path("stamp-new.json")
REACHED = Path("reached.txt").absolute()
MODULES = Path("modules.txt").absolute()
OUTPUT = Path("output.txt").absolute()  # of the tests on code that is not mutated, or that must fail
SURVIVED, KILLED, UNSURE, TIMEOUT = 0, 1, 35, 36  # mutmut's exit codes


def dropped_call(node: cst.Expr) -> Iterator[cst.CSTNode]:
    """`f(x)` as a statement becomes `pass`."""
    if isinstance(node.value, cst.Call):
        yield cst.Pass()


def negated(node: cst.If | cst.IfExp | cst.While) -> Iterator[cst.CSTNode]:
    """`if x:` becomes `if not x:`; conditions with operators in them are mutmut's."""
    if isinstance(node.test, cst.Name | cst.Attribute | cst.Call | cst.Subscript):
        yield node.with_changes(test=cst.UnaryOperation(operator=cst.Not(), expression=node.test))


def one_string(node: cst.BaseString) -> Iterable[cst.BaseString]:
    """The first of mutmut's changes of a string; the others die by the same tests."""
    return itertools.islice(operator_string(node), 1)


def extend_mutmut(*, sample: int | None, seed: int) -> None:
    """Put the operators above in, let decorated functions be mutated, and draw `sample` mutants of a file."""
    mutation_operators[:] = [(kind, one_string if op is operator_string else op) for kind, op in mutation_operators]
    mutation_operators.extend([(cst.Expr, dropped_call), (cst.If | cst.While, negated)])

    skip = file_mutation.MutationVisitor._skip_node_and_children
    arrange = file_mutation.function_trampoline_arrangement
    create = file_mutation.create_mutations

    def skip_but_decorated(self: Any, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef) and node.decorators:
            return bool(skip(self, node.with_changes(decorators=[])))
        return bool(skip(self, node))

    def arranged(function: cst.FunctionDef, mutants: Any, class_name: str | None) -> Any:
        declared, (trampoline, *copies), assigned, names = arrange(function, mutants, class_name)
        plain = [d.decorator.value for d in function.decorators if isinstance(d.decorator, cst.Name)]
        if plain not in (["staticmethod"], ["classmethod"]):  # these mutmut copes with; others belong outside only
            copies = [copy.with_changes(decorators=[]) for copy in copies]
        return declared, [trampoline, *copies], assigned, names

    def created(filename: str, *args: Any) -> Any:
        module, mutations, *ignored = create(filename, *args)
        mutations = [m for m in mutations if isinstance(m.contained_by_top_level_function, cst.FunctionDef)]
        Path("total.txt").write_text(f"{len(mutations)}")
        if sample is not None and sample < len(mutations):
            chosen = random.Random(f"{seed} {Path(filename).name}").sample(range(len(mutations)), sample)
            mutations = [mutations[i] for i in sorted(chosen)]
        return module, mutations, *ignored

    file_mutation.MutationVisitor._skip_node_and_children = skip_but_decorated
    file_mutation.function_trampoline_arrangement = arranged
    file_mutation.create_mutations = created
    imports = "from reached import wrap_in_trampoline as _mutmut_mutated, MutantDict"
    file_mutation.trampoline_impl_cst = list(cst.parse_module(imports).body)


def say_to(path: Path) -> None:
    """Send what this process and those it starts print to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


class SharedFixtures:
    """pytest plugin: what a fixture of a session or module reaches is reached by every test that asks for it."""

    def __init__(self) -> None:
        self.tests: dict[str, list[str]] = {}  # by name of the fixture

    def pytest_runtest_setup(self, item: Any) -> None:
        for name in getattr(item, "fixturenames", ()):
            self.tests.setdefault(f"fixture {name}", []).append(item.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        outer = os.environ.get(reached.FIXTURE, "")
        if fixturedef.scope != "function":
            os.environ[reached.FIXTURE] = f"fixture {fixturedef.argname}"
        try:
            return (yield)
        finally:
            os.environ[reached.FIXTURE] = outer


class Tests(PytestRunner):
    """mutmut's way of running pytest, with a warmer start and without leftovers."""

    def execute_pytest(self, params: list[str], **options: Any) -> int:
        if reached.FILE not in os.environ:
            return super().execute_pytest(params, **options)
        shared = SharedFixtures()
        code = super().execute_pytest(params, plugins=[*options.get("plugins", ()), shared])
        for line in REACHED.read_text(encoding="utf-8").splitlines():
            reached_by, _, function = line.partition("\t")
            state().tests_by_mangled_function_name[function].update(shared.tests.get(reached_by, [reached_by]))
        MODULES.write_text("\n".join(sys.modules), encoding="utf-8")
        return code

    def run_stats(self, *, tests: Iterable[str]) -> int:
        say_to(OUTPUT)
        REACHED.write_text("", encoding="utf-8")
        os.environ[reached.FILE] = str(REACHED)
        return super().run_stats(tests=tests)

    def warm_up(self) -> None:
        """Import whatever the tests had imported by their end: seconds that each mutant saves."""
        super().warm_up()
        for name in MODULES.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # so that the garbage collectors of children do not copy all this memory

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        """Run `tests` in a process group of their own, and leave nothing of it: no process, no file."""
        folder = tempfile.mkdtemp(prefix="mutant-")
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            say_to(OUTPUT if mutant_name is None else Path(os.devnull))
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGXCPU):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if mutant_name is not None:  # mutmut's limit of CPU time is for many threads; an endless loop has one
                limit = resource.getrlimit(resource.RLIMIT_CPU)[0] // 4
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
            os.environ["TMPDIR"] = tempfile.tempdir = folder
            code = 4
            try:
                code = super().run_tests(mutant_name=mutant_name, tests=tests)
            finally:
                os._exit(code)
        timed_out = False

        def give_up(*_: object) -> None:
            nonlocal timed_out
            timed_out = True
            os.killpg(child, signal.SIGKILL)

        signal.signal(signal.SIGXCPU, give_up)  # the fork server's watch over the time sends it
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        if timed_out or code == -signal.SIGXCPU:
            return TIMEOUT
        return code if code in (0, 1) else KILLED if code in (2, 3) or code < 0 else UNSURE


class Runner(ForkServerRunner):
    """mutmut's fork server; the tests of a mutant that take the least time are asked first."""

    def run_clean_tests(self, tests: Iterable[str]) -> int:
        return 0  # the run that noted what each test reaches was one

    def run_forced_fail(self) -> int:
        return 1  # and it has shown that the mutated code is what the tests import

    def startup(self) -> None:
        NEW_STAMP.replace(STAMP)  # the tests pass
        super().startup()

    def submit(self, mutant_name: str, tests: list[str], cpu_time_limit: int, estimated_time: float) -> None:
        tests = sorted(tests, key=lambda test: (state().duration_by_test.get(test, 0.0), test))
        super().submit(mutant_name, tests, cpu_time_limit, estimated_time)


def save_whole(save: Callable[[SourceFileMutationData], None]) -> Callable[[SourceFileMutationData], None]:
    """Verdicts are written to another name first: a kill may come at any time."""

    def saved(data: SourceFileMutationData) -> None:
        place = data.meta_path
        data.meta_path = place.with_suffix(".new")
        save(data)
        data.meta_path = data.meta_path.replace(place)

    return saved


class Progress:
    """A line now and then: how many mutants have a verdict."""

    def __init__(self) -> None:
        self.next = 0.0

    def __call__(self, data: dict[str, SourceFileMutationData], force_output: bool = False) -> None:
        if force_output or time.monotonic() > self.next:
            self.next = time.monotonic() + 30
            codes = [code for one in data.values() for code in one.exit_code_by_key.values()]
            done, lived = sum(code is not None for code in codes), sum(code in (0, 5, 33) for code in codes)
            print(f"{time.strftime('%H:%M:%S')} {done} of {len(codes)}, {lived} survived", flush=True)


def main() -> None:
    """Score the mutants of this folder that have no verdict yet; arguments: processes, mutants a file or 0, seed."""
    processes, sample, seed = map(int, sys.argv[1:])
    extend_mutmut(sample=sample or None, seed=seed)
    SourceFileMutationData.save = save_whole(SourceFileMutationData.save)  # type: ignore[method-assign]
    mutmut_main.get_mutant_runner = lambda max_workers=1: Runner(max_workers, Tests, {})
    mutmut_main.print_status = lambda *_: None  # a spinner
    mutmut_main.print_stats = Progress()
    mutmut_main._run((), processes)


if __name__ == "__main__":
    main()
