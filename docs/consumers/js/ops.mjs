// ops.mjs: a few formats and kernels, checked against refllm's golden cases. Replace them with yours.
//
// answer(op, params, inputs) -> outputs. Arrays are { dtype, shape, data } as in a safetensors file; f16 and bf16 come
// as their bits.
export class Unsupported extends Error {}
export class Rejected extends Error {}

const float32 = (shape) => ({ dtype: 'F32', shape, data: new Float32Array(shape.reduce((a, b) => a * b, 1)) });

function check(array, ...shape) {
  if (array.shape.join() !== shape.join()) throw new Rejected(`shape ${shape} was expected, got ${array.shape}`);
}

// ---- small floats ---------------------------------------------------------------------------------------------------

// Codes are without the sign bit; -1: the format has none.
const format = (dtype, sign, fractionBits, bias, max, infinity, nan) =>
  ({ dtype, sign, fractionBits, bias, max, infinity, nan });
const FLOATS = {
  FP16: format('F16', 0x8000, 10, 15, 0x7bff, 0x7c00, 0x7e00),
  BF16: format('BF16', 0x8000, 7, 127, 0x7f7f, 0x7f80, 0x7fc0),
  TF32: format('U32', 0x40000, 10, 127, 0x3fbff, 0x3fc00, 0x3fe00),
  FP8_E4M3FN: format('U8', 0x80, 3, 7, 0x7e, -1, 0x7f),
  FP8_E5M2: format('U8', 0x80, 2, 15, 0x7b, 0x7c, 0x7e),
  FP8_E4M3FNUZ: format('U8', 0x80, 3, 8, 0x7f, -1, 0x80), // NaN takes the place of -0
  FP8_E5M2FNUZ: format('U8', 0x80, 2, 16, 0x7f, -1, 0x80),
  FP6_E2M3: format('U8', 0x20, 3, 1, 0x1f, -1, -1),
  FP6_E3M2: format('U8', 0x20, 2, 3, 0x1f, -1, -1),
  FP4_E2M1: format('U8', 0x08, 1, 1, 0x07, -1, -1),
  UE4M3: format('U8', 0, 3, 7, 0x7e, -1, 0x7f),
  E8M0: format('U8', 0, 0, 127, 0xfe, -1, 0xff), // powers of two, no zero
};

function floatValue(f, code) {
  const size = code & ~f.sign, field = size >> f.fractionBits, fraction = size - (field << f.fractionBits);
  if (code === f.nan || (size > f.max && size !== f.infinity)) return NaN;
  const one = 2 ** f.fractionBits;
  let value = (fraction + (field ? one : 0)) / one * 2 ** ((field || 1) - f.bias);
  if (f.fractionBits === 0) value = 2 ** (size - f.bias);
  if (size === f.infinity) value = Infinity;
  return code & f.sign ? -value : value;
}

const negative = (x) => x < 0 || Object.is(x, -0);

// Nearest, ties to even; beyond the largest number the largest, but infinity stays.
function floatCode(f, x, nanSign) {
  const sign = (Number.isNaN(x) ? nanSign : negative(x)) ? f.sign : 0;
  if (Number.isNaN(x) || (x < 0 && !f.sign)) {
    if (f.nan < 0) throw new Rejected('the format has no NaN');
    return f.nan === f.sign ? f.nan : sign | f.nan;
  }
  if (!Number.isFinite(x)) return sign | (f.infinity < 0 ? f.max : f.infinity);
  const lowest = (f.fractionBits > 0) - f.bias;
  const exponent = Math.max(exponentOf(Math.abs(x)), lowest);
  const steps = Math.abs(x) * 2 ** f.fractionBits / 2 ** exponent; // powers of two: exact
  let code = even(steps) + (exponent - lowest) * 2 ** f.fractionBits;
  if (f.fractionBits === 0) code = exponent - lowest + (steps > 1.5 || (steps === 1.5 && (exponent - lowest) % 2));
  if (code === 0 && f.nan === f.sign) return 0;
  return sign | Math.min(code, f.max);
}

// floor(log2(x)), exactly, from the bits; far below every format for 0 and for subnormal float64.
function exponentOf(x) {
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, x);
  return ((view.getUint16(0) >> 4) & 0x7ff) - 1023;
}

function even(x) { // to the nearest integer, halves to the even one
  const low = Math.floor(x), rest = x - low;
  return low + (rest > 0.5 || (rest === 0.5 && low % 2 === 1));
}

const half = (low, high) => floatValue(FLOATS.FP16, low | high << 8);
const number = ({ dtype, data }, i) => dtype === 'F16' ? floatValue(FLOATS.FP16, data[i]) : data[i];

