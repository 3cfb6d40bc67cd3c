"""What other software answered to the valid cases of formats/gguf_*: a sha256 for each type, written down once.

Each is of the answers to the type's valid cases, in their order, as raw bytes. The generator compares them with the
definitions and refuses to write if they differ.
gguf-py 0.19's encoders give the same bytes too, where there are any, but for blocks of zeros that begin with -0: Q4_0,
Q4_1, Q5_0 and Q5_1 then store another sign of zero (case 3 of each type).
"""

ENCODED = {
    "Q4_0": "fc7d4e3d1300e9158dd1ff368a637950dab8984a4f945f9396a0f09ddfcbb29a",
    "Q4_1": "e43cee1166bd85bd4bdb97d6c8710e271a9472365430735d3787a43669d3c239",
    "Q5_0": "2c12db9933e058fbb60422812bb7a47b82e0b1f705075e8d4773df6c4c42e5ae",
    "Q5_1": "480e5baa1c99425d3b86f994c930a3ef83713794da024017f3ac2722727236a7",
    "Q8_0": "690cf73c6e2ac1783d5a1a167f5b7379e0fc749dd7b38800559a4f5a76e7b3f1",
    "Q2_K": "4bb9488dc447508d47cf5641880ee3cbe68fcf3d0b365017af9273bda6f63fb9",
    "Q3_K": "5d9fbbb65a0b68a1c48497f566ca5d8b503e34c999730ad48b6053f7d2c127d7",
    "Q4_K": "6293b3d68170779f331007afd84c02ec4fe6bd84831990c539c53cfa7a284105",
    "Q5_K": "7d95fa18c7e6719bf9a07e0fad197d5e85b0d5cb2f59b266f0c8ced418120058",
    "Q6_K": "02e930c7085ca32d2557c461221f45932e63f636a04d0a6c38628cb82e128ed2",
    "IQ4_NL": "2778b9a79a446822f918f6017abdc3326ca77777e55ad37c37683c2e2e3c7dae",
    "IQ4_XS": "5c2519b2d973c949a4b3156b7b5e591cc91a9d2179e3ea3a53829edd067a0b66",
    "TQ1_0": "b8bac1068cf6a0081cf69973f822c94aeaddece1c98d64855425450f2cdb4925",
    "TQ2_0": "dad49c836e2ac3576d631a21f9462c347d7fa8fd7f93096cd38d55d050ae53f8",
    "MXFP4": "79ece8578c4028b1e0f1708b7dbdcfb293a21e969e75c8e8b7385ec1b58dd551",
    "NVFP4": "1e20ea5f273dcda7e3704a4a5f44e49b236519cb20f64e4bf7ecc7bd361faaa9",
    "Q1_0": "d915aa7b4bfe3af7c7e8376849323547bba60955c3672e076e9a2d816501286c",
}
DECODED = {
    "Q4_0": "ff49b6923611a15bf4d639f0a870c34fd3ae2a5c6d349dc8b63e1915d29d4638",
    "Q4_1": "f5ae7eb4dcde2989689709f6137cfde33a0674c23ddb787818538fd86047ad54",
    "Q5_0": "53164833fd6cf294f71d8ddf92c70a768e01e33fe8100fcd32fc592f3e3a4758",
    "Q5_1": "891a16fcd0352d0e7d8cc2bbd70dd87fa58f6c1211a04fd629e876e272ffd616",
    "Q8_0": "b30180f7d04e89c680547909cded0e6be7cea966f85dc0e2a87f78e0150b783c",
    "Q2_K": "5b823409c2563ae4c1c0b0d281d411938c89ccc965ebe7475541f9e10d6c4185",
    "Q3_K": "658d042979e688a17a9d3ecdda6812b7c46920340ee1d5b16a79fe89603eb1ca",
    "Q4_K": "5303fdb8995ccbc9d6ac117967c4cfa11a87f1b0095e1af6ab01b9973585e53d",
    "Q5_K": "b554d304eba86238b23f976c93b431ce2386cf3b5a511218b1b6315968b5330f",
    "Q6_K": "058ff6988e5e1e76fb59c9e597334413fddfcf786946dd35f0cee7905b6018bc",
    "IQ4_NL": "b46966fa044c34e54b426a8b4984a447e10425ee11b5b9fa5a3838b7dd3c6b45",
    "IQ4_XS": "9b7f08e75eecdb6291ccfd70f882762f3beb840ed6c32ad078d310c01ec5e94f",
    "TQ1_0": "fe111d968170be2f4ac5232ebc17e299d9d2555cf44a54d11983f6874fe95d39",
    "TQ2_0": "ccbbc874cb608927ccee0c2fc52a50433fcc0b9368ed8d9d13b70c26812b3deb",
    "MXFP4": "a9105897667369c342e3c98b83572460c1db932563d26b219fdbe53b7e977917",
    "NVFP4": "0860020db8f9bed46e4d2c8bd29be1ae5205d72af049d0ed2a5a33b2c15906c2",
    "Q1_0": "77c6135e5a1a1131a32509706a3ed2ddcda8b6bec07bdf9fe5e5e99802ce2848",
}
ANSWERS = {
    "encode": [("libgguf", "0.2.2", "libgguf.quantize_rows(x, type, importance)", ENCODED)],
    "decode": [
        ("libgguf", "0.2.2", "libgguf.dequantize_rows(blocks, type)", DECODED),
        (
            "gguf",
            "0.19.0",
            "gguf.quants.dequantize(blocks, type)",
            {name: digest for name, digest in DECODED.items() if name != "Q1_0"},
        ),
    ],
}
