"""Triton's interpreter, made faster for the tests of kernels; what it computes stays as it is."""

import pytest

from kvcompress.kernels.common.runtime import INTERPRETED


@pytest.fixture(autouse=True, scope="session")
def language_is_patched_once_a_launch():
    """The interpreter patches triton.language when it launches a kernel, and again whenever the kernel calls another
    function: half of its time, in which it finds all of it patched already."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, {}

    def patch_once(fn):
        # a function sees one of the two modules, or both
        sees = tuple(any(value is language for value in fn.__globals__.values()) for language in languages)
        if sees in patched:
            return patched[sees]
        scope = patched[sees] = patch(fn)
        restore = scope.restore

        def restored():
            restore()
            patched.clear()

        scope.restore = restored
        return scope

    languages = (interpreter.tl, interpreter.tl.core)
    with pytest.MonkeyPatch.context() as change:
        change.setattr(interpreter, "_patch_lang", patch_once)
        yield
