"""What other software answered for some numbers: hexadecimal codes, one byte each, written down once.

The generators compare them with the definitions and refuse to write if they differ.
"""

from refllm.evaluate.golden.build import values
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe

SMALL_FLOATS_INPUT = (4242, 12, -8)  # of dyadic; 64 numbers
BLOCKS_INPUT = (4243, 16, -12)  # 2 rows of 64
SMALL_FLOATS = (
    ("FP8_E4M3FN", "ml_dtypes", "0.6.0", "x.astype(ml_dtypes.float8_e4m3fn)", (
        "4bc1c145c94f484747ba47cbccc94141494c4fcf444e45b6c3cd454d2b45cbd0"
        "cacfc1c34fcbc4c442cccbc8b34daecf3a3fcccd48c93c41c746c04a4f41c849"
    )),
    ("FP8_E5M2", "ml_dtypes", "0.6.0", "x.astype(ml_dtypes.float8_e5m2)", (
        "45c1c042c548444343bd43c6c6c44141454648c8424743bbc1c743473643c5c8"
        "c5c7c0c248c5c2c241c6c5c4b947b7c83d3fc6c644c53e41c343c0454741c444"
    )),
    ("FP8_E4M3FNUZ", "ml_dtypes", "0.6.0", "x.astype(ml_dtypes.float8_e4m3fnuz)", (
        "53c9c94dd157504f4fc24fd3d4d14949515457d74c564dbecbd54d55334dd3d8"
        "d2d7c9cb57d3cccc4ad4d3d0bb55b6d74247d4d550d14449cf4ec8525749d051"
    )),
    ("FP8_E5M2FNUZ", "ml_dtypes", "0.6.0", "x.astype(ml_dtypes.float8_e5m2fnuz)", (
        "49c5c446c94c484747c147cacac84545494a4ccc464b47bfc5cb474b3a47c9cc"
        "c9cbc4c64cc9c6c645cac9c8bd4bbbcc4143caca48c94245c747c4494b45c848"
    )),
    ("FP6_E2M3", "ml_dtypes", "0.6.0", "x.astype(ml_dtypes.float6_e2m3fn)", (
        "1b313115391f1817172a173b3c391111191c1f3f141e1527333d151d03153b3f"
        "3a3f31331f3b3434123c3b38251d233f0a0f3c3d18390c113716301a1f113819"
    )),
    ("FP6_E3M2", "ml_dtypes", "0.6.0", "x.astype(ml_dtypes.float6_e3m2fn)", (
        "1531301235181413132d133636341111151618381217132b3137131706133538"
        "353730321835323211363534291727380d0f363614350e113313301517113414"
    )),
    ("FP4_E2M1", "ml_dtypes", "0.6.0", "x.astype(ml_dtypes.float4_e2m1fn)", (
        "070c0c050e070606060a060f0f0e04040607070f0507050a0d0f050701050f0f"
        "0f0f0c0d070f0d0d050f0f0e0907090f02040f0f060e03040e060c0607040e06"
    )),
    ("FP8_E4M3FN", "torch", "2.13.0", "x.to(torch.float8_e4m3fn)", (
        "4bc1c145c94f484747ba47cbccc94141494c4fcf444e45b6c3cd454d2b45cbd0"
        "cacfc1c34fcbc4c442cccbc8b34daecf3a3fcccd48c93c41c746c04a4f41c849"
    )),
    ("FP8_E5M2", "torch", "2.13.0", "x.to(torch.float8_e5m2)", (
        "45c1c042c548444343bd43c6c6c44141454648c8424743bbc1c743473643c5c8"
        "c5c7c0c248c5c2c241c6c5c4b947b7c83d3fc6c644c53e41c343c0454741c444"
    )),
    ("FP8_E4M3FNUZ", "torch", "2.13.0", "x.to(torch.float8_e4m3fnuz)", (
        "53c9c94dd157504f4fc24fd3d4d14949515457d74c564dbecbd54d55334dd3d8"
        "d2d7c9cb57d3cccc4ad4d3d0bb55b6d74247d4d550d14449cf4ec8525749d051"
    )),
)  # fmt: skip
MICROSCALE = (
    ("MXFP4", "floor", "to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.FLOOR)", "7f7f7f7f", (
        "050d0f07010d0f0707070f0e08010c07070601050f020f01070f0e070707010e"
        "0f050e010702010e0307010701060b0e0f0e0e0e0f0f0d06070e050c04030707"
        "070a0b0f07010f020e0f0f0f0c07070f05010f00010d070f0e0700040e04040f"
        "070c050a0f060e0f0f0a0f070e0e0406030f0f09070c0201010706020c070f0e"
    )),
    ("MXFP4", "ceil", "to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.CEIL)", "80808080", (
        "030b0d05010b0d0505060d0c08000a06050401030e010e01050e0c050606000c"
        "0d030c010601000c010601060104090c0d0c0c0c0d0d0b04050c030a02010605"
        "05090a0d05000d010c0e0e0d0a05050d03000e00010b050d0c0500020c02020d"
        "060a03090e040c0d0e090d050c0c0204020d0d09050a0100000504010a060d0c"
    )),
    ("MXFP4", "rceil", "to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL)", "80808080", (
        "030b0d05010b0d0505060d0c08000a06050401030e010e01050e0c050606000c"
        "0d030c010601000c010601060104090c0d0c0c0c0d0d0b04050c030a02010605"
        "05090a0d05000d010c0e0e0d0a05050d03000e00010b050d0c0500020c02020d"
        "060a03090e040c0d0e090d050c0c0204020d0d09050a0100000504010a060d0c"
    )),
    ("MXFP4", "even", "to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.EVEN)", "80808080", (
        "030b0d05010b0d0505060d0c08000a06050401030e010e01050e0c050606000c"
        "0d030c010601000c010601060104090c0d0c0c0c0d0d0b04050c030a02010605"
        "05090a0d05000d010c0e0e0d0a05050d03000e00010b050d0c0500020c02020d"
        "060a03090e040c0d0e090d050c0c0204020d0d09050a0100000504010a060d0c"
    )),
    ("MXFP8_E4M3", "floor", "to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.FLOOR)", "79797979", (
        "74f6fe7c63f5fb7e7e7efbf7ab59f07e7b786374fe6afe607cfef97c7e7e59f7"
        "fb74f9627e695ff66c7e617e617aebf8fbf7faf9fafbf6787dfa74ef726b7e7c"
        "7be9eefc7d5efb67f9fefefbf17d7bfb765efe5460f57bfcf97b546ff97270fb"
        "7ef273e6fe77f7fdfee6fe7af8f7707a6efdfce17af1685e607b7967f17efef9"
    )),
    ("MXFP8_E4M3", "rceil", "to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)", "7a7a7a7a", (
        "6ceef6745bedf3767676f3efa351e87873705b6cf762f75874f7f174777651ef"
        "f36cf15a776157ee647659775972e3f0f3eff2f1f2f3ee7075f26ce76a637774"
        "73e1e6f47556f35ff1f6f7f3e97573f36e56f84c58ed73f4f1734c67f16a68f3"
        "76ea6bdef66feff5f7def672f0ef687266f5f4d972e960565873715fe977f6f1"
    )),
    ("MXFP6_E3M2", "even", "to_mx(x, 'fp6_e3m2', 32, ScaleCalculationMode.EVEN)", "7e7e7e7e", (
        "16373b1a0d373a1b1b1b39372009341c19180d163c113b0c1a3c381a1c1b0838"
        "3916380d1b100c37121b0d1c0d1932383a373938393a37181b39163315111c1a"
        "1930333a1a0b3910383b3b3a341a1a39170b3c060c361a3a381906143915143a"
        "1b35162f3b18383b3b2f3b1938371419133b3a2c1934100b0c1a190f351c3b38"
    )),
)  # fmt: skip
NVFP4 = (
    ("torchao", "torchao", "0.18.0", "nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max()))",
     "7e7e7e7d7d7e7d7e", (
        "040d0f06010d0e0707070e0d08000b07060501040f020f01060f0d060707000d"
        "0e040d010702010d0207010701060a0d0e0d0e0e0e0e0d05070e040b04020706"
        "060a0b0e07010e020e0f0f0e0b07060e05010f00010c060e0d0600030d04030e"
        "070c04090f050d0f0f090f060d0d0306030e0e09060b0201010605010b070f0d"
    )),
    ("compressed_tensors", "compressed-tensors", "0.20.0",
     "quantize(x, *calculate_qparams(low, high, args, global_scale=g), args, global_scale=g)",
     "7e7e7e7d7d7e7d7e", (
        "040d0f06010d0e0707070e0d08000b07060501040f020f01060f0d060707000d"
        "0e040d010702010d0207010701060a0d0e0d0e0e0e0e0d05070e040b04020706"
        "060a0b0e07010e020e0f0f0e0b07060e05010f00010c060e0d0600030d04030e"
        "070c04090f050d0f0f090f060d0d0306030e0e09060b0201010605010b070f0d"
    )),
)  # fmt: skip