function findFloat(name) {
  if (!Object.hasOwn(FLOATS, name)) throw new Rejected(`no format ${name}`);
  return FLOATS[name];
}

function floatEncode({ format: name }, { x }) {
  const f = findFloat(name);
  const Codes = { U8: Uint8Array, U32: Uint32Array }[f.dtype] ?? Uint16Array;
  const bytes = new Uint8Array(x.data.buffer), size = x.data.BYTES_PER_ELEMENT;
  const topBit = (i) => bytes[(i + 1) * size - 1] >> 7; // the sign of a NaN is nowhere else
  const data = Codes.from(x.data, (_, i) => floatCode(f, number(x, i), topBit(i)));
  return { codes: { dtype: f.dtype, shape: x.shape, data } };
}

function floatDecode({ format: name }, { codes }) {
  const f = findFloat(name);
  const data = Float32Array.from(codes.data, (code) => floatValue(f, code));
  return { x: { dtype: 'F32', shape: codes.shape, data } };
}

// ---- GGUF blocks ----------------------------------------------------------------------------------------------------

// A mistake on request: refllm's tests set this to see that it is caught.
const SWAP = process.env.SWAP_NIBBLES ? 1 : 0;
const nibble = (byte, high) => (high ^ SWAP ? byte >> 4 : byte & 15);
const int8 = (byte) => byte << 24 >> 24;
const f32 = Math.fround; // one float32 operation a call

// type -> elements, bytes, (block, element i) -> number
const BLOCKS = {
  Q4_0: [32, 18, (b, i) => half(b[0], b[1]) * (nibble(b[2 + i % 16], i >> 4) - 8)],
  Q8_0: [32, 34, (b, i) => half(b[0], b[1]) * int8(b[2 + i])],
  // Code 8 is +0 in GGUF: -0 + 0.
  MXFP4: [32, 17, (b, i) => floatValue(FLOATS.FP4_E2M1, nibble(b[1 + i % 16], i >> 4)) * 2 ** (b[0] - 127) + 0],
  Q4_K: [256, 144, (b, i) => { // d, dmin, 8 pairs of 6 bits in 12 bytes, nibbles in chunks of 64
    const j = i >> 5, s = b.subarray(4, 16);
    const scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
    const min = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
    const code = nibble(b[16 + 32 * (i >> 6) + i % 32], j % 2);
    return f32(half(b[0], b[1]) * scale * code) - f32(half(b[2], b[3]) * min);
  }],
  Q6_K: [256, 210, (b, i) => { // 128 bytes of low nibbles, 64 of high pairs, 16 scales, d
    const h = i >> 7, k = i % 128 >> 5, l = i % 32;
    const code = nibble(b[64 * h + 32 * (k % 2) + l], k >> 1) | (b[128 + 32 * h + l] >> 2 * k & 3) << 4;
    return half(b[208], b[209]) * int8(b[192 + (i >> 4)]) * (code - 32);
  }],
};

function ggufDecode({ type }, { blocks }) {
  if (!Object.hasOwn(BLOCKS, type)) throw new Unsupported(`type ${type}`);
  const [elements, bytes, decode] = BLOCKS[type];
  const last = blocks.shape.at(-1);
  if (last === undefined || last % bytes) throw new Rejected(`rows of ${last} bytes, blocks of ${bytes}`);
  const x = float32([...blocks.shape.slice(0, -1), last / bytes * elements]);
  for (let block = 0; block * bytes < blocks.data.length; block++) {
    const b = blocks.data.subarray(block * bytes, (block + 1) * bytes);
    for (let i = 0; i < elements; i++) x.data[block * elements + i] = decode(b, i);
  }
  return { x };
}

// ---- checkpoints ----------------------------------------------------------------------------------------------------

// Code i of a stream of codes in 32-bit words that lie `stride` apart.
function wordCode(words, start, stride, i, bits) {
  const word = Math.floor(i * bits / 32), shift = i * bits % 32;
  let code = words[start + word * stride] >>> shift;
  if (shift + bits > 32) code |= words[start + (word + 1) * stride] << 32 - shift;
  return code & ((1 << bits) - 1);
}

const AWQ_PLACE = [0, 4, 1, 5, 2, 6, 3, 7]; // nibble n of a word holds code 0 2 4 6 1 3 5 7
function awqCode(words, start, i) {
  const n = AWQ_PLACE[i % 8];
  return nibble(words[start + (i >> 3)] >>> 8 * (n >> 1) & 255, n % 2);
}

