"""Two things that Triton's interpreter does at great cost and to no effect, left out: tests then take half the time."""

from __future__ import annotations

import dataclasses

import triton.language as tl
from triton.runtime import interpreter


def spare() -> None:
    """For this process: overflow checks that nothing reads, and patches over patches."""
    # Every sum and product of integers is made once more in int64 and compared, for an assertion that is only made
    # with `debug`, which is off.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # Every call of a function inside a kernel searches triton.language for what to replace, which the launch has done.
    patch_lang = interpreter._patch_lang

    def patch_once(fn):
        languages = [one for one in fn.__globals__.values() if one is tl or one is tl.core]
        if languages and not any(tl.core.is_builtin(one.load) for one in languages):
            return interpreter._LangPatchScope()  # nothing to do, nothing to undo
        return patch_lang(fn)

    interpreter._patch_lang = patch_once