def _source(oracle: str, version: str, call: str) -> dict:
    return {"kind": "upstream_run", "name": oracle, "version": version, "call": call}


def small_floats() -> list[tuple]:
    """(id, group's head, format, comment, x, codes) of each answer."""
    numbers = [float(v) for v in dyadic(*SMALL_FLOATS_INPUT, 64)]
    x = values("f32", numbers, recipe=dyadic_recipe(*SMALL_FLOATS_INPUT))
    return [
        (2000 + i, {"params": {"format": name}, "source": _source(oracle, version, call)}, name,
         f"{oracle}'s answer", x, list(bytes.fromhex(codes)))
        for i, (name, oracle, version, call, codes) in enumerate(SMALL_FLOATS)
    ]  # fmt: skip


def block_rows() -> list[list[float]]:
    """The numbers of MICROSCALE and NVFP4: 2 rows of 64."""
    flat = [float(v) for v in dyadic(*BLOCKS_INPUT, 128)]
    return [flat[:64], flat[64:]]


def _two_rows(text: str) -> list[list[int]]:
    flat = list(bytes.fromhex(text))
    return [flat[: len(flat) // 2], flat[len(flat) // 2 :]]


def microscale() -> list[tuple]:
    """(id, group's head, comment, conventions, answer) of each answer."""
    return [
        (2000 + i, {"params": {"format": name}, "source": _source("torchao", "0.18.0", call)}, "torchao's answer",
         {"scale_rule": rule}, {"codes": _two_rows(codes), "scales": _two_rows(scales)})
        for i, (name, rule, call, scales, codes) in enumerate(MICROSCALE)
    ]  # fmt: skip


def nvfp4() -> list[tuple]:
    """(id, group's head, comment, conventions, answer) of each answer."""
    return [
        (2000 + i, {"params": {}, "source": _source(oracle, version, call)}, f"{oracle}'s answer",
         {"convention": convention}, {"codes": _two_rows(codes), "scales": _two_rows(scales)})
        for i, (convention, oracle, version, call, scales, codes) in enumerate(NVFP4)
    ]  # fmt: skip
