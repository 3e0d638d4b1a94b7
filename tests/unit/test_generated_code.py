"""Counting the kernels of an Inductor program."""

import torch

from recompile.torch_private.generated_code import _listeners, hear, launches, programs

PROGRAM = """
async_compile.cpp('not counted')
def call(self, args):
    arg0_1, arg1_1 = args
    # Topologically Sorted Source Nodes: [x], Original ATen: [aten.mm]
    buf0 = empty_strided_cpu((2, 3), (3, 1), torch.float32)
    extern_kernels.mm(arg0_1, arg1_1, out=buf0)
    buf1 = torch.ops.aten._embedding_bag.default(arg0_1, arg1_1)
    cpp_fused_relu_0(buf0, buf1)
    triton_poi_fused_1.run(buf0, 6, stream=stream0)
    return (buf0, )
"""


def test_library_calls_operators_and_generated_kernels_are_launches():
    assert launches(PROGRAM) == 4


def test_the_program_of_a_compilation_is_seen():
    torch._dynamo.reset()
    with programs() as made:
        torch.compile(lambda x: x.relu() + 1)(torch.ones(8))
    assert [launches(source) for source in made] == [1]


def test_who_begins_to_listen_meanwhile_goes_on():
    """As a dump does that `explain` opens first."""
    heard = []
    with programs():
        hear(heard.append)
    torch._dynamo.reset()
    torch.compile(lambda x: x.relu() + 2)(torch.ones(8))
    _listeners.remove(heard.append)
    assert len(heard) == 1
