"""Tables, ids and offsets that end where unreadable memory begins: a read past them would kill the process."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import ctypes, math, mmap
    import torch
    import recompile.lowering
    from recompile.lowering.lookup import Bag, Lookup, Output, Table

    libc = ctypes.CDLL(None, use_errno=True)
    kept = []

    def guarded(tensor):
        '''A copy of `tensor` whose last byte is the last readable one.'''
        size = tensor.numel() * tensor.element_size()
        pages = math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
        kept.append(memory)
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
        return flat.view(tensor.shape).copy_(tensor)

    def spec(dim):
        bags = (Bag(0, (0,)), Bag(0, (1,), "sum", keep="Ne(x0, 0)", divisor="count + 1"),
                Bag(0, (2,), "sum", offsets=3), Bag(0, (2,), "max", offsets=3))
        return str(Lookup((Table("t", dim),), bags, (Output("concat", (0, 1, 2, 3)),)))

    compiled = torch.compile(lambda w, s, text: torch.ops.recompile.lookup(w, s, text)[0])
    for dim in (1, 3, 16, 25, 64):
        for dtype in (torch.float32, torch.bfloat16):
            torch._dynamo.reset()  # it compiles a function only so many times
            table = guarded(torch.randn(37, dim).to(dtype)).requires_grad_()
            one = guarded(torch.tensor([36, 0, 36, 35]))
            many = guarded(torch.randint(30, 37, (4, 5)))
            ids = guarded(torch.tensor([36, 36, 1, 36, 36]))
            offsets = guarded(torch.tensor([0, 2, 2, 4]))
            out = compiled([table], [one, many, ids, offsets], spec(dim))
            expected = torch.ops.recompile.lookup([table], [one, many, ids, offsets], spec(dim))[0]
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
            out.sum().backward()
            for bad in (37, 10**12, -1, -(2**62)):
                wrong = guarded(torch.tensor([36, 0, bad, 35]))
                try:
                    compiled([table], [wrong, many, ids, offsets], spec(dim))
                except RuntimeError as error:
                    assert f"got id {bad}" in str(error), error
                else:
                    raise AssertionError(f"id {bad} was accepted")
    print("no read outside")
"""


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_outside_is_read():
    done = run(textwrap.dedent(SCRIPT))
    assert done.returncode == 0 and "no read outside" in done.stdout, done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_the_guard_bites():
    script = textwrap.dedent(SCRIPT)
    cut = script.index("def spec")
    read = "guarded(torch.zeros(4)); m = kept[0]; at = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
    read += "ctypes.string_at(at + len(m) - 1, 1)\n"
    assert run(script[:cut] + read).returncode < 0
