"""The byte products of ARM processors become the instructions they are meant to be; this machine cannot run them."""

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from refllm.kernels.packed import dots, simd
from refllm.kernels.packed.simd import Ints

TRIPLE = "aarch64-linux-gnu"
KINDS = (Ints.llvm, dots.BYTES, dots.BYTES)


@pytest.fixture(scope="module")
def target():
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        return llvm.Target.from_triple(TRIPLE)
    except RuntimeError:
        pytest.skip("this LLVM writes no ARM code")


def assembly(target, form, features):
    """void f(int32 total[16], uint8 codes[64], int8 x[64])."""
    module = ir.Module(form)
    module.triple = TRIPLE
    byte = ir.IntType(8).as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte] * 3), "f")
    b = ir.IRBuilder(function.append_basic_block())
    operands = [simd.load(b, p, kind) for p, kind in zip(function.args, KINDS, strict=True)]
    b.store(dots.emit_dot(b, form, *operands), b.bitcast(function.args[0], Ints.llvm.as_pointer()), align=1)
    b.ret_void()
    machine = target.create_target_machine(cpu="generic", features=features, opt=3)
    return machine.emit_assembly(llvm.parse_assembly(str(module)))


def test_each_form_is_its_instruction(target):
    lines = {
        form: assembly(target, form, features).split()
        for form, features in (("sdot", "+dotprod"), ("usdot", "+i8mm"), (dots.PORTABLE, "+neon"))
    }
    assert lines["sdot"].count("sdot") == 4 and lines["usdot"].count("usdot") == 4  # a quarter of the vector each
    assert not {"sdot", "usdot"} & set(lines[dots.PORTABLE])


@pytest.mark.parametrize(
    ("features", "bits", "form"),
    [
        ({"+neon", "+dotprod"}, 4, "sdot"),
        ({"+neon", "+dotprod"}, 8, dots.PORTABLE),
        ({"+neon", "+dotprod", "+i8mm"}, 8, "usdot"),
        ({"+neon"}, 4, dots.PORTABLE),
    ],
)
def test_the_form_follows_the_features(monkeypatch, features, bits, form):
    monkeypatch.setattr(dots, "target_features", lambda: frozenset(features))
    assert dots.dot_form(bits) == form
