"""Compile a Triton kernel for an NVIDIA target on a machine without one, and read its machine code.

Run in a process of its own with TRITON_INTERPRET=0, since the interpreter, once chosen, stays:

    compiled = machine_code.compile_all([Request(...), ...])
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Request:
    """One kernel to compile. `signature` names each run-time argument's type (`*bf16`, `i32`) in order;
    `constants` gives the constexpr ones; arguments in `aligned` are divisible by 16, as at real sizes."""

    name: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, int]
    aligned: tuple[str, ...]
    warps: int
    stages: int
    sm: int = 90


@dataclass(frozen=True)
class Compiled:
    """What the cubin holds: SASS opcode -> count, registers a thread, spilled bytes, shared memory bytes."""

    opcodes: dict[str, int]
    registers: int
    stack_bytes: int
    shared_bytes: int

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode that matches the regular expression from its start."""
        return sum(count for opcode, count in self.opcodes.items() if re.match(pattern, opcode))


def compile_all(requests: list[Request]) -> dict[str, Compiled]:
    """Request name -> Compiled, in one child process. Raises RuntimeError with its output if that fails."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "tests.machine_code"], cwd=ROOT, env=env, text=True,
                          capture_output=True, input=json.dumps([dataclasses.asdict(one) for one in requests]))
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return {name: Compiled(**fields) for name, fields in json.loads(done.stdout.splitlines()[-1]).items()}


def _compile(request: Request) -> Compiled:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(request.module), request.kernel)
    names = kernel.arg_names
    signature = {name: request.signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in request.aligned}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in request.constants.items()}, attrs)
    options = {"num_warps": request.warps, "num_stages": request.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", request.sm, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()

        def tool(*command: str) -> str:
            return subprocess.run([str(tools / command[0]), *command[1:], cubin.name],
                                  capture_output=True, text=True, check=True).stdout

        usage = tool("cuobjdump", "--dump-resource-usage")
        sass = tool("nvdisasm", "-c")
    opcodes: dict[str, int] = {}
    for opcode in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE):
        opcodes[opcode] = opcodes.get(opcode, 0) + 1
    return Compiled(opcodes, int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1]),
                    binary.metadata.shared)


if __name__ == "__main__":
    requested = [Request(**fields) for fields in json.load(sys.stdin)]
    print(json.dumps({one.name: dataclasses.asdict(_compile(one)) for one in requested}))
