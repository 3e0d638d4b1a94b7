"""Reading an Inductor program: how many kernels it starts, and which of them are whose."""

import torch

from recompile import dump_graph
from recompile.lowering.fingerprint import digest
from recompile.recording import Recording
from recompile.report import GraphRecord, RegionRecord
from recompile.torch_private.generated_code import _listeners, hear, is_backward, kernels, launches, programs

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


CPP = "cpp_{op}_{n} = async_compile.cpp_pybinding(['float*'], r'''\n// recompile::{op}, spec {spec}\nint {n};\n''')\n"


def test_kernels_are_cut_out_of_a_program():
    program = (
        "cpp_fused_0 = async_compile.cpp_pybinding(['float*'], r'''\nint other;\n''')\n"
        + CPP.format(op="lookup_backward", n=1, spec="0a0a0a0a")
        + "lookup_0 = async_compile.triton('lookup_0', '''\nimport triton\n''', device_str='cuda')\n"
    )
    first, second = kernels(program)
    assert (first.name, first.op, first.spec) == ("cpp_lookup_backward_1", "lookup_backward", "0a0a0a0a")
    assert first.source == "int 1;\n" and first.is_backward
    assert (second.name, second.op, second.suffix) == ("lookup_0", "lookup", "py")
    assert second.source == "import triton\n" and not second.is_backward


def test_a_program_with_tangents_is_a_backward():
    assert is_backward("def call(self, args):\n    primals_1, tangents_1 = args\n")
    assert not is_backward("def call(self, args):\n    primals_1, = args\n# tangents_1\n")


def region(name, spec="A"):
    return {"name": name, "op": "recompile.attention.default", "args": [spec]}


def recorded(programs, regions):
    recording = Recording(GraphRecord(), "", strict=False)
    names = [r["name"] for r in regions]
    blank = {"inputs": [], "text": "", "value": "", "line": "", "module": "", "rule": "", "kernel": ""}
    recording.nodes = [{"name": n, "op": "call_function", "target": "", **blank} for n in names]
    recording.stages = [{"pass": "captured", "ms": 0.0, "order": list(range(len(names)))}]
    recording.regions, recording.programs = regions, programs
    return recording


def test_regions_with_one_spec_have_their_kernels_in_order_and_gradients_in_reverse():
    spec = digest("A")
    forward = "".join(CPP.format(op="attention", n=n, spec=spec) for n in (10, 11))
    backward = "".join(CPP.format(op="attention_backward", n=n, spec=spec) for n in (20, 21))
    recording = recorded([forward, backward], [region("a"), region("b")])
    recording.record.regions = [RegionRecord("a", ""), RegionRecord("b", "")]
    files = dump_graph.files(recording, 3)
    assert [r.kernel for r in recording.record.regions] == ["graph-3/kernels/a.cpp", "graph-3/kernels/b.cpp"]
    first = {
        name: text for name, text in files.items() if name.startswith("kernels/") and "inductor" not in name
    }
    assert {name: text.splitlines()[-1] for name, text in first.items()} == {
        "kernels/a.cpp": "int 10;",
        "kernels/b.cpp": "int 11;",
        "kernels/b-backward.cpp": "int 20;",
        "kernels/a-backward.cpp": "int 21;",
    }
    assert [node["kernel"] for node in recording.nodes] == ["kernels/a.cpp", "kernels/b.cpp"]
    assert "gradients of region b" in files["kernels/b-backward.cpp"]


def test_a_kernel_of_no_known_region_keeps_its_name():
    triton = "attention_0 = async_compile.triton('attention_0', '''\nx\n''')\n"
    other = CPP.format(op="attention", n=1, spec="ffffffff")
    recording = recorded([triton + other], [region("a"), region("b")])
    found = {name for name in dump_graph.files(recording, 0) if name.startswith("kernels/")}
    assert found == {"kernels/inductor.py", "kernels/attention_0.py", "kernels/cpp_attention_1.cpp"}
    alone = recorded([triton], [region("a")])
    assert "kernels/a.py" in dump_graph.files(alone, 0)
