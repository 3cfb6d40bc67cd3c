// consumer.mjs: answers golden requests. Keep this file; replace the ops in ops.mjs.
//
//     refllm golden verify formats/gguf --exec node consumer.mjs
//
// runs `node consumer.mjs request.json` for every case. Exit code: 0 the outputs are written, 3 the op is not
// supported, 4 the input is rejected; anything else is a failure of the case. With --batch before --exec it is started
// once, as `node consumer.mjs -`: a path a line on standard input, the code a line on standard output.
// node 18 or later, no packages.
import { readFileSync, writeFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { Rejected, Unsupported, answer } from './ops.mjs';

// dtype of a safetensors file -> typed array; f16 and bf16 are their bits.
const TYPES = {
  BOOL: Uint8Array, U8: Uint8Array, I8: Int8Array, U16: Uint16Array, I16: Int16Array, F16: Uint16Array,
  BF16: Uint16Array, U32: Uint32Array, I32: Int32Array, F32: Float32Array, U64: BigUint64Array, I64: BigInt64Array,
  F64: Float64Array,
};

// safetensors: 8 bytes length of the header, the header as JSON, the data. All little-endian.
function readTensors(path) {
  const file = readFileSync(path);
  const start = 8 + Number(file.readBigUInt64LE(0));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(JSON.parse(file.toString('utf8', 8, start)))) {
    if (name === '__metadata__') continue;
    const bytes = Uint8Array.from(file.subarray(start + data_offsets[0], start + data_offsets[1])); // a copy is aligned
    tensors[name] = { dtype, shape, data: new TYPES[dtype](bytes.buffer) };
  }
  return tensors;
}

function writeTensors(path, tensors) {
  const header = {}, parts = [];
  let end = 0;
  for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
    if (!(data instanceof TYPES[dtype])) throw new TypeError(`${name}: ${dtype} is not ${data.constructor.name}`);
    header[name] = { dtype, shape, data_offsets: [end, (end += data.byteLength)] };
    parts.push(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  }
  const json = JSON.stringify(header);
  const text = Buffer.from(json + ' '.repeat(-Buffer.byteLength(json) & 7));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  writeFileSync(path, Buffer.concat([length, text, ...parts]));
}

// -> [exit code, message]
function run(path) {
  const request = JSON.parse(readFileSync(path, 'utf8'));
  try {
    writeTensors(request.outputs, answer(request.op, request.params, readTensors(request.inputs)));
    return [0, ''];
  } catch (error) {
    if (error instanceof Unsupported) return [3, error.message];
    if (error instanceof Rejected) return [4, error.message];
    throw error; // a crash: node prints it and ends with 1
  }
}

const path = process.argv[2];
if (process.argv.length !== 3) {
  console.error('usage: node consumer.mjs request.json, or - to read their paths');
  process.exitCode = 2;
} else if (path === '-') {
  for await (const line of createInterface({ input: process.stdin })) console.log(run(line).join(' ').trim());
} else {
  const [code, message] = run(path);
  if (message) console.error(message);
  process.exitCode = code;
}
