"""What other software answered for the random cases: sha256 of its arrays, written down once.

The generators compare them with the definitions and refuse to write if they differ.
"""

from refllm.evaluate.golden.build import CaseSpec
from refllm.evaluate.golden.suite import array_hash

CALLS = {
    "gptq": (
        "auto-round",
        "0.16.1",
        "auto_round_extension.torch.qlinear_torch_zp (gptq), qlinear_torch (gptq_v2): pack",
    ),
    "awq": ("compressed-tensors", "0.20.0", "AutoAWQConverter._convert_gemm_module(qweight, scales, qzeros)"),
    "compressed-tensors": ("compressed-tensors", "0.20.0", "pack_to_int32(value, bits, packed_dim)"),
    "bitsandbytes": ("bitsandbytes", "0.50.2", "torch.ops.bitsandbytes.dequantize_4bit on the CPU"),
    "int8": ("bitsandbytes", "0.50.2", "functional.int8_vectorwise_dequant(weight, SCB)"),
    "matmul_nbits": ("onnxruntime", "1.31.1", "MatMulNBits on the CPU, times the identity"),
    "fp8": ("transformers", "5.23.0", "integrations.finegrained_fp8.Fp8Dequantize._dequantize_one"),
    "gpt_oss": ("transformers", "5.23.0", "integrations.mxfp4.convert_moe_packed_tensors, float32, transposed back"),
    "bitnet": ("transformers", "5.23.0", "integrations.bitnet.pack_weights"),
    "swizzle": ("torchao", "0.18.0", "prototype.mx_formats.utils.to_blocked"),
}
ANSWERS = {
    "gptq, 2 bits": {
        "qweight": "8a2e4aff0dcf711b7ffa249bdf8c6bda7d38cda17cec0e270431d53835b6c914",
        "qzeros": "8b7e57b210a2ab56360d1afe0cd47a11d006987b533e6fd143ec0ff76f3bb866",
    },
    "gptq, 3 bits": {
        "qweight": "46156d0b2c9be6772de793e4925d4cea08f0d284f63d0a2fe372ed14172ed81e",
        "qzeros": "ea835031e7dda64d69174f891f1e1888a7b20343f35e1c460e53d96b2e3350e6",
    },
    "gptq, 4 bits": {
        "qweight": "aaf2edb3bbcee57167d229b5f062bf856fedf26c7b1028e241a0984083c95ad5",
        "qzeros": "c1976c98e02afa1e3d0dfaea4427422ed39ac1ac21e667ecc64d847d7adf20d8",
    },
    "gptq, 8 bits": {
        "qweight": "d284e04e503f4468084ef68e89c83db1c35cf22fdb2b9b24f0ca27fc8f74d69c",
        "qzeros": "d3152e4dc74b176da4d4045f7afe558dfec6c8b7d24d021be25d36ddb39d04a1",
    },
    "gptq_v2, 2 bits": {
        "qweight": "c6808f1f5dae9d60b76ad41d0299f1cef1eeb95ae094b3aee9f85a7daa57064a",
        "qzeros": "510323abe0beec30020253d045cc25e4d32a59a9465b2d9554736c1f1cc40695",
    },
    "gptq_v2, 3 bits": {
        "qweight": "6fe2ff169bcd7c88f3b7580d60870ac603d0cd978c8cc7ed43653f66839e898d",
        "qzeros": "9baf52111b3d8026cac9ff8e775a3b1f72c07f635d71c492fb71c211fddeed12",
    },
    "gptq_v2, 4 bits": {
        "qweight": "a4c53171414a3c50e3ace5847916d10396189589a435d43fa005acea54eac551",
        "qzeros": "9151dbe332db05751009b74a9babbe4bc156ed9b076b2bff95029971b4d92b52",
    },
    "gptq_v2, 8 bits": {
        "qweight": "85bba7714ba20974142308f6343b153cedf81ad1e286a6fa62b01f0646363ca6",
        "qzeros": "1a22f3943b6a9505acf90ad7e198584340c4a7714cc2826ac228dd33b4876b1c",
    },
    "awq": {
        "codes": "ee147274624a378e245193035b20034e5c8f8083027a6f5c1b5cda2949e86a05",
        "zero_point": "8b071c74f32e111c3a89fdd1d5937ebcf17cb2097b46b8be29022e6c0075b28d",
    },
    "pack-quantized, 1 bits": {
        "weight_packed": "8080f2080addebcdc164336b6fc87294aac11aa564f1decafa5f2d2497ebb680",
        "weight_zero_point": "6a02be4a0375ede444b748d3605c47aed25e97e4e974b4ff0c0fdabb38c2f8b6",
    },
    "pack-quantized, 2 bits": {
        "weight_packed": "65322ebac788b44e757fa24a494476abbc13cf6629f7ec642a8c793ed47583e3",
        "weight_zero_point": "276b4e4b8842d7de7276c7ba9542a5b9bf0c54e2e49b281734244a2ba9b90555",
    },
    "pack-quantized, 3 bits": {
        "weight_packed": "303e71045114f63eed674120857f0370170839d522dc4d1cd070dfaef26a05a6",
        "weight_zero_point": "3013f950bd0baec666b3b28084ea137f52f5f2453937ebee41185ce0f73faa0c",
    },
    "pack-quantized, 4 bits": {
        "weight_packed": "4d374677ce930d4d088174dc3a59020c9ed1a4f90788de2ca0a12647a374b2ca",
        "weight_zero_point": "f467225c644e9c9dd6508d1f1620197e6ee952820f65c66a5bca72fad3a4d3c9",
    },
    "pack-quantized, 5 bits": {
        "weight_packed": "090a2baa367310337f7b8415627fce7761dc3bd6ab2b900df35d9896771ee156",
        "weight_zero_point": "004d4b4abc92d9d87861d7ff3304327ccacbd859f28bf863883dacf4d51ed82c",
    },
    "pack-quantized, 6 bits": {
        "weight_packed": "6d35ced828286b58c927c2b8d244e0ccc8aa09400680dcd04187d0e5b4ef6022",
        "weight_zero_point": "1223332feef4eb419fb9c1527916343e8145c3bc35af76f8ac07e97801646ddd",
    },
    "pack-quantized, 7 bits": {
        "weight_packed": "695ff150d615a5992950103517839fd2a621f968947599b4bdd8100b0c23aa42",
        "weight_zero_point": "10380cdb1b5d60632f2fad2c30cd92fa3fffd97d6a649321edaa26d67cb6da62",
    },
    "pack-quantized, 8 bits": {
        "weight_packed": "771537fbbe35cb5c4771ef82cbeb6ba0719f6b685a6ec0684a04034a09083c2b",
        "weight_zero_point": "27ad5f7aa2bdaa19ad1c3e614c6eeb1816a38e19da59909f23342061f44f82e3",
    },
    "nf4": {
        "w_hat": "d29788ad7a5a34649501367d8a28779e45f39a27c90ee38f6c7b1caf55690dc5",
    },
    "fp4": {
        "w_hat": "8b1c34a4b68ce6308027862655e2bea3a155f39563f23d78806034de6106986b",
    },
    "int8": {
        "w_hat": "cfb59ec3aa4d61adc514a3e7598ee3dd016ce50cefd14aa27e0cac7110379d7e",
    },
    "matmul_nbits": {
        "w_hat": "24d303bd0374058895e670279e37232b1d11b81c4546f6ec69bb394bdcb7bb0d",
    },
    "fp8": {
        "w_hat": "667c1a22e010e9a1c5b5e927600af843162fd3c6291417a03c60b559f95c7615",
    },
    "gpt_oss": {
        "w_hat": "58cf75ae622264cd536bec70c4d5de4c9063baa48f8d982b144e2a8836040959",
    },
    "bitnet": {
        "weight": "1b7a4cccfd0462ee5a846d3b9958bbf66ff91fe845a727b0cbfb284855e75388",
    },
    "swizzle": {
        "data": "afd98b794983161ea76a8dfbe960b062f2e4c4affbe1d25668b01ff4d5838457",
    },
}


def matches(answer: str, case: CaseSpec, outputs: tuple[str, ...]) -> bool:
    """Whether a case expects the arrays that the other software gave; of variants the first."""
    expected = {name: case.expected[name] for name in outputs}
    tensors = {name: output.tensor or output.variants[0][1] for name, output in expected.items()}
    return ANSWERS.get(answer) == {name: array_hash(tensor.array) for name, tensor in tensors.items()}
