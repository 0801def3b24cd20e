"""Compile a Triton kernel for an NVIDIA target on a machine without one, and read its machine code.

    compiled = machine_code.compile_all([Request(...), ...])

Compiling takes most of a test run's time, so a run compiles each kernel once, whichever tests ask for it: what was
found is left in a folder of the run's (conftest.py makes it), and the workers of a run divide what they both ask for.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "MACHINE_CODE"  # the environment variable that names the run's folder


@dataclass(frozen=True)
class Request:
    """One kernel to compile, plain or Gluon. `signature` names each run-time argument's type (`*bf16`, `i32`) in order;
    `constants` gives the constexpr ones, a function by its dotted name; arguments in `aligned` are divisible by 16, as
    at real sizes; `options` are more of the launch's."""

    name: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, int | str]
    aligned: tuple[str, ...]
    warps: int
    stages: int
    sm: int = 90
    options: dict[str, int] = field(default_factory=dict)

    @property
    def result(self) -> Path:
        """Where a run keeps what the kernel compiled to: by all that decides that, and the name does not."""
        fields = json.dumps(dataclasses.asdict(dataclasses.replace(self, name="")), sort_keys=True)
        return Path(os.environ[FOLDER]) / hashlib.sha256(fields.encode()).hexdigest()


@dataclass(frozen=True)
class Compiled:
    """What the cubin holds: SASS opcode -> count, registers a thread, spilled bytes, shared memory bytes; and the PTX
    that it was made of."""

    opcodes: dict[str, int]
    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode that matches the regular expression from its start."""
        return sum(count for opcode, count in self.opcodes.items() if re.match(pattern, opcode))


def compile_all(requests: list[Request]) -> dict[str, Compiled]:
    """Request name -> Compiled. Raises RuntimeError with the compiler's traceback if one does not compile."""
    missing = [dataclasses.asdict(one) for one in requests if not one.result.exists()]
    if missing:
        compiler, answer = _compiler(), ""
        with suppress(BrokenPipeError):
            print(json.dumps(missing), file=compiler.stdin, flush=True)
            answer = compiler.stdout.readline()
        if not answer:
            _compiler.cache_clear()
            raise RuntimeError(f"the compiler crashed, exit status {compiler.wait()}")
        if error := json.loads(answer):
            raise RuntimeError(error)
    return {one.name: Compiled(**json.loads(one.result.read_text())) for one in requests}


@functools.cache
def _compiler() -> subprocess.Popen:
    """A process of its own, since the interpreter, once chosen, stays. It reads requests until it is stopped or this
    process ends: to start takes it longer than to compile many a kernel."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "tests.machine_code"], cwd=ROOT, env=env, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def stop() -> None:
    """End the compiler if it runs."""
    if _compiler.cache_info().currsize:
        with _compiler():
            pass  # closes what it reads, and waits
        _compiler.cache_clear()


def _serve() -> None:
    """The compiler: a line of requests in, a line with what went wrong out."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a kernel prints is no answer
    for line in sys.stdin:
        error = ""
        try:
            _compile_missing([Request(**fields) for fields in json.loads(line)])
        except Exception:  # whatever it is: compile_all raises it where it was asked for
            error = traceback.format_exc()
        print(json.dumps(error), file=answers, flush=True)


def _compile_missing(requests: list[Request]) -> None:
    """First what no other process is at, then what is left: another's failure is found again here, and told."""
    for wait in (False, True):
        for one in requests:
            with _locked(one.result.with_suffix(".lock"), wait) as mine:
                if mine and not one.result.exists():
                    text = json.dumps(dataclasses.asdict(_compile(one)))
                    whole = one.result.with_suffix(".part")
                    whole.write_text(text)
                    whole.rename(one.result)  # who sees the file, sees all of it


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether the lock is held inside. The system frees a lock whose process has ended."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _compile(request: Request) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = _named(f"{request.module}.{request.kernel}")
    names = kernel.arg_names
    signature = {name: request.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): _named(value) if isinstance(value, str) else value
                 for name, value in request.constants.items()}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in request.aligned}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attrs)
    options = {"num_warps": request.warps, "num_stages": request.stages, **request.options}
    binary = triton.compile(source, target=GPUTarget("cuda", request.sm, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()

        def tool(*command: str) -> str:
            return subprocess.run([str(tools / command[0]), *command[1:], cubin.name],
                                  capture_output=True, text=True, check=True).stdout

        usage = tool("cuobjdump", "--dump-resource-usage")
        sass = tool("nvdisasm", "-c", "-ndf")
    opcodes: dict[str, int] = {}
    for opcode in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE):
        opcodes[opcode] = opcodes.get(opcode, 0) + 1
    return Compiled(opcodes, int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1]),
                    binary.metadata.shared, binary.asm["ptx"])


def _named(path: str) -> object:
    """What a dotted name stands for."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    _serve()