// Both store matrices transposed. Unpacking gives codes, scales, zero points and weights as [out, ...].
function unpack({ direction, bits, checkpoint_format: version }, { qweight, qzeros, scales, g_idx: index }, awq) {
  if (direction !== 'unpack') throw new Unsupported(`direction ${direction}`);
  const [groups, out] = scales.shape, width = out * bits / 32;
  const columns = awq ? qweight.shape[0] : qweight.shape[0] * 32 / bits;
  check(qweight, qweight.shape[0], awq ? width : out), check(qzeros, groups, width);
  if (index) check(index, columns);
  else if (columns % groups) throw new Rejected(`${columns} columns, ${groups} groups`);
  const group = (_, i) => index ? index.data[i] : Math.floor(i / (columns / groups));
  const g_idx = { dtype: 'I32', shape: [columns], data: Int32Array.from({ length: columns }, group) };
  if (!g_idx.data.every((g) => g >= 0 && g < groups)) throw new Rejected('g_idx names a group without scale');
  const codes = { dtype: 'U8', shape: [out, columns], data: new Uint8Array(out * columns) };
  const zero_point = { dtype: 'U8', shape: [out, groups], data: new Uint8Array(out * groups) };
  const scale = { dtype: 'F16', shape: [out, groups], data: new Uint16Array(out * groups) };
  const w_hat = float32([out, columns]);
  for (let o = 0; o < out; o++) {
    for (let g = 0; g < groups; g++) {
      const zero = awq ? awqCode(qzeros.data, g * width, o) : wordCode(qzeros.data, g * width, 1, o, bits);
      const minusOne = version === 'gptq' ? 1 : 0; // v1 stores zero points minus one
      zero_point.data[o * groups + g] = zero + minusOne & ((1 << bits) - 1);
      scale.data[o * groups + g] = scales.data[g * out + o];
    }
    for (let i = 0; i < columns; i++) {
      const code = awq ? awqCode(qweight.data, i * width, o) : wordCode(qweight.data, o, out, i, bits);
      const at = o * groups + g_idx.data[i];
      codes.data[o * columns + i] = code;
      w_hat.data[o * columns + i] = number(scale, at) * (code - zero_point.data[at]);
    }
  }
  return awq ? { codes, scale, zero_point, w_hat } : { codes, scale, zero_point, w_hat, g_idx };
}

// ---- a kernel: y = x w^T on packed integers -------------------------------------------------------------------------

// Code i of a row that is one little-endian stream of `bits`-bit codes.
function streamCode(row, i, bits) {
  const word = row[i * bits >> 3] | row[(i * bits >> 3) + 1] << 8; // beyond the row: undefined, which is 0 here
  return word >> (i * bits & 7) & ((1 << bits) - 1);
}

function rtnMatmul({ bits, group_size, columns }, { x, packed, scale, packed_zero_point: zeros }) {
  const group = group_size > 0 ? group_size : columns, groups = columns / group, [out] = packed.shape;
  const rows = group_size === 0 ? 1 : out;
  const width = Math.ceil(columns * bits / 8), zeroWidth = Math.ceil(groups * bits / 8);
  check(x, x.shape[0], columns), check(packed, out, width), check(scale, rows, groups);
  if (zeros) check(zeros, rows, zeroWidth);
  const scales = Array.from(scale.data, (_, i) => number(scale, i));
  if (!scales.every(Number.isFinite)) throw new Rejected('a scale is not finite');
  const w = new Float32Array(out * columns);
  for (let o = 0; o < out; o++) {
    const row = group_size === 0 ? 0 : o;
    const packedRow = packed.data.subarray(o * width, (o + 1) * width);
    const zeroRow = zeros?.data.subarray(row * zeroWidth, (row + 1) * zeroWidth);
    for (let i = 0; i < columns; i++) {
      const g = Math.floor(i / group), zero = zeroRow ? streamCode(zeroRow, g, bits) : 1 << (bits - 1);
      w[o * columns + i] = scales[row * groups + g] * (streamCode(packedRow, i, bits) - zero);
    }
  }
  const y = float32([x.shape[0], out]);
  for (let t = 0; t < x.shape[0]; t++)
    for (let o = 0; o < out; o++) {
      let sum = 0;
      for (let i = 0; i < columns; i++) sum = f32(sum + f32(x.data[t * columns + i] * w[o * columns + i]));
      y.data[t * out + o] = sum;
    }
  return { y };
}

const OPS = {
  'formats.float.encode': floatEncode,
  'formats.float.decode': floatDecode,
  'formats.gguf.decode': ggufDecode,
  'formats.gptq': (params, inputs) => unpack(params, inputs, false),
  'formats.awq': (params, inputs) => unpack({ ...params, bits: 4 }, inputs, true),
  'quant.rtn.matmul': rtnMatmul,
};

export function answer(op, params, inputs) {
  if (!Object.hasOwn(OPS, op)) throw new Unsupported(`op ${op}`);
  return OPS[op](params, inputs);
}
