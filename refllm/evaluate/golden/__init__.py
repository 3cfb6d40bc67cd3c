"""Golden vectors: inputs and expected outputs any implementation in any language can be checked against.

    suite.py      the files: find, read, check hashes, build the arrays
    schema.py     the JSON-Schema subset that describes a manifest
    lint.py       is a suite well formed, complete and comparable?
    compare.py    comparison classes: when is an output right?
    runner.py     run cases on a Python function or on any program
    own.py        refllm's own implementation of the ops
    build.py      writing suites; suites/ holds their generators
    export.py     suites for programs that read no JSON
    report.py     what a run says
    commands.py   `refllm golden ...`

How to use the vectors without Python: docs/golden.md.
"""

from refllm.evaluate.golden.commands import add_parser as add_parser
